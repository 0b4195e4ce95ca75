"""All ranks stop at the same place, though the signal may reach only one of them.

A rank asks all others by an exchange of two bytes over the CPU. It is begun at one place of the loop (before the
update; between two micro-batches of an evaluation, or two tokens of a sample) and its answer is taken at the next
(before the next step, micro-batch or token), so nobody waits for a device and hardly for each other, and every rank
takes the same answers in the same order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from llmtrain.engine import Engine
from llmtrain.health.signals import StopSignals

Item = TypeVar("Item")


class StopAfterStep(Exception):  # noqa: N818 -- not an error; never leaves the run
    """Told to stop in what follows a step, an evaluation or a sample; raised on all ranks at the same place in it."""


class Stopping:
    """What all ranks have agreed on so far. All call `ask` and `hear` at the same places."""

    def __init__(self, engine: Engine, signals: StopSignals, grace_s: float | None):
        self._engine, self._signals, self._grace_s = engine, signals, grace_s
        self._is_asked = False
        self._heard_at = 0.0
        self.reason: str | None = None  # told to stop, by this signal
        self.has_save_failed = False  # on some rank; whoever deals with it sets it back

    def ask(self, save_failed: bool) -> None:
        """Begin to ask whether any rank was told to stop, or knows of a failed save."""
        self._engine.ask(self._signals.is_told(), save_failed)
        self._is_asked = True

    def hear(self, save_failed: bool) -> None:
        """Take the answer; where nothing was asked, ask now."""
        if not self._is_asked or self._engine.world_size == 1:  # one rank need not be content with an older answer
            self.ask(save_failed)
        self._is_asked = False
        is_told, has_failed = self._engine.hear()
        self.has_save_failed |= has_failed
        if is_told and self.reason is None:
            self.reason = self._signals.received or "a signal on another rank"
            self._heard_at = self._signals.received_at or time.monotonic()

    def until_told(self, items: Iterable[Item], has_save_failed: Callable[[], bool]) -> Iterator[Item]:
        """Go through items, of which all ranks have equally many.

        Raises:
            StopAfterStep: told to stop.
        """
        for item in items:
            self.hear(has_save_failed())
            if self.reason:
                raise StopAfterStep
            self.ask(has_save_failed())
            yield item

    @property
    def left_s(self) -> float:
        """Seconds of the grace that are left; infinite where nothing ends it.

        A signal to this rank counts before the others have heard of it.
        """
        told_at = self._signals.received_at if self.reason is None else self._heard_at
        if told_at is None or self._grace_s is None:
            return math.inf
        return max(self._grace_s - (time.monotonic() - told_at), 0.0)

    def too_short_for(self, save_s: float) -> str | None:
        """What to warn of, where a save that takes `save_s` will probably not fit into what is left of the grace."""
        left_s = self.left_s
        if save_s <= left_s:
            return None
        return (
            f"the last save took {save_s:.1f} s, and {left_s:.1f} s are left of health.grace_s="
            f"{self._grace_s:g}; what sent {self.reason} may end this process before it has saved"
        )
