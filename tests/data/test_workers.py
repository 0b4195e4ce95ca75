"""Worker processes: a Ctrl-C is the parent's to see, whenever it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain.data import workers
from llmtrain.data.recipe import BYTES_PER_WORKER, default_workers
from llmtrain.errors import UserError

SHOW_BLOCKED = "print(next(line for line in open('/proc/self/status') if line.startswith('SigBlk')).split()[1])"


def double(item: int) -> int:
    return 2 * item


def make_double() -> Callable[[int], int]:
    return double


def twice(item: bytes) -> bytes:
    return item + item


def make_twice() -> Callable[[bytes], bytes]:
    return twice


@pytest.mark.parametrize("another_thread", [False, True])
def test_an_interrupt_while_workers_start_is_not_lost(another_thread: bool) -> None:
    """Also when a thread that does not block signals takes it, as the kernel is free to let it."""

    def interrupt_and_start() -> None:
        with workers._interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # so that whoever takes it has
            started.append("all of it")

    started: list[str] = []
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    if another_thread:
        thread.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_and_start()
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
    assert started == ["all of it"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="shows a process's blocked signals on Linux only")
def test_what_is_started_meanwhile_never_sees_one() -> None:
    with workers._interrupts_held():
        blocked = subprocess.check_output([sys.executable, "-c", SHOW_BLOCKED])
    assert int(blocked, 16) & 1 << (signal.SIGINT - 1)


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(workers.ordered_map(make_double, range(40), 2)) == [2 * item for item in range(40)]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def fail_at_three(item: int) -> int:
    if item == 3:
        raise UserError("three")
    return item


def make_fail_at_three() -> Callable[[int], int]:
    return fail_at_three


def test_items_and_results_larger_than_a_pipe_go_both_ways_beside_small_ones() -> None:
    """Of which a worker holds two: nobody waits for the other to take what he sends."""
    items = [bytes(size) for _ in range(6) for size in (1, 3 << 20, 4000, 4000, 1 << 15, 1 << 20)]
    assert list(workers.ordered_map(make_twice, items, 2, alike=True)) == [item + item for item in items]


def test_the_error_of_the_first_item_that_fails_comes_after_the_results_before_it() -> None:
    found = []
    with pytest.raises(UserError, match="three"):
        for item in workers.ordered_map(make_fail_at_three, range(100), 2):
            found.append(item)
    assert found == [0, 1, 2]


def test_for_each_calls_in_order_while_the_next_item_is_made() -> None:
    events, begun = list[str](), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        assert begun.wait(30)  # which it is not before this goes on
        yield 1

    def use(item: int) -> None:
        begun.set()
        is_main = threading.current_thread() is threading.main_thread()
        events.append(f"{item} in {'the main' if is_main else 'a'} thread")

    workers.for_each(use, items())
    assert events == ["0 in a thread", "1 in a thread"]


def test_after_a_call_that_failed_none_comes_and_its_error_is_told() -> None:
    """Whatever the items do meanwhile."""
    used = list[int]()

    def use(item: int) -> None:
        if item == 1:
            time.sleep(0.1)  # others wait by then
            raise UserError("one")
        used.append(item)

    def items(ends_with_error: bool) -> Iterator[int]:
        yield from range(3)
        if ends_with_error:
            raise UserError("items")
        yield from range(3, 100)

    for ends_with_error in (False, True):
        with pytest.raises(UserError, match="one"):
            workers.for_each(use, items(ends_with_error))
        assert used == [0]
        used.clear()


def test_what_was_made_before_the_items_failed_is_used() -> None:
    used = list[int]()

    def items() -> Iterator[int]:
        yield from range(5)
        raise UserError("items")

    with pytest.raises(UserError, match="items"):
        workers.for_each(used.append, items())
    assert used == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("kind", "expected"), [("bbpe", 8), ("byte", 7), ("char", 7), (None, 8)])
def test_there_is_a_worker_for_each_core_but_one_where_a_tokenizer_has_no_work(
    kind: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtrain.data.recipe.usable_cores", lambda: frozenset(range(8)))
    assert default_workers(1 << 40, kind) == expected
    assert default_workers(BYTES_PER_WORKER, kind) == default_workers(0, kind) == 1
