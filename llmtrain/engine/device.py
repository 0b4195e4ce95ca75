"""Which device a process gets, and what it can do."""

from __future__ import annotations

import torch


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
