"""The console where the output is no terminal: one line per record, for log files."""

from __future__ import annotations

import sys
from typing import TextIO

from llmtrain.observe import formats
from llmtrain.observe.pace import Pace
from llmtrain.observe.record import Record


class PlainConsole:
    """Prints plain lines to stdout, and warnings to stderr."""

    def __init__(self, pace: Pace):
        self._pace = pace

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

    def record(self, record: Record) -> None:
        """Print one line of progress."""
        self.message("  ".join(self._pace.pieces(record).values()))

    def close(self, outcome: str) -> None:
        """Print how the run ended."""
        self.message(outcome)


def _print(text: str, stream: TextIO) -> None:
    # An encoding without some character (a log under LC_ALL=C) costs that character and not the run.
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
