"""Loss and accuracy over a validation split: the trainer and the `evaluate` verb call the same function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat

import torch

from llmtrain.data.batches import Layout, WindowSet, inputs_and_targets, validation_batches
from llmtrain.data.order import Int64s
from llmtrain.engine import Engine
from llmtrain.model.loss import IGNORE_INDEX
from llmtrain.observe.record import perplexity


@dataclass(frozen=True)
class Validation:
    """Token-weighted means over what was evaluated."""

    loss: float  # nats per token
    accuracy: float  # share of targets that were the most likely token
    tokens: int
    by_source: Mapping[str, Validation] = field(default_factory=dict)  # where there are several
    sets: Mapping[str, Validation] = field(default_factory=dict)  # those of data.validation, each on its own

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Bits to code one byte of text: independent of the tokenizer."""
        return self.loss / math.log(2) / bytes_per_token


def validate(
    engine: Engine,
    batches: Iterable[torch.Tensor],
    rows: int,
    vocab_size: int,
    counted: Iterable[Int64s] | None = None,
) -> Validation:
    """Evaluate the engine's model.

    Args:
        engine: prepared.
        batches: this rank's (n ≤ rows, seq_len + 1) token batches; every rank has equally many.
        rows: rows of a full batch, to which short ones are padded.
        vocab_size: of the tokenizer; ids that only pad the model's vocabulary are never its most likely ones.
        counted: for each batch (n,), how many targets at the end of each of its rows count; None: all do.
    """
    # Totals in float64, except on MPS, which has none.
    sums = torch.zeros(3, dtype=torch.float32 if engine.device.type == "mps" else torch.float64, device=engine.device)
    with engine.evaluating() as model:
        for tokens, last in zip(batches, repeat(None) if counted is None else counted, strict=False):
            inputs_BS, targets_BS = inputs_and_targets(tokens, rows, engine.device)
            if last is not None:
                targets_BS = _only_last(targets_BS, last)
            sums[:2] += model(inputs_BS, targets_BS, count_among=vocab_size)
            sums[2] += (targets_BS != IGNORE_INDEX).sum()
    loss_sum, correct_sum, count = engine.sum(sums).tolist()
    return Validation(loss_sum / count, correct_sum / count, int(count))


def _only_last(targets_BS: torch.Tensor, counts: Int64s) -> torch.Tensor:
    """The same with no more than so many targets at the end of each of the first rows, which are all that are real."""
    counts_B = torch.zeros(len(targets_BS), dtype=torch.int64)
    counts_B[: len(counts)] = torch.from_numpy(counts)
    index_S = torch.arange(targets_BS.shape[1])
    does_not_count_BS = index_S < targets_BS.shape[1] - counts_B[:, None]
    return targets_BS.masked_fill(does_not_count_BS.to(targets_BS.device), IGNORE_INDEX)


def validate_each(
    engine: Engine,
    sets: Mapping[str, WindowSet],
    layout: Layout,
    *,
    limit: int | None,
    ids: int,
    reading: Callable[[Iterator[torch.Tensor]], Iterator[torch.Tensor]] = iter,
) -> dict[str, Validation]:
    """The same for each of several sets of windows.

    Args:
        engine: prepared.
        sets: by name.
        layout: of batches.
        limit: so many global batches of each, spread evenly over it; None: all.
        ids: how many the tokenizer has.
        reading: goes through the micro-batches and may take note.
    """
    windows_limit = limit and limit * layout.global_batch
    found = {}
    for name, windows in sets.items():
        batches = reading(validation_batches(windows, layout, windows_limit))
        found[name] = validate(engine, batches, layout.micro_batch, ids)
    return found


def judged(found: Mapping[str, Validation], sets: Mapping[str, Validation], weights: Mapping[str, float]) -> Validation:
    """What a run is judged by: its sources together; where none of them could be evaluated, the first of the sets."""
    main = mixed(found, weights) if found else next(iter(sets.values()))
    return replace(main, sets=sets)


def mixed(found: Mapping[str, Validation], weights: Mapping[str, float]) -> Validation:
    """What the sources of a mixture come to together: the mean by their weights, of those that could be evaluated."""
    if len(weights) == 1:
        return next(iter(found.values()))
    return Validation(
        weighted_mean({name: one.loss for name, one in found.items()}, weights),
        weighted_mean({name: one.accuracy for name, one in found.items()}, weights),
        sum(one.tokens for one in found.values()),
        found,
    )


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Of the values that there are; one of weight 0 counts for nothing, whatever it is, finite or not.

    Where all of these have weight 0, they count alike.
    """
    shares = {name: weights[name] for name in values if weights.get(name)} or dict.fromkeys(values, 1.0)
    return sum(share * values[name] for name, share in shares.items()) / sum(shares.values())
