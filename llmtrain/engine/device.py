"""Which device a process gets, and what it can do."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

import torch

from llmtrain.data.memory import free_host_memory

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def set_up_allocator() -> None:
    """Keep the host's memory that is freed for what is allocated next, and lay it out in pages of 2 MB.

    For a process that computes on the CPU: a step frees and allocates its activations, and the kernel would take back
    what is large and hand it out anew, page by page: a hundred thousand of 4 KB at 10m, of which each costs
    microseconds in a virtual machine. What each thread needed most at once stays with the process, see
    `give_back_memory`.

    Must come before the first large tensor, for torch reads its variable once (c10, alloc_cpu.cpp); who has set a
    variable of his own is obeyed. Linux with glibc only; elsewhere it does nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)  # never


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


def free_memory(device: torch.device) -> int:
    """Bytes that a new process can take: of the GPU, else of the machine and of the limit it runs under."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_memory()


def give_back_memory() -> None:
    """Let the kernel have what is free of the memory that `set_up_allocator` keeps: what was only needed to start."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
