"""What the sources of a mixture do, each on its own: how often it was gone through, and its losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from llmtrain.config import DataSection
from llmtrain.data.batches import Order
from llmtrain.data.mixture import MixedOrder
from llmtrain.observe.record import Record, SourceRecord
from llmtrain.observe.validation import Validation


class SourceLog:
    """Adds to each record what concerns single sources, and notices those that begin anew."""

    def __init__(self, section: DataSection, order: Order, position: int):
        """`position`: where the run is; a source that had begun anew before is no news."""
        self._order, self._seq_len = order, section.seq_len
        self.names: Sequence[str] = section.names if isinstance(order, MixedOrder) else ()  # where there are several
        self._before = self._now = order.epochs(position) if isinstance(order, MixedOrder) else []

    def add(self, record: Record, position: int, train: Mapping[str, float], val: Validation | None) -> Record:
        """Return the record of a run that has come to `position`, with its sources; of a single one, as it is.

        Args:
            record: since the last one.
            position: in the data.
            train: the training loss of each source that was trained on since then.
            val: where it was evaluated.
        """
        if not isinstance(self._order, MixedOrder):
            return record
        self._now = self._order.epochs(position)
        sources = {}
        consumed = self._order.consumed(position)
        for name, epochs, samples in zip(self.names, self._now, consumed, strict=True):
            own = val.by_source.get(name) if val else None
            sources[name] = SourceRecord(
                epochs=epochs,
                tokens=samples * self._seq_len,
                train_loss=train.get(name),
                val_loss=own.loss if own else None,
                val_accuracy=own.accuracy if own else None,
            )
        return replace(record, sources=sources)

    def news(self) -> Iterator[str]:
        """Say which sources have begun anew since this was last asked."""
        for name, before, now in zip(self.names, self._before, self._now, strict=True):
            times = math.ceil(now)
            if times > max(1, math.ceil(before)):
                yield f"source {name}: all of it was seen, and it comes in a new order for the {_ordinal(times)} time"
        self._before = self._now


def _ordinal(number: int) -> str:
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"
