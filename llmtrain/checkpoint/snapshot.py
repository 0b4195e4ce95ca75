"""A copy of the training state in host memory, from which a save writes while the loop goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from llmtrain.engine import Fragment

_ALIGNED_BYTES = 64


class Snapshot:
    """Takes copies into the same memory each time: fresh pages cost several times what the copying does.

    So from the first save on it holds as many bytes as this rank's state has.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copy the fragments; what the last call returned is overwritten, so its writer must be done."""
        sources = list(fragments)
        sizes = [fragment.values.nbytes + -fragment.values.nbytes % _ALIGNED_BYTES for fragment in sources]
        *begins, size = accumulate(sizes, initial=0)
        if self._memory.nbytes != size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return [
            replace(fragment, values=self._copy(fragment.values, begin))
            for fragment, begin in zip(sources, begins, strict=True)
        ]

    def _copy(self, values: Tensor, begin: int) -> Tensor:
        return self._memory[begin : begin + values.nbytes].view(values.dtype).copy_(values)
