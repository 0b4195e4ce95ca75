"""What the speed of a run says, in words with what to do. Arrays in, remarks out; each rule states its thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from llmtrain.health.diagnosis import FEW, Remark
from llmtrain.observe.series import Floats

_WARM = 2  # of the first records, which compile and fill caches, are left out


@dataclass(frozen=True)
class PaceCurves:
    """One entry for each record, float64, NaN where unknown; and how the time of the run was spent, in seconds."""

    tokens_per_sec: Floats
    step_time_s: Floats
    data_time_s: Floats  # of step_time_s
    spread_s: Floats  # for which the slowest rank is later than the median one
    slowest_rank: Floats
    mfu: Floats  # 0 to 1
    training_s: float = 0.0
    other_s: float = 0.0  # start, evaluation, samples, saving


def diagnose_pace(pace: PaceCurves) -> Iterator[Remark]:
    """All that is to be said of the speed; nothing where it is as it should be."""
    if len(pace.tokens_per_sec) < FEW:
        return
    for rule in RULES.values():
        yield from rule(pace)


def _slower(pace: PaceCurves) -> Iterator[Remark]:
    """The last tenth runs at under 70 % of the run's median; or a tenth of all records at under half of it."""
    speeds = pace.tokens_per_sec[_WARM:]
    speeds = speeds[np.isfinite(speeds)]
    if not len(speeds):
        return
    usual = float(np.median(speeds))
    now = float(np.median(speeds[-max(3, len(speeds) // 10) :]))
    slow = float((speeds < 0.5 * usual).mean())
    advice = (
        "look for other programs on the machine, its temperature and clock, storage that stalls; training.profile "
        "shows where a step's time goes"
    )
    if now < 0.7 * usual:
        detail = f"it trains at {now:,.0f} tokens/s now, {100 * now / usual:.0f} % of its usual {usual:,.0f}"
        yield Remark("too slow", "hint", detail, advice)
    elif slow > 0.1:
        detail = f"{100 * slow:.0f} % of the records are at under half of the usual {usual:,.0f} tokens/s"
        yield Remark("too slow", "hint", detail, advice)


def _low_mfu(pace: PaceCurves) -> Iterator[Remark]:
    """The median MFU is under 20 %."""
    known = pace.mfu[np.isfinite(pace.mfu)][_WARM:]
    if len(known) < FEW or float(np.median(known)) >= 0.2:
        return
    yield Remark(
        "too slow",
        "hint",
        f"model FLOPs utilization is {100 * float(np.median(known)):.0f} % of the device's peak",
        "raise training.micro_batch_size as far as memory goes; training.compile: true and precision: bf16; "
        "activation_checkpointing: none where memory allows; a very small model cannot fill a GPU; training.profile "
        "shows where the time goes",
    )


def _data_bound(pace: PaceCurves) -> Iterator[Remark]:
    """A quarter of the steps' time is spent waiting for data."""
    known = np.isfinite(pace.data_time_s) & np.isfinite(pace.step_time_s)
    waited, steps = float(pace.data_time_s[known].sum()), float(pace.step_time_s[known].sum())
    if not steps or waited < 0.25 * steps:
        return
    yield Remark(
        "data-bound",
        "problem" if waited > 0.5 * steps else "hint",
        f"{100 * waited / steps:.0f} % of the time of a step is waiting for data",
        "put the prepared data on a local disk or into memory; for storage that stalls set data.workers to 2 or more",
    )


def _straggler(pace: PaceCurves) -> Iterator[Remark]:
    """In half of the records the same rank is the slowest, and the others wait for it over 10 % of the step."""
    late = pace.spread_s > 0.1 * pace.step_time_s
    if late.mean() < 0.5:
        return
    ranks, counts = np.unique(pace.slowest_rank[late], return_counts=True)
    if counts.max() < 0.5 * len(late):
        return
    share = float(np.median(pace.spread_s[late] / pace.step_time_s[late]))
    yield Remark(
        "straggler",
        "problem",
        f"rank {int(ranks[counts.argmax()])} is the slowest: the others wait for it {100 * share:.0f} % of a step",
        "look at its host: clock and temperature, other programs, storage",
    )


def _other_time(pace: PaceCurves) -> Iterator[Remark]:
    """Over 30 % of the time that it ran, and 10 minutes, went into other things than steps."""
    whole = pace.training_s + pace.other_s
    if pace.other_s < max(0.3 * whole, 600):
        return
    yield Remark(
        "too slow",
        "hint",
        f"{100 * pace.other_s / whole:.0f} % of the time it ran were no steps, but start, evaluation, samples, saving",
        "evaluate less often (training.eval_every) or on less (eval_batches); raise checkpoint.save_every; keep "
        "checkpoint.async_save on",
    )


RULES: dict[str, Callable[[PaceCurves], Iterable[Remark]]] = {
    "too slow: speed": _slower,
    "too slow: MFU": _low_mfu,
    "too slow: beside the steps": _other_time,
    "data-bound": _data_bound,
    "straggler": _straggler,
}
