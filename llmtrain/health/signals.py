"""Told to stop: remember it, finish the step, save, leave with exit code 75."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """While entered, the first stop signal only sets `received`; a second SIGINT (Ctrl-C again) stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.received_at: float | None = None  # time.monotonic()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which is what nohup is for
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # Once told to stop, the process is about to leave with 75; a scheduler's next signal must not change that.
            signal.signal(number, signal.SIG_IGN if self.received else handler)

    def is_told(self) -> bool:
        """Whether this process has got a signal."""
        return self.received is not None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received_at = self.received_at or time.monotonic()
        self.received = signal.Signals(number).name
