"""Which device a process gets, and what it can do."""

from __future__ import annotations

import os

import torch


def allocate_large_pages() -> None:
    """Let torch ask for pages of 2 MB for all tensors of that size or more that it will place in the host's memory.

    For a process that computes on the CPU: a step frees and allocates its activations, which the kernel hands out anew
    page by page, a hundred thousand of 4 KB at 10m. Must come before the first such tensor, for torch reads the
    variable once (c10, alloc_cpu.cpp); who has set it is obeyed. Linux only; elsewhere it does nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def pick_device() -> torch.device:
    """The device a single process gets: CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def computes_bf16_natively(device: torch.device) -> bool:
    """Whether bf16 arithmetic is in the hardware: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # No public question for it before torch 2.13's get_capabilities, and its names are not settled.
        return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    return False
