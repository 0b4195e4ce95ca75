"""`llmtrain train` over storage that stalls: STALL holds RANK, SECONDS and CALL, and what reads the data on that rank
takes so many seconds more, and from that call on for ever."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from typing import Any

from llmtrain.data.batches import Windows
from llmtrain.errors import run_main
from llmtrain.train import main

read = Windows.gather
rank, seconds, last_call = (float(word) for word in os.environ["STALL"].split())
calls = itertools.count(1)


def stuck_in_storage() -> None:
    """Wait for what never comes."""
    threading.Event().wait()


def gather(self: Windows, ids: Any) -> Any:
    """Read as ever, but late."""
    if int(os.environ.get("RANK", "0")) == rank:
        if next(calls) >= last_call:
            stuck_in_storage()
        time.sleep(seconds)
    return read(self, ids)


Windows.gather = gather  # type: ignore[method-assign]
sys.exit(run_main(main))
