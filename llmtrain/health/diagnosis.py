"""What the curves of a run say, in words with what to do. Arrays in, remarks out; each rule states its thresholds.

A rule speaks only where the curve is clearly beyond its noise, for a healthy run must be told nothing. `ends` of a
curve are medians (of the last tenth of its records), its `trend` a running median over a twentieth of them, its
`noise` what neighbours differ by (`series.noise_of`). The gain is from the first record to the lowest point of the
trend. Losses are nats per target token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmtrain.observe.series import Floats, noise_of, running_median

FEW = 12  # records under which a curve says nothing yet
_NONE = np.empty(0)


@dataclass(frozen=True)
class Remark:
    """One thing that is not as it should be."""

    name: str
    level: Literal["problem", "hint"]  # hint: works, but could be better
    detail: str
    advice: str


@dataclass(frozen=True)
class Curves:
    """What the rules look at; all float64, equally long, one entry for each record, NaN where there is no value."""

    step: Floats
    train_loss: Floats
    learning_rate: Floats
    val_step: Floats = field(default_factory=lambda: _NONE)  # these two: as many as evaluations
    val_loss: Floats = field(default_factory=lambda: _NONE)
    warmup_steps: int = 0
    is_over: bool = False  # the run has done all its steps
    chance: float | None = None  # loss of a model that knows nothing, ln(vocabulary)
    epochs: float = 1.0  # how often the data was gone through
    skipped: int = 0  # steps that were not applied
    not_finite: int = 0  # of these, for a loss or norm that is not finite
    rollbacks: int = 0
    ended: str = "done"  # how the last launch did


@dataclass(frozen=True)
class _Shape:
    """The training curve in a few numbers."""

    steps: Floats  # of records with a finite loss
    losses: Floats
    trend: Floats
    start: float
    end: float
    low: float
    low_step: float
    noise: float

    @property
    def gain(self) -> float:
        return max(0.0, self.start - self.low)

    def lost(self) -> float:
        """How much of what was gained, in nats, the end has lost again."""
        return self.end - self.low

    def has_diverged(self) -> bool:
        return self.lost() > max(0.2 * self.gain, 4 * self.noise / math.sqrt(len(self.losses) / 10), 0.05)


def _shape(curves: Curves) -> _Shape | None:
    known = np.isfinite(curves.train_loss)
    steps, losses = curves.step[known], curves.train_loss[known]
    if len(losses) < FEW:
        return None
    trend = running_median(losses, len(losses) // 20 | 1)
    lowest = int(trend.argmin())
    end = float(np.median(losses[-max(3, len(losses) // 10) :]))
    return _Shape(
        steps, losses, trend, float(losses[0]), end, min(end, float(trend[lowest])), float(steps[lowest]),
        noise_of(losses),
    )  # fmt: skip


def diagnose(curves: Curves) -> list[Remark]:
    """All that is to be said of the losses; nothing where they are as they should be."""
    shape = _shape(curves)
    remarks = [remark for rule in WITHOUT_SHAPE.values() for remark in rule(curves)]
    if shape is None:
        return remarks
    return remarks + [remark for rule in RULES.values() for remark in rule(curves, shape)]


def _not_finite(curves: Curves) -> Iterator[Remark]:
    """A record without a finite loss, or a step that was not applied because its loss or norm is not finite."""
    missing = ~np.isfinite(curves.train_loss)
    if curves.not_finite or missing.any():
        first = f", first by step {curves.step[missing][0]:,.0f}" if missing.any() else ""
        yield Remark(
            "NaN",
            "problem",
            f"{missing.sum():,} of {len(missing):,} records have no finite loss{first}; "
            f"{curves.not_finite:,} steps were not applied for a loss or gradient norm that is not finite",
            "lower optimizer.lr or lengthen schedule.warmup_steps; if it comes with certain samples (skipped.jsonl has "
            "their ids), look at them; training.fp8: false or precision: fp32 shows whether it is the number format",
        )


def _spikes(curves: Curves) -> Iterator[Remark]:
    """Steps were not applied because they spiked; a problem where the run went back, or from 1 % of the steps on."""
    spikes = curves.skipped - curves.not_finite
    if spikes > 0 or curves.rollbacks:
        last = float(curves.step[-1]) if len(curves.step) else 1.0
        back = f", and the run went back {curves.rollbacks} times" if curves.rollbacks else ""
        is_much = bool(curves.rollbacks) or spikes > 0.01 * last
        yield Remark(
            "skipped steps",
            "problem" if is_much else "hint",
            f"{spikes:,} steps were not applied, for their loss or gradient norm spiked{back}",
            "a few are bad luck with single batches; if they are many, lower optimizer.lr, or look at the samples that "
            "skipped.jsonl names",
        )


def _diverging(curves: Curves, shape: _Shape) -> Iterator[Remark]:
    """The end lies above the lowest point by a fifth of the gain, 4 of its errors and 0.05 nats; or the run gave up."""
    if not shape.has_diverged():
        if curves.ended == "diverged":
            yield Remark(
                "diverging",
                "problem",
                "the run ended with exit code 3: steps had to be skipped again and again",
                "lower optimizer.lr to a third, or raise schedule.warmup_steps; then raise health.max_rollbacks to go "
                "on, or begin anew",
            )
        return
    yield Remark(
        "diverging",
        "problem",
        f"the training loss is {shape.end:.3f} at the end, {shape.lost():.2f} nats above the {shape.low:.3f} that it "
        f"had at step {shape.low_step:,.0f}",
        "lower optimizer.lr to a third (llmtrain doctor --find-lr tries rates), or raise schedule.warmup_steps; go on "
        f"from a checkpoint before step {shape.low_step:,.0f} with --resume PATH",
    )


def _not_decreasing(curves: Curves, shape: _Shape) -> Iterator[Remark]:
    """The lowest point lies less than 5 % below the start, 50 steps after the warm-up; not of a model that began good.

    One that began at two thirds of the loss of chance or less had learned before.
    """
    is_early = shape.steps[-1] < curves.warmup_steps + 50
    if is_early or shape.has_diverged() or shape.gain >= max(0.05 * shape.start, 2 * shape.noise):
        return
    if curves.chance and shape.start < curves.chance * 2 / 3:
        return
    rate = float(np.nanmax(curves.learning_rate))
    yield Remark(
        "not decreasing",
        "problem",
        f"the training loss went from {shape.start:.3f} to {shape.end:.3f} in {shape.steps[-1]:,.0f} steps, at a "
        f"learning rate of up to {rate:.1e}",
        "raise optimizer.lr (llmtrain doctor --find-lr tries rising rates and suggests one); if no rate helps, "
        "llmtrain doctor --overfit says whether the model can learn one batch, llmtrain report DATA whether the text "
        "is text",
    )


def _oscillating(curves: Curves, shape: _Shape) -> Iterator[Remark]:
    """In the second half the loss swings by 12 % of the gain around its trend, and falls by less than half of that."""
    half = len(shape.losses) // 2
    rest = shape.losses[half:] - shape.trend[half:]
    low, high = np.percentile(rest, [5, 95])
    swing = float(high - low)
    gained = float(np.median(shape.losses[half : half + half // 4 + 1])) - shape.end
    if shape.has_diverged() or shape.gain < 0.05 * shape.start or swing < 0.12 * shape.gain or gained > swing / 2:
        return
    yield Remark(
        "oscillating",
        "problem",
        f"in the second half the training loss swings by {swing:.2f} nats, and falls by {max(0.0, gained):.2f}",
        "lower optimizer.lr to a third, or raise training.global_batch_size; optimizer.clip_norm: 1.0 limits single "
        "steps",
    )


def _warmup(curves: Curves, shape: _Shape) -> Iterator[Remark]:
    """In the first fifth the loss jumps up by 15 % of the gain and 6 × the noise, and comes down again later."""
    early = shape.steps <= max(shape.steps[-1] / 5, 3 * curves.warmup_steps)
    if shape.has_diverged() or early.sum() < 3 or early.all():
        return
    losses = shape.losses[early]
    rises = losses[1:] - np.minimum.accumulate(losses)[:-1]
    worst = int(rises.argmax())
    if rises[worst] < max(0.15 * shape.gain, 6 * shape.noise) or shape.end > losses[worst]:
        return
    yield Remark(
        "warm-up too short",
        "hint",
        f"by step {shape.steps[worst + 1]:,.0f} the training loss had jumped up by {rises[worst]:.2f} nats, with "
        f"{curves.warmup_steps:,} steps of warm-up",
        f"raise schedule.warmup_steps to {max(20, 4 * curves.warmup_steps):,}, or lower optimizer.lr",
    )


def _plateau(curves: Curves, shape: _Shape) -> Iterator[Remark]:
    """Over the last third of the records with at least half the peak rate it surely gains less than 3 % of the gain.

    Surely: by the slope of a line through them, and two standard errors of it.
    """
    rates = curves.learning_rate[np.isfinite(curves.train_loss)]
    high = np.flatnonzero(rates >= 0.5 * np.nanmax(rates))
    high = high[shape.steps[high] > curves.warmup_steps]
    if len(high) < 3 * FEW or shape.has_diverged() or shape.gain < 0.05 * shape.start:
        return
    last = high[-(len(high) // 3) :]
    steps, losses = shape.steps[last], shape.losses[last]
    slope, error = _slope(steps, losses)
    span = float(steps[-1] - steps[0])
    if (2 * error - slope) * span > 0.03 * shape.gain:
        return
    yield Remark(
        "plateau",
        "hint",
        f"from step {steps[0]:,.0f} to {steps[-1]:,.0f} the training loss stayed at {float(np.median(losses)):.3f}, "
        "with the learning rate still high",
        "let the rate fall (schedule.name: cosine or three_phase, min_lr a tenth of lr or less); if it has, this is "
        "what this model can learn here: a larger model.preset, or more data",
    )


def _slope(steps: Floats, losses: Floats) -> tuple[float, float]:
    """Of the line through them, by least squares, with its standard error; nats per step."""
    x = steps - steps.mean()
    slope = float((x * losses).sum() / (x * x).sum())
    rest = losses - losses.mean() - slope * x
    return slope, math.sqrt(float((rest * rest).sum()) / max(1, len(x) - 2) / float((x * x).sum()))


def _overfitting(curves: Curves, shape: _Shape) -> Iterator[Remark]:
    """Validation ends 2 %, 0.02 nats and 4 × its noise above its lowest, and training fell by 0.02 nats meanwhile.

    Or, at the end, it lies half a nat above the training loss.
    """
    if len(curves.val_loss) < 3 or shape.has_diverged():
        return
    best = int(curves.val_loss.argmin())
    lowest, last = float(curves.val_loss[best]), float(np.median(curves.val_loss[-3:]))
    at_best = float(np.interp(curves.val_step[best], shape.steps, shape.trend))
    rise, gap = last - lowest, last - shape.end
    times = f" after {curves.epochs:.1f} times through the data" if curves.epochs >= 2 else ""
    advice = (
        "use the best checkpoint (generate, evaluate and export do); training.early_stopping_patience stops there; "
        "train on more text for fewer epochs, or raise model.dropout or optimizer.weight_decay, or take a smaller model"
    )
    if rise > max(0.02 * lowest, 0.02, 4 * noise_of(curves.val_loss)) and at_best - shape.end > 0.02:
        yield Remark(
            "overfitting",
            "problem",
            f"the validation loss rose from {lowest:.3f} at step {curves.val_step[best]:,.0f} to {last:.3f}, while the "
            f"training loss fell to {shape.end:.3f}{times}",
            advice,
        )
    elif gap > 0.5:
        yield Remark(
            "overfitting",
            "hint",
            f"the validation loss {last:.3f} is {gap:.2f} nats above the training loss {shape.end:.3f}{times}",
            advice,
        )


def _underfitting(curves: Curves, shape: _Shape) -> Iterator[Remark]:
    """The run is over, yet its last fifth brought 15 % of the gain, and validation is no 3 % above training."""
    if not curves.is_over or shape.has_diverged() or shape.gain < 0.05 * shape.start:
        return
    tail = shape.steps >= 0.8 * shape.steps[-1]
    if tail.sum() < 4:
        return
    slope, error = _slope(shape.steps[tail], shape.losses[tail])
    fell = -slope * float(shape.steps[-1] - shape.steps[tail][0])
    if fell < max(0.15 * shape.gain, 3 * error * float(shape.steps[-1] - shape.steps[tail][0])):
        return
    if len(curves.val_loss) and float(curves.val_loss[-1]) > 1.03 * shape.end:
        return
    yield Remark(
        "underfitting",
        "hint",
        f"the run is over, but the training loss still fell by {fell:.2f} nats in its last fifth",
        "train longer (training.max_steps, epochs or max_tokens), or raise optimizer.lr; more steps help more than a "
        "larger model here",
    )


RULES: dict[str, Callable[[Curves, _Shape], Iterable[Remark]]] = {
    "diverging": _diverging,
    "not decreasing": _not_decreasing,
    "oscillating": _oscillating,
    "warm-up too short": _warmup,
    "plateau": _plateau,
    "overfitting": _overfitting,
    "underfitting": _underfitting,
}
WITHOUT_SHAPE: dict[str, Callable[[Curves], Iterable[Remark]]] = {"NaN": _not_finite, "skipped steps": _spikes}
