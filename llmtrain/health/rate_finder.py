"""A learning rate for a config, found by trying: the rate rises with each step until the loss does.

The range test (Smith 2017, "Cyclical learning rates", section 3.3), on the run's own model, batches and optimizer. At
the rate where the smoothed loss turns, the model is about to lose what it has learned; a peak rate some way below it
trains fastest. How far below was measured, see docs/LOG.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.assemble import Assembly
from llmtrain.data.batches import Batch, batches, inputs_and_targets
from llmtrain.health.finding import Finding, fail, ok, warn
from llmtrain.observe.formats import rate

STEPS = 150
LOWEST, HIGHEST = 1e-5, 1.0
BELOW_TURN = 5.0  # the peak rate of a short run is about this factor below the one where the loss turns
_LONG_RUNS = 20.0  # and that of a long one not further below than this
_SMOOTHING = 0.9
_RISEN = 0.2  # of what was learned: so much lost again ends the test
_NOISE = 0.1  # nats: batches may differ by so much


@dataclass(frozen=True)
class RangeTest:
    """The rates that were tried, and the smoothed loss (nats per target) after each."""

    rates: list[float]
    losses: list[float]
    is_lost: bool = False  # the next step was not finite

    @property
    def turn(self) -> float:
        """The rate at which the loss was lowest."""
        return self.rates[self.losses.index(min(self.losses))]

    @property
    def rise(self) -> float:
        """How far the loss is above its lowest."""
        return self.losses[-1] - min(self.losses)

    @property
    def has_turned(self) -> bool:
        """Whether the loss rose again, so that the turn is one."""
        return self.is_lost or self.rise > _NOISE

    @property
    def is_over(self) -> bool:
        """Whether it rose so far that higher rates have nothing more to tell."""
        return self.rise > max(_RISEN * (self.losses[0] - min(self.losses)), _NOISE)


def range_test(parts: Assembly) -> RangeTest:
    """Step a fresh model through the rates, each on a batch of its own, until the loss rises for good."""
    rates: list[float] = []
    losses: list[float] = []
    smoothed = weight = 0.0
    stream = batches(parts.train, parts.layout, parts.order(), position=0)
    for step, batch in zip(range(STEPS), stream, strict=False):
        lr = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        loss, is_finite = _step(parts, batch, lr)
        if not is_finite:
            return RangeTest(rates, losses, is_lost=True)
        smoothed = _SMOOTHING * smoothed + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        rates.append(lr)
        losses.append(smoothed / weight)
        if RangeTest(rates, losses).is_over:
            break
    return RangeTest(rates, losses)


def _step(parts: Assembly, batch: Batch, lr: float) -> tuple[float, bool]:
    """Take one optimizer step; return the loss before it, over all ranks, and whether that and its norm are finite."""
    engine, total = parts.engine, 0.0
    for tokens, is_last in batch.micro_batches():
        inputs_BS, targets_BS = inputs_and_targets(tokens, parts.layout.micro_batch, engine.device, batch.padding)
        loss_sum = engine.forward_backward(inputs_BS, targets_BS, global_targets=batch.target_count, sync=is_last)
        total += engine.sum(loss_sum).item()
    norm = engine.step(lr).grad_norm.item()
    return total / batch.target_count, math.isfinite(total) and math.isfinite(norm)


def find_rate(parts: Assembly) -> Finding:
    """Suggest a peak learning rate for a fresh model, whatever `model.init_from` says, and look at the config's."""
    name, lr = "find lr", parts.config.optimizer.lr
    test = range_test(parts)
    if not test.losses or test.losses[0] - min(test.losses) < _NOISE:
        return fail(name, f"the loss does not fall at any rate from {rate(LOWEST)} on; look at the findings above")
    if not test.has_turned:
        return warn(name, f"the loss still falls at {rate(test.rates[-1])}, so no rate of the test is too high")
    suggested = float(f"{test.turn / BELOW_TURN:.1g}")
    detail = (
        f"the loss of a fresh model turns at {rate(test.turn)}; a run of a hundred steps learns fastest at about "
        f"optimizer.lr={rate(suggested)}, a long one at less; the config has {rate(lr)}"
    )
    if not suggested / _LONG_RUNS <= lr <= 2 * suggested:
        return warn(name, detail)
    return ok(name, detail)
