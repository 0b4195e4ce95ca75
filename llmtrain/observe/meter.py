"""Adds up what happens between two records without asking the device anything; a record is the only sync."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmtrain.config import RunConfig
from llmtrain.engine import Engine
from llmtrain.model.cost import flops_per_token, model_flops_utilization
from llmtrain.observe.record import Record
from llmtrain.observe.validation import Validation


class Meter:
    """Sums of loss, targets and time since the last record."""

    def __init__(self, engine: Engine, config: RunConfig):
        self._engine = engine
        self._flops_per_token = flops_per_token(config.model, config.data.seq_len)
        self._device_name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
        self._loss_sum = torch.zeros((), device=engine.device)
        self._gradient_fault = torch.zeros((), device=engine.device)
        self._targets = 0
        self._timed_targets = self._timed_steps = 0
        self._since = time.perf_counter()

    def add(self, loss_sum: torch.Tensor, grad_norm: torch.Tensor, targets: int) -> None:
        """Add one optimizer step: this rank's loss sum, the gradient norm, the global batch's target tokens."""
        self._loss_sum += loss_sum
        self._gradient_fault += grad_norm * 0  # 0 as long as every norm is finite, NaN ever after
        self._targets += targets
        self._timed_targets += targets
        self._timed_steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of tokens per second and MFU: evaluation, samples, saving."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def record(
        self, *, step: int, epoch: int, tokens: int, lr: float, grad_norm: torch.Tensor, val: Validation | None
    ) -> Record:
        """Ask the device, over all ranks, and start anew."""
        loss = self._engine.sum(self._loss_sum).item() / self._targets
        seconds = time.perf_counter() - self._since
        tokens_per_sec = self._timed_targets / seconds
        record = Record(
            step=step,
            epoch=epoch,
            train_loss=loss,
            val_loss=val.loss if val else None,
            val_accuracy=val.accuracy if val else None,
            learning_rate=lr,
            grad_norm=grad_norm.item(),
            param_norm=self._engine.parameter_norm().item(),
            tokens=tokens,
            tokens_per_sec=tokens_per_sec,
            step_time_s=seconds / max(1, self._timed_steps),
            mfu=model_flops_utilization(
                tokens_per_sec * self._flops_per_token, self._device_name, self._engine.world_size
            ),
            memory_gb=peak_memory_gb(self._engine.device),
            time=time.time(),
        )
        self._loss_sum.zero_()
        self._targets = self._timed_targets = self._timed_steps = 0
        self._since = time.perf_counter()
        return record

    def is_finite(self) -> bool:
        """Whether every loss since the last record and every gradient norm of this launch was a number."""
        return math.isfinite(self._engine.sum(self._loss_sum + self._gradient_fault).item())

    def state(self) -> dict[str, Any]:
        """The sums of an unfinished interval, exact in JSON; one for each rank, for float32 sums know an order."""
        return {"loss_sums": self._engine.gather(self._loss_sum.item()), "targets": self._targets}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with an unfinished interval; on another number of ranks, rank 0 carries the sum of all."""
        sums = state.get("loss_sums", [state.get("loss_sum", 0.0)])
        if len(sums) != self._engine.world_size:
            sums = [sum(sums)] + [0.0] * (self._engine.world_size - 1)
        self._loss_sum.fill_(sums[self._engine.rank])
        self._targets = int(state.get("targets", 0))


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (10^9 bytes): of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
