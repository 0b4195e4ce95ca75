"""The next micro-batch is on its way to the device while this one is computed.

On a GPU a copy from pinned memory runs beside the kernels, on a stream of its own; the device waits for it, the host
does not. On a CPU there is nowhere to go, and micro-batches pass as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Never

import torch
from torch import Tensor

Arrival = Callable[[], Tensor]  # called once, by who is about to use the tensor: gives it as it lies on the device
Way = Callable[[Tensor], Arrival]  # sends a tensor to the device, and does not wait for it


class Ahead(Iterator[Tensor]):
    """Goes through tensors; each is read and sent before the one in front of it is used.

    One that cannot be read, and their end, are told when it is their turn: what comes before is still used.
    """

    def __init__(self, source: Iterator[Tensor], way: Way):
        self._source, self._way = source, way
        self._sent: Arrival | None = None  # nothing is read until the first is asked for

    def __next__(self) -> Tensor:
        tensor = (self._sent or self._send())()
        self._sent = self._send()
        return tensor

    def _send(self) -> Arrival:
        try:
            tensor = next(self._source)
        except Exception as error:  # also StopIteration
            return _Failed(error)
        return self._way(tensor)


class _Failed:
    """The arrival of what could not be read."""

    def __init__(self, error: Exception):
        self._error = error

    def __call__(self) -> Never:
        raise self._error


class SideStream:
    """The way to a CUDA device: a copy from pinned memory on a stream of its own.

    No memory is taken too early by somebody else: torch gives pinned memory away again when the copies from it are done
    (it remembers the streams they are on), and the memory of a copy when the work that was queued for its user is
    (`record_stream`).
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, tensor: Tensor) -> Arrival:
        """See `Way`."""
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        with torch.cuda.stream(self._stream):
            there = pinned.to(self._device, non_blocking=True)
            copied = self._stream.record_event()

        def arrival() -> Tensor:
            user = torch.cuda.current_stream(self._device)
            user.wait_event(copied)
            there.record_stream(user)
            return there

        return arrival


def ahead(tensors: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Go through tensors of the host as they lie on the device, one ahead where that lets copying hide.

    Args:
        tensors: may be endless; one more than is used is read.
        device: where they are used, on its current stream.
    """
    return Ahead(tensors, SideStream(device)) if device.type == "cuda" else tensors
