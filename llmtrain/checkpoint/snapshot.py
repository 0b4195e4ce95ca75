"""A copy of the training state in host memory, from which a save writes while the loop goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from llmtrain.engine import Fragment


class Snapshot:
    """Takes copies into the same memory each time: fresh pages cost several times what the copying does.

    So from the first save on it holds as many bytes as this rank's state has.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copy the fragments; what the last call returned is overwritten, so its writer must be done."""
        return [replace(fragment, values=self._copy(fragment)) for fragment in fragments]

    def _copy(self, fragment: Fragment) -> torch.Tensor:
        key, values = (fragment.name, fragment.start), fragment.values
        memory = self._memory.get(key)
        if memory is None or (memory.shape, memory.dtype) != (values.shape, values.dtype):
            memory = self._memory[key] = torch.empty(values.shape, dtype=values.dtype)
        return memory.copy_(values)
