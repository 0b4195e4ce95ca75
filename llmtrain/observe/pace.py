"""How far the run is and when it will be done, as named pieces of one line."""

from __future__ import annotations

import math

from llmtrain.observe import formats
from llmtrain.observe.record import Record


class Pace:
    """Turns records into the pieces of the progress line; keeps what the estimate of the time left needs."""

    # Weight of the past in each new record: long enough to even out evaluations, short enough to forget compilation.
    _MEMORY = 0.95

    def __init__(self, total_steps: int, steps_per_epoch: int):
        self._total_steps = total_steps
        self._total_epochs = math.ceil(total_steps / steps_per_epoch)
        self._last: Record | None = None
        self._seconds = self._steps = 0.0

    def share(self, record: Record) -> float:
        """How much of the run is done, 0 to 1."""
        return min(1.0, record.step / self._total_steps)

    def take(self, record: Record) -> None:
        """Take in each record once."""
        # From record to record by the clock, so that evaluations and checkpoints count; only the first cannot do so.
        last, self._last = self._last, record
        steps = record.step - last.step if last else 1
        seconds = max(0.0, record.time - last.time) if last else record.step_time_s
        self._steps = self._MEMORY * self._steps + steps
        self._seconds = self._MEMORY * self._seconds + seconds

    def pieces(self) -> dict[str, str]:
        """The pieces of the line of the record taken in last, by name, in order. Epochs count from 1 here."""
        record = self._last
        assert record is not None, "a record is taken in first"
        pieces = {
            "epoch": f"epoch {record.epoch + 1}/{self._total_epochs}",
            "percent": formats.percent(self.share(record)),
            "step": f"step {formats.count(record.step)}/{formats.count(self._total_steps)}",
            "loss": f"loss {formats.loss(record.train_loss)}",
        }
        if record.val_loss is not None:
            pieces["val"] = f"val {formats.loss(record.val_loss)}"
        if record.validation:
            sets = record.validation.items()
            pieces["sets"] = " ".join(f"val/{name} {formats.loss(one.loss)}" for name, one in sets)
        losses = {name: of.train_loss for name, of in (record.sources or {}).items() if of.train_loss is not None}
        if losses:
            pieces["sources"] = " ".join(f"{name} {formats.loss(loss)}" for name, loss in losses.items())
        pieces["lr"] = f"lr {formats.rate(record.learning_rate)}"
        pieces["speed"] = f"{formats.compact(record.tokens_per_sec)} tok/s"
        if record.mfu is not None:
            pieces["mfu"] = f"mfu {formats.percent(record.mfu)}"
        pieces["memory"] = f"{record.memory_gb:.3g} GB"
        if record.step_time_spread_s is not None and record.slowest_rank is not None:
            pieces["slowest"] = f"rank {record.slowest_rank} slowest, by {record.step_time_spread_s:.2g} s"
        pieces["eta"] = f"eta {formats.duration(self._seconds_left(record))}"
        return pieces

    def _seconds_left(self, record: Record) -> float:
        return max(0, self._total_steps - record.step) * self._seconds / max(1.0, self._steps)
