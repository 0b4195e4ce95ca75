"""Worker processes: a Ctrl-C is the parent's to see, whenever it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.data import workers

SHOW_BLOCKED = "print(next(line for line in open('/proc/self/status') if line.startswith('SigBlk')).split()[1])"


def double(item: int) -> int:
    return 2 * item


def make_double() -> Callable[[int], int]:
    return double


def test_an_interrupt_while_workers_start_is_not_lost() -> None:
    def interrupt_and_start() -> None:
        with workers._interrupts_blocked():
            os.kill(os.getpid(), signal.SIGINT)
            started.append("all of it")

    started: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_and_start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert started == ["all of it"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="shows a process's blocked signals on Linux only")
def test_what_is_started_meanwhile_never_sees_one() -> None:
    with workers._interrupts_blocked():
        blocked = subprocess.check_output([sys.executable, "-c", SHOW_BLOCKED])
    assert int(blocked, 16) & 1 << (signal.SIGINT - 1)


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(workers.ordered_map(make_double, range(40), 2)) == [2 * item for item in range(40)]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
