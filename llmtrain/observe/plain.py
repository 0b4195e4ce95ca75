"""The console where the output is no terminal: lines for log files, and not more of them than one reads."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from llmtrain.errors import tell
from llmtrain.observe import formats
from llmtrain.observe.pace import Pace
from llmtrain.observe.record import Record


class PlainConsole:
    """Prints plain lines to stdout, and warnings to stderr.

    Records with a validation loss, the first and the last get a line each; of the others so many that a line comes
    once in a hundredth of the time since the start, at most once in `_LEAST_S` and at least in `_MOST_S` seconds: a
    hundred lines while the time grows by a factor of e, 1,440 on each later day, whatever `logging.every` is.
    """

    _SHARE = 0.01
    _LEAST_S, _MOST_S = 1.0, 60.0

    def __init__(self, pace: Pace, clock: Callable[[], float] = time.monotonic):
        self._pace, self._clock = pace, clock
        self._started = clock()
        self._told_at: float | None = None
        self._untold: Record | None = None  # the last one, where it was left out

    def start(self, header: dict[str, str]) -> None:
        """Print what is run, as a table."""
        width = max(map(len, header), default=0)
        for name, value in header.items():
            self.message(f"{name:<{width}}  {value}")

    def message(self, text: str) -> None:
        """Print one message."""
        _print(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Print one warning."""
        _print(f"warning: {text}", sys.stderr)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Print what the model wrote after `prompt`."""
        self.message(f"sample at step {formats.count(step)}:\n{formats.printable(prompt + text.rstrip())}\n")

    def saved(self, path: Path) -> None:
        """Print where a checkpoint is."""
        self.message(f"saved {path}")

    def record(self, record: Record) -> None:
        """Print a line of progress, beginning with the time of day, where it is due."""
        self._pace.take(record)
        self._untold, now = record, self._clock()
        pause_s = min(max(self._SHARE * (now - self._started), self._LEAST_S), self._MOST_S)
        if self._told_at is None or record.val_loss is not None or now - self._told_at >= pause_s:
            self._tell_progress(record, now)

    def _tell_progress(self, record: Record, now: float) -> None:
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(record.time)) if math.isfinite(record.time) else "?"
        self.message("  ".join([at, *self._pace.pieces().values()]))
        self._untold, self._told_at = None, now

    def close(self, outcome: str) -> None:
        """Print the last record, where that was not done, and how the run ended."""
        if self._untold:
            self._tell_progress(self._untold, self._clock())
        self.message(outcome)


class QuietConsole:
    """Prints warnings to stderr, and how the run ended."""

    def start(self, header: dict[str, str]) -> None:
        """Say nothing."""

    def message(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Print one warning."""
        _print(f"warning: {text}", sys.stderr)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Say nothing; samples.jsonl has it."""

    def saved(self, path: Path) -> None:
        """Say nothing."""

    def record(self, record: Record) -> None:
        """Say nothing; metrics.jsonl has it."""

    def close(self, outcome: str) -> None:
        """Print how the run ended."""
        _print(outcome, sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    # An encoding without some character (a log under LC_ALL=C) costs that character and not the run.
    encoding = stream.encoding or "utf-8"
    tell(text.encode(encoding, "replace").decode(encoding), stream)
