"""The loss of one optimizer step on this rank: in all and, where a batch has samples of several sources, of each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmtrain.data.batches import Batch
from llmtrain.data.mixture import MixedOrder


class LossSums:
    """Sums that stay on the device; which sample is of which source the host knows from the order."""

    def __init__(self, batch: Batch, device: torch.device):
        self._total: Tensor | None = None
        self._losses: list[Tensor] = []  # of the rows of each micro-batch
        self._sources_MB: Tensor | None = None
        if isinstance(batch.order, MixedOrder):
            self._sources_MB = _to(device, _sources_of_rows(batch, batch.order))
            self._count, self._row_targets = batch.order.sources, batch.target_count // (batch.end - batch.begin)

    @property
    def total(self) -> Tensor:
        """Nats, over this rank's targets."""
        assert self._total is not None, "there is no batch without a micro-batch"
        return self._total

    @property
    def by_row(self) -> bool:
        """Whether `add` needs the loss of each row."""
        return self._sources_MB is not None

    def add(self, losses: Tensor) -> None:
        """Take in what `Engine.forward_backward` gave for the next micro-batch."""
        loss = losses
        if self._sources_MB is not None:
            loss = losses[0]
            self._losses.append(losses[1:])
        self._total = loss if self._total is None else self._total + loss

    def by_source(self) -> Tensor | None:
        """(2, sources): the loss summed over this rank's targets of each source, and how many they are; None: but one.

        float64 (float32 on MPS, which has no other), so that the counts stay exact over any number of steps.
        """
        if self._sources_MB is None:
            return None
        sources_S11 = torch.arange(self._count, device=self.total.device)[:, None, None]
        here_SMB = self._sources_MB == sources_S11
        # Chosen and not multiplied: a loss that is no number must not get into the sums of other sources.
        losses_SMB = torch.where(here_SMB, torch.stack(self._losses), 0.0)
        dtype = sum_dtype(self.total.device)
        return torch.stack([
            losses_SMB.sum((1, 2), dtype=dtype), here_SMB.sum((1, 2), dtype=dtype) * self._row_targets
        ])  # fmt: skip


def sum_dtype(device: torch.device) -> torch.dtype:
    """Of sums over very many numbers."""
    return torch.float32 if device.type == "mps" else torch.float64


def _sources_of_rows(batch: Batch, order: MixedOrder) -> Tensor:
    """(micro-steps, rows) int64: the source of each row of this rank's micro-batches, -1 of those that only pad."""
    positions = batch.layout.rank_positions(batch.begin)
    sources_MB = np.full((len(positions), batch.layout.micro_batch), -1, dtype=np.int64)
    rows_M1 = np.array([[len(these)] for these in positions])
    sources_MB[np.arange(batch.layout.micro_batch) < rows_M1] = order.sources_of(np.concatenate(positions))
    return torch.from_numpy(sources_MB)


def _to(device: torch.device, values: Tensor) -> Tensor:
    if device.type == "cuda":
        values = values.pin_memory()  # the copy then waits for nothing
    return values.to(device, non_blocking=True)
