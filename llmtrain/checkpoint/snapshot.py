"""A copy of the training state in host memory, from which a save writes while the loop goes on."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from llmtrain.engine import Fragment

_ALIGNED_BYTES = 64


class Snapshot:
    """Takes copies into the same memory each time: fresh pages cost several times what the copying does.

    So from the first save on, or `expect`, it holds as many bytes as this rank's state has.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._getting: threading.Thread | None = None

    def expect(self, fragments: Iterable[Fragment]) -> None:
        """Get the memory for such fragments in a thread of its own, so that the first copy is as quick as the others.

        Called again, it does nothing.
        """
        if self._getting is None and not self._memory.nbytes:
            *_, size = _begins(list(fragments))
            self._getting = threading.Thread(target=self._get, args=(size,), name="memory for saves", daemon=True)
            self._getting.start()

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copy the fragments; what the last call returned is overwritten, so its writer must be done.

        Raises:
            MemoryError: there is none for a copy.
        """
        sources = list(fragments)
        *begins, size = _begins(sources)
        if self._getting:
            self._getting.join()
        if self._memory.nbytes != size:
            self._memory = _memory(size)
        return [
            replace(fragment, values=self._copy(fragment.values, begin))
            for fragment, begin in zip(sources, begins, strict=True)
        ]

    def _get(self, size: int) -> None:
        try:
            memory = _memory(size)
        except MemoryError:
            return  # `take` tries again, and tells
        memory.numpy()[:: mmap.PAGESIZE] = 0  # a page is there once written; numpy holds no lock meanwhile
        self._memory = memory

    def _copy(self, values: Tensor, begin: int) -> Tensor:
        return self._memory[begin : begin + values.nbytes].view(values.dtype).copy_(values)


def _memory(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:  # as torch's allocator has it
        raise MemoryError(f"{size / 1e6:,.1f} MB") from error


def _begins(fragments: Sequence[Fragment]) -> list[int]:
    """Where each fragment begins in bytes, and after them where the last one ends."""
    sizes = [fragment.values.nbytes + -fragment.values.nbytes % _ALIGNED_BYTES for fragment in fragments]
    return list(accumulate(sizes, initial=0))
