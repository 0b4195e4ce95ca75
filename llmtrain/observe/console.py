"""What a run says to the person who started it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Protocol

from llmtrain.observe.pace import Pace
from llmtrain.observe.record import Record


class Console(Protocol):
    """A place to tell about the run."""

    def start(self, header: dict[str, str]) -> None:
        """Say what is run: name → value, one line each."""

    def message(self, text: str) -> None:
        """Say something."""

    def warn(self, text: str) -> None:
        """Say something that asks for attention."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show what the model wrote after `prompt`."""

    def saved(self, path: Path) -> None:
        """Say that a checkpoint is there."""

    def record(self, record: Record) -> None:
        """Show how far the run is."""

    def close(self, outcome: str) -> None:
        """Say how the run ended."""


def open_console(kind: str, total_steps: int, steps_per_epoch: int) -> Console:
    """The console of that kind, see `logging.console`; only the live one imports rich."""
    pace = Pace(total_steps, steps_per_epoch)
    if kind == "live" or (kind == "auto" and _is_capable_terminal()):
        from llmtrain.observe.live import LiveConsole

        return LiveConsole(pace, is_forced=kind == "live")
    from llmtrain.observe.plain import PlainConsole, QuietConsole

    return QuietConsole() if kind == "quiet" else PlainConsole(pace)


def _is_capable_terminal() -> bool:
    # Without UTF-8 there is no bar to draw, and rich would stop the run at the first character it cannot write.
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return sys.stdout.isatty() and is_utf8 and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
