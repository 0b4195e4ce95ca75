"""When is a step not to be applied, when is the run to go back, and when is it to give up? Numbers in, verdicts out.

A step is refused where its loss or gradient norm is not finite, or spikes: lies `spike_z` robust standard deviations
above the median of the steps applied last (Iglewicz and Hoaglin 1993: 1.4826 × the median absolute deviation). Only
upwards, for a fall is what training is for; of the norm's logarithm, for norms vary by factors.

`max_skips` refused steps among `spike_window` are no longer bad luck with single batches: the run goes back to before
the first of them and leaves the data from the first to the last of them out (as PaLM did, Chowdhery et al. 2022,
section 5.1). After `max_rollbacks` of these it gives up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmtrain.config import HealthSection
from llmtrain.engine import Limits
from llmtrain.health.robust import RobustWindow

# Added to the deviations, so that a run as even as a clock does not take a breath for a spike: at the default z of 10 a
# loss is let pass up to half a nat above the median, and a norm up to ten times the median.
_LOSS_FLOOR = 0.05  # nats
_NORM_FLOOR = math.log(10) / 10  # of the logarithm
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


class Seen(NamedTuple):
    """One step, as all ranks saw it."""

    step: int
    begin: int  # positions in the data: from here
    end: int  # to before here
    lr: float
    limits: Limits
    loss: float  # nats per target
    grad_norm: float
    is_refused: bool


@dataclass(frozen=True, slots=True)
class Stretch:
    """What to go back before, and the data to leave out."""

    step: int  # the first refused one
    begin: int
    end: int


class DivergencePolicy:
    """Sees every step in order; remembers a window of them."""

    def __init__(self, config: HealthSection):
        self._config = config
        self._losses = RobustWindow(config.spike_window)  # of applied steps
        self._log_norms = RobustWindow(config.spike_window)
        self._skips: list[tuple[int, int, int]] = []  # step, begin, end of those within the last `spike_window` steps
        self.rollbacks = 0
        self.left_out: list[tuple[int, int]] = []  # positions from, to before

    def limits(self, share: float = 1.0) -> Limits:
        """What the next step is measured against; before the window is full only what is not finite is refused.

        Args:
            share: of a full batch's targets that this one has. The mean of fewer varies more, by the root.
        """
        z = self._config.spike_z
        if z is None or not self._losses.is_full:
            return Limits()
        wide = z / math.sqrt(share)
        log_norm = _above(self._log_norms, wide, _NORM_FLOOR)
        norm = math.exp(log_norm) if log_norm < 80 else math.inf
        return Limits(loss=_above(self._losses, wide, _LOSS_FLOOR), grad_norm=norm)

    def observe(self, seen: Seen) -> str | None:
        """Take in a step that is over; say why it was refused, if it was."""
        if self._skips:
            self._skips = [skip for skip in self._skips if skip[0] > seen.step - self._config.spike_window]
        if not seen.is_refused:
            self._losses.add(seen.loss)
            self._log_norms.add(math.log(max(seen.grad_norm, 1e-30)))
            return None
        self._skips.append((seen.step, seen.begin, seen.end))
        return self._reason(seen)

    def stretch(self) -> Stretch | None:
        """Where too many steps were refused: from the first to the last of them."""
        if len(self._skips) < self._config.max_skips:
            return None
        first, last = self._skips[0], self._skips[-1]
        return Stretch(first[0], first[1], last[2])

    def leave_out(self, begin: int, end: int, rollbacks: int) -> None:
        """The run went back, for the `rollbacks`-th time, to leave this data out."""
        self.left_out = sorted({*self.left_out, (begin, end)})
        self.rollbacks = rollbacks

    def state(self) -> dict[str, Any]:
        """All that is remembered, JSON-ready."""
        return {
            "losses": list(self._losses.newest),
            "log_norms": list(self._log_norms.newest),
            "skips": [list(skip) for skip in self._skips],
            "rollbacks": self.rollbacks,
            "left_out": [list(positions) for positions in self.left_out],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`; an empty one is the beginning. A smaller window keeps the newest."""
        window = self._config.spike_window
        self._losses = RobustWindow(window, state.get("losses", ()))
        self._log_norms = RobustWindow(window, state.get("log_norms", ()))
        self._skips = [(step, begin, end) for step, begin, end in state.get("skips", ())]
        self.rollbacks = int(state.get("rollbacks", 0))
        self.left_out = [(begin, end) for begin, end in state.get("left_out", ())]

    def _reason(self, seen: Seen) -> str:
        found = []
        for name, value, limit, typical in (
            ("loss", seen.loss, seen.limits.loss, self._losses.median),
            ("gradient norm", seen.grad_norm, seen.limits.grad_norm, lambda: math.exp(self._log_norms.median())),
        ):
            if not math.isfinite(value):
                found.append(f"{name} {value}")
            elif not value < limit:  # which is finite, so the window is full
                found.append(f"{name} {value:.4g}, limit {limit:.4g}, usually {typical():.4g}")
        return "; ".join(found) or "at the limit"  # a float32 compared on a device, in a last bit


def _above(window: RobustWindow, z: float, floor: float) -> float:
    median, deviation = window.spread()
    return median + z * (_MAD_TO_SIGMA * deviation + floor)
