"""A copy of the training state in host memory, from which a save writes while the loop goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llmtrain.engine import Fragment

_ALIGNED_BYTES = 64


class Snapshot:
    """Takes copies into the same memory each time: fresh pages cost several times what the copying does.

    So from the first save on it holds as many bytes as this rank's state has; where the state lies on a CUDA device,
    locked in memory, which the device copies to at full speed.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copy the fragments; what the last call returned is overwritten, so its writer must be done."""
        sources = list(fragments)
        sizes = [fragment.values.nbytes + -fragment.values.nbytes % _ALIGNED_BYTES for fragment in sources]
        begins = list(accumulate(sizes, initial=0))
        is_on_cuda = any(fragment.values.is_cuda for fragment in sources)
        memory = self._of_size(begins[-1], is_locked=is_on_cuda)
        copies = []
        for fragment, begin in zip(sources, begins[:-1], strict=True):
            values = fragment.values
            copy = memory[begin : begin + values.nbytes].view(values.dtype)
            copies.append(replace(fragment, values=copy.copy_(values, non_blocking=True)))
        if is_on_cuda:
            torch.cuda.current_stream().synchronize()
        return copies

    def _of_size(self, size: int, *, is_locked: bool) -> Tensor:
        if self._memory is None or self._memory.nbytes != size:
            if self._memory is not None and is_locked:
                _require(_cuda().cudaHostUnregister(self._memory.data_ptr()))
            self._memory = torch.empty(size, dtype=torch.uint8)
            if is_locked:  # `pin_memory` would take the next power of two
                _require(_cuda().cudaHostRegister(self._memory.data_ptr(), size, 0))
        return self._memory


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _require(status: int) -> None:
    torch.cuda.check_error(int(status))
