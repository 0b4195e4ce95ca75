"""One full record of a logging step: what every file, sink and screen of a run shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Self

Number = float | int | None


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """What is known of one source of a mixture."""

    epochs: Annotated[float, "how often it was gone through, from 0"]
    tokens: Annotated[int, "target tokens from it, those of skipped steps and left-out stretches too"]
    train_loss: Annotated[float | None, "nats per target token, the mean since the last record; null: none"] = None
    val_loss: Annotated[float | None, "on its validation split, nats per target token; null where not evaluated"] = None
    val_accuracy: Annotated[float | None, "share of its target tokens predicted right"] = None

    def row(self) -> dict[str, Number]:
        """Every field by name, holding only what strict JSON can hold."""
        return {field.name: finite(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Read what `row` gave, here or in another version."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})


@dataclass(frozen=True, slots=True)
class SetRecord:
    """How the model did on one set of `data.validation`."""

    loss: Annotated[float, "nats per target token"]
    accuracy: Annotated[float, "share of target tokens predicted right"]

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known after optimizer step `step`, on all ranks together; docs/reference.md lists it with these words."""

    step: Annotated[int, "optimizer step, from 1"]
    epoch: Annotated[int, "from 0"]
    train_loss: Annotated[float, "nats per target token, the mean over all of them since the last record"]
    val_loss: Annotated[float | None, "nats per target token; null where not evaluated"]
    val_accuracy: Annotated[float | None, "share of target tokens predicted right; null where not evaluated"]
    learning_rate: Annotated[float, "what the update of this step used"]
    grad_norm: Annotated[float, "global, of this step, before clipping"]
    param_norm: Annotated[float, "global, after the update"]
    tokens: Annotated[int, "target tokens trained on so far"]
    tokens_per_sec: Annotated[float, "since the last record, over all ranks; evaluation, samples and saving left out"]
    step_time_s: Annotated[float, "seconds, a mean since the last record"]
    mfu: Annotated[float | None, "share of the peak FLOP/s, 0 to 1; null where the peak is unknown"]
    memory_gb: Annotated[float, "peak of one device, in 10^9 bytes; without a GPU, of the first process"]
    time: Annotated[float, "Unix seconds"]
    mfu_palm: Annotated[float | None, "the same as PaLM counts it: as if a token attended to all of the window"] = None
    skipped: Annotated[int, "steps since the last record that were not applied; train_loss is without them"] = 0
    step_time_spread_s: Annotated[
        float | None, "seconds by which the slowest rank is later than the median one, a mean; null: alone"
    ] = None
    slowest_rank: Annotated[int | None, "which that is; null: alone"] = None
    data_time_s: Annotated[
        float | None, "seconds of step_time_s spent waiting for data, on the first rank; null: not measured"
    ] = None
    sources: Annotated[Mapping[str, SourceRecord] | None, "of a mixture, by name; null: there is but one"] = None
    validation: Annotated[Mapping[str, SetRecord] | None, "of data.validation, by name; null where not evaluated"] = (
        None
    )

    @property
    def perplexity(self) -> float:
        """exp(train_loss); null where a float cannot hold it."""
        return perplexity(self.train_loss)

    def row(self) -> dict[str, Number]:
        """Every field but the sources, and the perplexity, in the order of `COLUMNS`, as strict JSON can hold them."""
        return {name: finite(getattr(self, name)) for name in COLUMNS}

    def to_json(self) -> str:
        """The record as one line of strict JSON."""
        row: dict[str, Any] = dict(self.row())
        if self.sources:
            row["sources"] = {name: source.row() for name, source in self.sources.items()}
        if self.validation:
            row["validation"] = {
                name: {"loss": finite(one.loss), "accuracy": one.accuracy} for name, one in self.validation.items()
            }
        return json.dumps(row, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read what `to_json` wrote; a number that was not finite comes back as NaN.

        Raises:
            ValueError: the line is not a JSON object with a whole step, epoch and tokens.
        """
        values: Any = json.loads(line)
        if not isinstance(values, dict) or not all(isinstance(values.get(name), int) for name in _COUNTS):
            raise ValueError(f"not a record: {line!r}")
        sources = values.get("sources")
        if sources is not None:
            sources = {name: SourceRecord.from_row(row) for name, row in sources.items()}
        validation = values.get("validation")
        if validation is not None:
            validation = {
                name: SetRecord(math.nan if one["loss"] is None else one["loss"], one["accuracy"])
                for name, one in validation.items()
            }
        numbers = {name: _or_nan(name, values.get(name)) for name in _FIELDS}
        return cls(**numbers, sources=sources, validation=validation)


_FIELDS = tuple(field.name for field in fields(Record) if field.name not in ("sources", "validation"))
_COUNTS = ("step", "epoch", "tokens")
_OPTIONAL = ("val_loss", "val_accuracy", "mfu", "mfu_palm", "step_time_spread_s", "slowest_rank", "data_time_s")
COLUMNS = (*_FIELDS[: _FIELDS.index("tokens")], "perplexity", *_FIELDS[_FIELDS.index("tokens") :])


def _or_nan(name: str, value: Any) -> Any:
    if name == "skipped":
        return value or 0  # runs before there was a policy have none
    return math.nan if value is None and name not in _OPTIONAL else value


def finite(value: Number) -> Number:
    """The one place where a number that strict JSON cannot hold (NaN, ±inf) becomes null."""
    return value if value is None or math.isfinite(value) else None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
