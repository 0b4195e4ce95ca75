"""Loss and accuracy over a validation split: the trainer and the `evaluate` verb call the same function."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from llmtrain.data.batches import inputs_and_targets
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

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Bits to code one byte of text: independent of the tokenizer."""
        return self.loss / math.log(2) / bytes_per_token


def validate(engine: Engine, batches: Iterable[torch.Tensor], rows: int, vocab_size: int) -> Validation:
    """Evaluate the engine's model.

    Args:
        engine: prepared.
        batches: this rank's (n ≤ rows, seq_len + 1) token batches; every rank has equally many.
        rows: rows of a full batch, to which short ones are padded.
        vocab_size: of the tokenizer; ids that only pad the model's vocabulary are never its most likely ones.
    """
    # Totals in float64, except on MPS, which has none.
    sums = torch.zeros(3, dtype=torch.float32 if engine.device.type == "mps" else torch.float64, device=engine.device)
    with engine.evaluating() as model:
        for tokens in batches:
            inputs_BS, targets_BS = inputs_and_targets(tokens, rows, engine.device)
            sums[:2] += model(inputs_BS, targets_BS, count_among=vocab_size)
            sums[2] += (targets_BS != IGNORE_INDEX).sum()
    loss_sum, correct_sum, count = engine.sum(sums).tolist()
    return Validation(loss_sum / count, correct_sum / count, int(count))


def mixed(found: Mapping[str, Validation], weights: Mapping[str, float]) -> Validation:
    """What the sources of a mixture come to together: the mean by their weights, of those that could be evaluated.

    Where all of these have weight 0, they count alike.
    """
    if len(weights) == 1:
        return next(iter(found.values()))
    # One of weight 0 counts for nothing, whatever its loss is, finite or not.
    shares = {name: weights[name] for name in found if weights[name]} or dict.fromkeys(found, 1.0)
    total = sum(shares.values())
    return Validation(
        sum(share * found[name].loss for name, share in shares.items()) / total,
        sum(share * found[name].accuracy for name, share in shares.items()) / total,
        sum(one.tokens for one in found.values()),
        found,
    )
