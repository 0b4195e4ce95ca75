"""Adds up what happens between two records without asking the device anything; a record is the only sync."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from llmtrain.engine import Engine, Outcome, Verdict
from llmtrain.model.cost import model_flops_utilization
from llmtrain.observe.loss_sums import LossSums, sum_dtype
from llmtrain.observe.own_time import OwnTime
from llmtrain.observe.record import Record, SetRecord
from llmtrain.observe.validation import Validation

Item = TypeVar("Item")


class Meter:
    """Sums of loss, targets and time since the last record.

    Args:
        engine: that takes the steps.
        flops_per_token: of the model, and as PaLM counts them.
        sources: the names of those in a mixture.
    """

    def __init__(self, engine: Engine, flops_per_token: tuple[float, float], sources: Sequence[str] = ()):
        self._engine, self._sources = engine, sources
        self._flops_per_token = flops_per_token
        self._device_name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
        self._loss_sum = torch.zeros((), device=engine.device)
        self._by_source = torch.zeros(2, len(sources), dtype=sum_dtype(engine.device), device=engine.device)
        self.source_losses: dict[str, float] = {}  # nats per target of those that the last record had any of
        self._targets: int | torch.Tensor = 0  # of applied steps; on the device once it knows more than the host
        self._skipped: int | torch.Tensor = 0
        self._timed_targets = self._timed_steps = self._pauses = 0
        self._reading_s = 0.0
        self._since = time.perf_counter()
        self._own_time = OwnTime(engine)

    def begin(self) -> None:
        """A step begins."""
        self._own_time.begin()

    def add(self, loss: LossSums, outcome: Outcome, targets: int) -> None:
        """Add one optimizer step: this rank's loss, what it showed, the global batch's target tokens.

        Of a refused step only that it was one, and its time.
        """
        by_source = loss.by_source()
        if not isinstance(outcome.seen, Verdict):
            is_refused = outcome.seen[2] != 0
            self._loss_sum += loss.total.masked_fill(is_refused, 0.0)
            self._targets = self._targets + ~is_refused * targets
            self._skipped = self._skipped + is_refused
            if by_source is not None:
                self._by_source += by_source.masked_fill(is_refused, 0.0)
        elif outcome.seen.is_refused:
            self._skipped += 1
        else:
            self._loss_sum += loss.total
            self._targets += targets
            if by_source is not None:
                self._by_source += by_source
        self._timed_targets += targets
        self._timed_steps += 1

    def reading(self, micro_batches: Iterable[Item]) -> Iterator[Item]:
        """Go through what is read for training, and take the time that each item is waited for."""
        source = iter(micro_batches)
        while True:
            began = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            self._reading_s += time.perf_counter() - began
            yield item

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of tokens per second and MFU: evaluation, samples, saving. One may hold others."""
        began = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._since += time.perf_counter() - began

    def record(
        self, *, step: int, epoch: int, tokens: int, lr: float, grad_norm: torch.Tensor, val: Validation | None
    ) -> Record:
        """Ask the device, over all ranks, and start anew."""
        targets = int(self._targets)
        loss = self._engine.sum(self._loss_sum).item() / targets if targets else math.nan
        self.source_losses = self._of_sources()
        seconds = time.perf_counter() - self._since
        spread_s, slowest_rank = self._own_time.compare()
        tokens_per_sec = self._timed_targets / seconds
        mfu, mfu_palm = (
            model_flops_utilization(tokens_per_sec * flops, self._device_name, self._engine.world_size)
            for flops in self._flops_per_token
        )
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
            mfu=mfu,
            mfu_palm=mfu_palm,
            memory_gb=peak_memory_gb(self._engine.device),
            step_time_spread_s=spread_s,
            slowest_rank=slowest_rank,
            time=time.time(),
            skipped=int(self._skipped),
            data_time_s=self._reading_s / max(1, self._timed_steps),
            validation={name: SetRecord(one.loss, one.accuracy) for name, one in val.sets.items()} if val else None,
        )
        self._loss_sum.zero_()
        self._by_source.zero_()
        self._targets = self._skipped = self._timed_targets = self._timed_steps = 0
        self._reading_s = 0.0
        self._since = time.perf_counter()
        return record

    def _of_sources(self) -> dict[str, float]:
        if not self._sources:
            return {}
        sums = self._engine.sum(self._by_source).T.tolist()
        return {name: loss / targets for name, (loss, targets) in zip(self._sources, sums, strict=True) if targets}

    def state(self) -> dict[str, Any]:
        """The sums of an unfinished interval, exact in JSON; one for each rank, for float32 sums know an order."""
        state: dict[str, Any] = {"targets": int(self._targets), "skipped": int(self._skipped)}
        state["loss_sums"] = self._engine.gather(self._loss_sum.item())
        if self._sources:
            state["by_source"] = self._engine.gather(self._by_source.tolist())
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with an unfinished interval, whatever was counted; on another number of ranks, rank 0 has the sum."""
        self._loss_sum.copy_(self._share(state.get("loss_sums", [state.get("loss_sum", 0.0)])))
        self._by_source.zero_()
        if self._sources and "by_source" in state:
            self._by_source.copy_(self._share(state["by_source"]))
        self._targets = int(state.get("targets", 0))
        self._skipped = int(state.get("skipped", 0))
        self.source_losses = {}
        self._timed_targets = self._timed_steps = 0
        self._reading_s = 0.0
        self._since = time.perf_counter()

    def _share(self, of_ranks: list[Any]) -> torch.Tensor:
        """This rank's of what each had; where they were more or fewer, the first has the sum."""
        sums = torch.tensor(of_ranks, dtype=sum_dtype(self._engine.device))
        if len(sums) == self._engine.world_size:
            return sums[self._engine.rank]
        return sums.sum(0) if self._engine.rank == 0 else torch.zeros_like(sums[0])


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (10^9 bytes): of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
