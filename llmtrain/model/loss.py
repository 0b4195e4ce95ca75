"""Cross-entropy of next-token prediction, as a sum: the one place that divides is the engine."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 -- the name everyone reads

IGNORE_INDEX = -100  # target that counts for nothing, torch's default


def cross_entropy_sum(logits_BSV: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target) in nats over all targets that are not -100; computed in float32, 0 when there are none."""
    return F.cross_entropy(
        logits_BSV.float().flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
