"""`llmtrain train` over storage that stalls.

STALL holds RANK, SECONDS and CALL: what reads the data on that rank takes so many seconds more, and from that call on
for ever. STALL_START holds a RANK that never comes to read. STALL_SAVE holds RANK and CALL: what writes checkpoints on
that rank takes for ever from that call on. STALL_BACKWARD holds RANK and CALL: so does that backward pass.
STALL_WATCHDOG holds RANK and SECONDS: its watchdog looks only so often.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from typing import Any

import torch

from llmtrain import assemble
from llmtrain.checkpoint import format as fmt
from llmtrain.data.batches import Windows
from llmtrain.errors import run_main
from llmtrain.health import watchdog
from llmtrain.train import main

read, write, open_data = Windows.gather, fmt.write_rank, assemble.open_data
differentiate = torch.Tensor.backward
own_rank = int(os.environ.get("RANK", "0"))
rank, seconds, last_read = (float(word) for word in os.environ["STALL"].split())
rank_of_saves, last_save = (float(word) for word in os.environ.get("STALL_SAVE", "-1 0").split())
rank_of_start = int(os.environ.get("STALL_START", "-1"))
rank_of_backward, last_backward = (float(word) for word in os.environ.get("STALL_BACKWARD", "-1 0").split())
rank_of_watchdog, period_s = (float(word) for word in os.environ.get("STALL_WATCHDOG", "-1 0").split())
reads, saves, passes = itertools.count(1), itertools.count(1), itertools.count(1)


def stuck_in_storage() -> None:
    """Wait for what never comes."""
    threading.Event().wait()


def gather(self: Windows, ids: Any) -> Any:
    """Read as ever, but late."""
    if own_rank == rank:
        if next(reads) >= last_read:
            stuck_in_storage()
        time.sleep(seconds)
    return read(self, ids)


def write_rank(*arguments: Any) -> None:
    """Write as ever, until that call."""
    if own_rank == rank_of_saves and next(saves) >= last_save:
        stuck_in_storage()
    write(*arguments)


def open_late(*arguments: Any) -> Any:
    """Open the data as ever, or never."""
    if own_rank == rank_of_start:
        stuck_in_storage()
    return open_data(*arguments)


def backward(self: torch.Tensor, *arguments: Any, **options: Any) -> None:
    """Differentiate as ever, until that call."""
    if own_rank == rank_of_backward and next(passes) >= last_backward:
        self.register_hook(lambda _gradient: stuck_in_storage())
    differentiate(self, *arguments, **options)


if own_rank == rank_of_watchdog:
    watchdog._PERIOD_S = period_s
torch.Tensor.backward = backward  # type: ignore[assignment, method-assign]
assemble.open_data = open_late  # type: ignore[assignment]
Windows.gather = gather  # type: ignore[method-assign]
fmt.write_rank = write_rank
sys.exit(run_main(main))
