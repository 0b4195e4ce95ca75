"""Warnings as they happen, in words with what to do; each is given once until its cause has gone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from llmtrain.observe import formats
from llmtrain.observe.record import Record

_HIGH_NORMS = (10.0, 100.0, 1000.0)
_LOW_NORM = 1e-6
_GAP_NATS = 0.5
_SLOW_SHARE = 0.1  # of a step, for which the others wait
_SLOW_RECORDS = 10  # in a row with the same slowest rank: who is last now and then is no straggler
_RISES = 3  # evaluations in a row with a higher validation loss: one or two are noise
# A cause has gone when its number is this far back on the good side, so that one at the limit does not warn for ever.
_CLEARLY = 2.0
_CLEARLY_NATS = 0.1


class Watch:
    """Looks at each record in turn. Its state is tiny and depends on the records alone."""

    def __init__(self) -> None:
        self._high_level = 0  # how many of _HIGH_NORMS have been warned about
        self._is_low = False
        self._is_overfit = False
        self._is_rising = False
        self._train_sum, self._train_count = 0.0, 0  # records since the last evaluation
        self._evaluations: list[list[float]] = []  # [validation, training] losses of the last ones
        self._best_val: float | None = None
        self._best_step = 0
        self._slow_rank: int | None = None
        self._slow_records = 0

    def check(self, record: Record) -> list[str]:
        """Take in one record; return the warnings it gives rise to, mostly none."""
        found = [self._high_norm(record.grad_norm), self._low_norm(record.grad_norm), self._straggler(record)]
        if math.isfinite(record.train_loss):
            self._train_sum += record.train_loss
            self._train_count += 1
        if record.val_loss is not None and math.isfinite(record.val_loss):
            found += [self._overfit(record.val_loss, record.train_loss), self._rising(record.step, record.val_loss)]
        return [f"step {formats.count(record.step)}: {text}" for text in found if text]

    def state(self) -> dict[str, Any]:
        """All that `check` remembers, as plain JSON values."""
        return {name.removeprefix("_"): value for name, value in vars(self).items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)

    def _high_norm(self, norm: float) -> str | None:
        size = norm if math.isfinite(norm) else math.inf
        level = sum(size > limit for limit in _HIGH_NORMS)
        if level <= self._high_level:
            self._high_level = sum(size > limit / _CLEARLY for limit in _HIGH_NORMS[: self._high_level])
            return None
        self._high_level = level
        what = f"{formats.norm(norm)} is over {_HIGH_NORMS[level - 1]:g}" if size < math.inf else "is not finite"
        return (
            f"gradient norm {what}: lower optimizer.lr or lengthen schedule.warmup_steps "
            "(optimizer.clip_norm limits the damage, not the cause)"
        )

    def _low_norm(self, norm: float) -> str | None:
        was_low, self._is_low = self._is_low, norm < _LOW_NORM * (_CLEARLY if self._is_low else 1)
        if was_low or not self._is_low:
            return None
        return (
            f"gradient norm {formats.norm(norm)} is under {_LOW_NORM:g}: almost nothing is learnt; "
            "look for a frozen or saturated part with llmtrain doctor, or stop if the loss is at its floor"
        )

    def _straggler(self, record: Record) -> str | None:
        spread_s, rank = record.step_time_spread_s, record.slowest_rank
        share = (spread_s or 0.0) / record.step_time_s if record.step_time_s > 0 else 0.0
        is_known = rank is not None and rank == self._slow_rank
        if not share > _SLOW_SHARE / (_CLEARLY if is_known and self._slow_records > _SLOW_RECORDS else 1):
            rank = None
        if rank is None or not is_known:
            self._slow_rank, self._slow_records = rank, 0
        self._slow_records = min(self._slow_records + (rank is not None), _SLOW_RECORDS + 1)
        if rank is None or spread_s is None or self._slow_records != _SLOW_RECORDS:
            return None
        return (
            f"rank {rank} has been the slowest for {_SLOW_RECORDS} records: every step waits at least {spread_s:.3g} s "
            f"of {record.step_time_s:.3g} s for it; look at its host (clock and temperature, other programs, storage)"
        )

    def _overfit(self, val_loss: float, train_loss: float) -> str | None:
        gap = val_loss - train_loss
        was_overfit, self._is_overfit = self._is_overfit, gap > _GAP_NATS - (_CLEARLY_NATS if self._is_overfit else 0)
        if was_overfit or not self._is_overfit:
            return None
        return (
            f"validation loss {formats.loss(val_loss)} is {gap:.2f} nats above training loss "
            f"{formats.loss(train_loss)} (overfitting): train on more text, or raise model.dropout or "
            "optimizer.weight_decay"
        )

    def _rising(self, step: int, val_loss: float) -> str | None:
        # The mean since the last evaluation: one record is too noisy to tell that training falls.
        if not self._train_count:
            return None
        train_loss = self._train_sum / self._train_count
        self._train_sum, self._train_count = 0.0, 0
        self._evaluations = [*self._evaluations, [val_loss, train_loss]][-_RISES - 1 :]
        if self._best_val is None or val_loss < self._best_val:
            self._best_val, self._best_step = val_loss, step
            self._is_rising = False
        vals, trains = zip(*self._evaluations, strict=True)
        rises = len(vals) > _RISES and all(later > earlier for earlier, later in pairwise(vals))
        if self._is_rising or not rises or trains[-1] >= trains[0]:
            return None
        self._is_rising = True
        return (
            f"validation loss has risen {_RISES} times in a row ({formats.loss(vals[0])} → {formats.loss(vals[-1])}) "
            f"while training loss falls: more steps make it worse; the best so far is "
            f"{formats.loss(self._best_val)} at step {formats.count(self._best_step)}, and "
            "training.early_stopping_patience would stop the run"
        )
