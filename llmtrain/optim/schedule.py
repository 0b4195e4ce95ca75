"""The learning rate as a pure function of the optimizer step, defined for every step ≥ 0, also past the end.

The update that completes step s uses lr(s). Every schedule begins with a linear warmup from `start_lr` at step 0 to the
peak (`optimizer.lr`) at `warmup_steps`. Progress p below runs from 0 at the end of the warmup to 1 at the last step.

constant        peak
linear          peak → min_lr along a line
cosine          peak → min_lr along half a cosine (Loshchilov and Hutter 2017)
three_phase     peak until `decay_start` of all steps, then half a cosine to min_lr (warmup, stable, decay)
step            × `gamma` each `step_size` steps after the warmup, never below min_lr
warm_restarts   half cosines peak → min_lr in turn, the first `cycle_steps` long, each `cycle_mult` × the last
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llmtrain.config import ScheduleSection

Schedule = Callable[[int], float]


def make_schedule(config: ScheduleSection, peak: float, total_steps: int) -> Schedule:
    """Return lr(step) for a run of `total_steps` optimizer steps."""
    warmup, low = config.warmup_steps, config.min_lr

    def linear(step: int) -> float:
        return _between(peak, low, _progress(step, warmup, total_steps))

    def cosine(step: int) -> float:
        return _half_cosine(peak, low, _progress(step, warmup, total_steps))

    def three_phase(step: int) -> float:
        decay_start = max(warmup, config.decay_start * total_steps)
        return _half_cosine(peak, low, _progress(step, decay_start, total_steps))

    def drops(step: int) -> float:
        return max(min(low, peak), peak * config.gamma ** ((step - warmup) // config.step_size))

    def warm_restarts(step: int) -> float:
        return _half_cosine(peak, low, _cycle_progress(step - warmup, config.cycle_steps, config.cycle_mult))

    after_warmup: dict[str, Schedule] = {
        "constant": lambda step: peak,
        "linear": linear,
        "cosine": cosine,
        "three_phase": three_phase,
        "step": drops,
        "warm_restarts": warm_restarts,
    }
    decayed = after_warmup[config.name]
    return lambda step: _between(config.start_lr, peak, step / warmup) if step < warmup else decayed(step)


def _progress(step: float, begin: float, end: float) -> float:
    """How far `step` is from `begin` to `end`, in [0, 1]; 1 where there is no way between them."""
    return 1.0 if step >= end else max(0.0, (step - begin) / (end - begin))


def _between(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def _cycle_progress(step: int, cycle: float, mult: float) -> float:
    """Progress in [0, 1) within the cycle that `step` lies in, in closed form: cycle n begins at a geometric sum."""
    if mult == 1:
        return (step % cycle) / cycle
    number = math.floor(math.log1p(step * (mult - 1) / cycle) / math.log(mult) + 1e-12)
    begin = cycle * (mult**number - 1) / (mult - 1)
    return min(1.0, max(0.0, (step - begin) / (cycle * mult**number)))
