"""What every engine has: its place among the processes, what they tell each other, and a model to look at."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from llmtrain.config import TrainingSection
from llmtrain.cores import usable_cores
from llmtrain.engine.asking import SideChannel
from llmtrain.engine.protocol import Limits, Verdict
from llmtrain.engine.rendezvous import meeting
from llmtrain.errors import UserError
from llmtrain.model.transformer import Transformer

Value = TypeVar("Value")


class Processes:
    """The processes of a launch, joined; Accelerate reads from the environment which they are.

    Args:
        timeout_s: seconds after which a collective operation that does not end is an error.

    Raises:
        UserError: more processes on this machine than GPUs, or the other processes cannot be reached.
    """

    _bare: Transformer  # since `build`: as it was made, without what the library wraps around it
    exchanges_in_forward = False

    def __init__(self, timeout_s: float):
        on_gpu = torch.cuda.is_available()
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count() if on_gpu else None)
        with meeting(timeout_s):
            self._accelerator = _accelerator(timeout_s, on_gpu)
            self._accelerator.wait_for_everyone()  # the first exchange shows whether they can talk
            self._side = SideChannel(timeout_s) if self._accelerator.num_processes > 1 else None
        # NCCL ends a process whose exchange takes longer, without a word from Python: later than the watchdog, which
        # says who is missing.
        self.exchange_timeout = timedelta(seconds=timeout_s * (2 if on_gpu else 1))
        if on_gpu and self._side:
            _set_pg_timeout(self.exchange_timeout)
        self.timeout_s = timeout_s
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self.before_gather: Callable[[], object] = lambda: None
        self._asked: tuple[bool, ...] = ()

    def may_compile(self, training: TrainingSection) -> bool:
        """See `Engine`."""
        return self.device.type in ("cpu", "cuda")

    def sum(self, values: Tensor) -> Tensor:
        """See `Engine`."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    @property
    def host_sees_all(self) -> bool:
        """Whether every number is known to the host at once: there is no device beside it."""
        return self.device.type == "cpu"

    def judge(self, loss: Tensor | None, norm: Tensor, limits: Limits) -> Verdict | Tensor:
        """`Outcome.seen` of a step; the same bits on all ranks, whatever their norms differ by.

        Costs one exchange of two numbers, and no wait for the device: the limits go to it as arguments of a kernel.
        """
        if self.host_sees_all:
            return self._judge_on_host(0.0 if loss is None else loss.item(), norm.item(), limits)
        share = torch.zeros_like(norm) if loss is None else loss.to(norm)
        both = self.sum(torch.stack([share, norm / self.world_size]).float())
        is_fine = both.isfinite().all() & (both[0] < limits.loss) & (both[1] < limits.grad_norm)
        return torch.cat([both, (~is_fine).float().view(1)])

    def _judge_on_host(self, loss: float, norm: float, limits: Limits) -> Verdict:
        """The same where every operation on a tensor of one number would cost as much as all of this."""
        if self.world_size > 1:
            loss, norm = self.sum(torch.tensor([loss, norm / self.world_size])).tolist()
        is_fine = math.isfinite(loss) and loss < limits.loss and norm < limits.grad_norm  # so a norm that is no number
        return Verdict(loss, norm, not is_fine)

    def any(self, flag: bool) -> bool:
        """See `Engine`."""
        if self.world_size == 1:
            return flag  # without waiting for the device
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def ask(self, *flags: bool) -> None:
        """See `Engine`."""
        self._asked = flags
        if self._side:
            self._side.ask(flags)

    def hear(self) -> tuple[bool, ...]:
        """See `Engine`."""
        return self._side.hear() if self._side else self._asked

    def gather(self, value: Value) -> list[Value]:
        """See `Engine`."""
        if self._side is None:
            return [value]
        self.before_gather()
        return self._side.gather(value)

    def use_own_cores(self) -> None:
        """Compute on the CPU in as many threads as this process has cores for itself; all ranks call it.

        torch's launcher leaves each one thread, unless OMP_NUM_THREADS is set (torch/distributed/run.py); a 1 there is
        not told from that, more is obeyed.
        """
        cores = (platform.node(), usable_cores())
        sharing = self.gather(cores).count(cores)
        if torch.get_num_threads() == 1:
            torch.set_num_threads(max(1, len(cores[1]) // sharing))

    @contextmanager
    def evaluating(self) -> Iterator[Transformer]:
        """See `Engine`. Under ZeRO-3 the model's own hooks gather its weights, so all ranks must call it alike."""
        self._bare.eval()
        try:
            with torch.no_grad():
                yield self._bare
        finally:
            self._bare.train()

    def barrier(self) -> None:
        """See `Engine`."""
        if self._side:
            self._side.barrier()

    def close(self) -> None:
        """See `Engine`. Accelerate keeps its state in globals; clearing them lets one process run again."""
        self._accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def _accelerator(timeout_s: float, on_gpu: bool) -> Accelerator:
    is_launched = "LOCAL_RANK" in os.environ
    group = InitProcessGroupKwargs(
        backend="gloo" if is_launched and not on_gpu else None, timeout=timedelta(seconds=timeout_s)
    )
    # No buffer of ours ever changes, and gradients need no second copy to be sent from.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # Under DeepSpeed Accelerate joins nobody where it is told `cpu`; otherwise it would not believe there is none.
    cpu = not on_gpu and not torch.backends.mps.is_available() and not launched_with_deepspeed()
    # Precision is ours: `Engine.build` sets it, the same for all engines.
    return Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[group, ddp])


def launched_with_deepspeed() -> bool:
    """Whether `accelerate launch` was given a launch file for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def check_gpus(processes: int, gpus: int | None) -> None:
    """Refuse more processes than GPUs on this machine; None: there is no GPU, and the CPU takes any number.

    Raises:
        UserError: two processes would share a GPU.
    """
    if gpus is not None and processes > gpus:
        raise UserError(
            f"the launch starts {processes} processes on this machine, which has {gpus} GPUs; set num_processes to "
            f"{gpus} for each machine (accelerate launch --num_processes {gpus})"
        )
