"""How far a run is: everything besides tensors that a resumed run needs to go on exactly."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Small, JSON-ready, written to `state.json` of every checkpoint."""

    step: int = 0  # optimizer steps done
    position: int = 0  # samples consumed since the start of the run, over all epochs and ranks
    tokens: int = 0  # target tokens consumed, those of skipped steps too
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    judged_by: list[Any] | None = None  # what makes one validation loss comparable with another
    launches: int = 0  # how often the run was started or resumed
    started_from: str | None = None  # what `--resume PATH` named, where the run branched off or was rewound
    stages: list[Any] = field(default_factory=list)  # of a mixture: [position from which they hold, weights]
    packing: str | None = None  # digest of what packed windows are made of; empty: they are not packed
    meter: dict[str, Any] = field(default_factory=dict)  # sums since the last record
    unfinished: dict[str, Any] | None = None  # what follows the last step was cut short; what that needs
    observer: dict[str, Any] = field(default_factory=dict)  # what the warnings remember
    guard: dict[str, Any] = field(default_factory=dict)  # what the divergence policy remembers
    save_s: float = 0.0  # that the save before took
    before_best: tuple[float | None, int | None] = (None, None)  # best loss and step until then; not written
    lost_best: tuple[float | None, int | None] = (None, None)  # a best that could not be saved; not written

    def advance(self, position: int, targets: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.position = position
        self.tokens += targets

    def judge_by(self, measure: list[Any]) -> bool:
        """From now on validation is by `measure`; return whether it was by another, so that no best one is known."""
        is_other = self.judged_by not in (None, measure)
        if is_other:
            self.best_val_loss, self.best_step, self.evaluations_since_best = None, None, 0
        self.judged_by = measure
        return is_other

    def validated(self, loss: float) -> bool:
        """Take an evaluation in; return whether it is the best so far."""
        better = math.isfinite(loss) and (self.best_val_loss is None or loss < self.best_val_loss)
        self.evaluations_since_best = 0 if better else self.evaluations_since_best + 1
        if better:
            self.before_best = self.best_val_loss, self.best_step
            self.best_val_loss, self.best_step = loss, self.step
        return better

    def not_saved(self, step: int) -> None:
        """No checkpoint came of this step; was it the best, that is again the one before, which is on the disk."""
        if step == self.best_step:
            self.lost_best = self.best_val_loss, self.best_step
            self.best_val_loss, self.best_step = self.before_best

    def regain_best(self) -> bool:
        """Whether this step, which is to be saved once more, is a best that could not be saved; now it is the best."""
        if self.step != self.lost_best[1]:
            return False
        self.best_val_loss, self.best_step = self.lost_best
        return True

    def to_dict(self) -> dict[str, Any]:
        """For `state.json`."""
        content = asdict(self)
        del content["before_best"], content["lost_best"]
        return content
