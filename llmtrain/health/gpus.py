"""What NVIDIA's driver says of the GPUs, and whether this build of torch can use them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

import torch

from llmtrain.health.finding import Finding, fail, ok, warn

_SMI_TIMEOUT_S = 30.0  # a GPU that has fallen off the bus makes the driver wait
_QUERY = "index,memory.used,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown"
BUSY_MB = 1000  # more than the contexts of a few idle processes take


def gpu_findings() -> Iterator[Finding]:
    """Driver, kernels, NCCL, and each GPU's state; nothing where there is no NVIDIA driver."""
    driver = _driver()
    if driver is None:
        if torch.cuda.is_available() and torch.version.cuda:
            yield warn("driver", "nvidia-smi is not here, so neither its version nor the state of the GPUs is known")
        return
    version, cuda = driver
    yield _driver_finding(version, cuda, torch.version.cuda, torch.cuda.is_available())
    if not torch.cuda.is_available():
        return
    yield _kernels()
    if torch.distributed.is_nccl_available():
        yield ok("nccl", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    else:
        yield warn("nccl", "this build of torch has none: several GPUs cannot train together")
    state = smi(f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    if state is None:
        yield warn("gpu state", "not known: nvidia-smi does not answer; look at it by hand")
        return
    problems = list(gpu_problems(state))
    yield (
        warn("gpu state", "; ".join(problems))
        if problems
        else ok("gpu state", "no errors, not slowed down, not in use")
    )


def smi(*arguments: str) -> str | None:
    """What `nvidia-smi` answers; None where there is none, or it fails."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, check=False, timeout=_SMI_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _driver() -> tuple[str, tuple[int, int] | None] | None:
    """The driver's version, and the newest CUDA that it runs."""
    told = smi()
    if told is None:
        return ("unknown: nvidia-smi fails", None) if shutil.which("nvidia-smi") else None
    version = re.search(r"Driver Version:\s*([\d.]+)", told)
    cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", told)
    return version[1] if version else "unknown", (int(cuda[1]), int(cuda[2])) if cuda else None


def _driver_finding(version: str, cuda: tuple[int, int] | None, built_for: str | None, works: bool) -> Finding:
    """Whether the driver can run what torch was built for.

    Within a major version of CUDA an older driver does (NVIDIA, "CUDA Compatibility", minor version compatibility).
    """
    runs = f"; runs CUDA up to {cuda[0]}.{cuda[1]}" if cuda else ""
    if built_for is None:
        return warn(
            "driver", f"{version}{runs}, but torch is a CPU build; install a CUDA build of torch to use the GPU"
        )
    if cuda and int(built_for.partition(".")[0]) > cuda[0]:
        return fail(
            "driver",
            f"{version}{runs}, torch is built for CUDA {built_for}; update it, or install torch for CUDA {cuda[0]}",
        )
    if not works:
        return fail(
            "driver",
            f"{version}{runs}, but torch finds no GPU; look at CUDA_VISIBLE_DEVICES; a container needs --gpus all",
        )
    return ok("driver", f"{version}{runs}")


def _kernels() -> Finding:
    """Whether torch has machine code for these GPUs, or at least code that the driver can translate."""
    built = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        same_major = any(f"sm_{major}{older}" in built for older in range(minor + 1))
        later = any(int(name[8:].rstrip("af")) <= 10 * major + minor for name in built if name.startswith("compute_"))
        if not (same_major or later):
            return fail(
                "kernels",
                f"GPU {index} has compute capability {major}.{minor}, for which this torch has no code "
                f"({', '.join(built)}); install a newer build of torch",
            )
    return ok("kernels", ", ".join(built))


def gpu_problems(table: str) -> Iterator[str]:
    """What is wrong with any GPU: rows of `nvidia-smi --query-gpu` with the fields of `_QUERY`."""
    for row in table.splitlines():
        index, used, errors, slowdown = (cell.strip() for cell in row.split(","))
        if used.isdecimal() and int(used) > BUSY_MB:
            yield f"GPU {index} holds {int(used) / 1000:.1f} GB of other programs; end them, or leave it out"
        if errors.isdecimal() and int(errors):
            yield f"GPU {index} has {errors} memory errors that could not be corrected; reset or replace it"
        if slowdown == "Active":
            yield f"GPU {index} is slowed down by its hardware (heat or power); look at its cooling"


def nvlink_gb_s(status: str) -> float:
    """GB/s out of one GPU over all its NVLinks, from `nvidia-smi nvlink --status -i N`; 0 without any."""
    return sum(map(float, re.findall(r"Link \d+: ([\d.]+) GB/s", status)))
