"""What processes tell each other beside the device, over the CPU, where a lost one is an error and not a hang.

Over NCCL a value would be copied to the GPU and back, behind all that it still computes; and where a process is gone,
NCCL ends the others from a thread of its own (torch's ProcessGroupNCCL), before they could say anything or save.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


class SideChannel:
    """A group of its own over the CPU, in which nothing waits for a GPU.

    All processes make theirs at the same time, and call its methods in the same order. Yes or no is asked at one place
    of the loop and heard at the next.
    """

    def __init__(self, timeout_s: float):
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def ask(self, flags: tuple[bool, ...]) -> None:
        """Send this process's flags; returns at once."""
        assert self._asked is None, "asked twice without hearing"
        tensor = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._asked = work, tensor

    def hear(self) -> tuple[bool, ...]:
        """Whether each flag was set on any process; waits for those that have not asked yet."""
        assert self._asked is not None, "nothing was asked"
        work, tensor = self._asked
        work.wait()
        self._asked = None
        return tuple(map(bool, tensor.tolist()))

    def gather(self, value: Value) -> list[Value]:
        """The value of each process, by rank; they are pickled."""
        values: list[Value | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]  # every place is filled now

    def barrier(self) -> None:
        """Wait until all have come."""
        dist.barrier(self._group)
