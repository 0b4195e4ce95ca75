"""Yes or no from all processes, beside the device: asked at one place of the loop, heard at the next."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


class SideChannel:
    """A group of its own over the CPU, so that neither asking nor hearing waits for a GPU.

    All processes make theirs at the same time, and ask and hear in the same order.
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
