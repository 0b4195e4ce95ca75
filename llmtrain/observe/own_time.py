"""How long each rank works in a step before it can wait for another: what tells a straggler from who waits for it.

All ranks take equally long for a step, since they wait for the slowest. So the time is taken from the begin of a step
to the end of its first forward pass; where that needs other ranks (ZeRO-3 gathers weights in it), to its begin. That
is the data and a part of the computation: the delay it shows is a lower bound.

On a GPU the device's clock is read, by events in its stream, for the host runs ahead; nothing waits for them before
the record does anyway.
"""

from __future__ import annotations

import time
from collections import deque
from statistics import median_low

import torch

from llmtrain.engine import Engine

_KEPT = 64  # steps: the newest since the last record


class OwnTime:
    """Own time of the steps since the last record; with one process there is nothing to compare, and none is taken."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._began: float | torch.cuda.Event | None = None
        self._spans: deque[tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_KEPT)
        if engine.world_size == 1:
            return
        with engine.evaluating() as model:
            if engine.exchanges_in_forward:
                model.register_forward_pre_hook(lambda *_: self._end(), prepend=True)
            else:
                model.register_forward_hook(lambda *_: self._end())

    def begin(self) -> None:
        """A step begins, and no exchange is pending."""
        if self._engine.world_size > 1:
            self._began = self._now()

    def _end(self) -> None:
        if self._began is not None:  # the first forward pass of the step
            self._spans.append((self._began, self._now()))  # type: ignore[arg-type]  # both are of one kind
            self._began = None

    def _now(self) -> float | torch.cuda.Event:
        if self._engine.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def compare(self) -> tuple[float | None, int | None]:
        """Mean seconds for which the slowest rank is later than the median rank, and which it is; then start anew.

        An exchange: all ranks call it, once the device has done everything that it was asked for.
        """
        if self._engine.world_size == 1:
            return None, None
        seconds = [_seconds(*span) for span in self._spans]
        self._spans.clear()
        own = torch.zeros(self._engine.world_size, dtype=torch.float64, device=self._engine.device)
        own[self._engine.rank] = sum(seconds) / max(1, len(seconds))
        means = self._engine.sum(own).tolist()
        slowest = max(means)
        return slowest - median_low(means), means.index(slowest)


def _seconds(began: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    return float(began.elapsed_time(ended)) / 1e3  # type: ignore[union-attr, arg-type]
