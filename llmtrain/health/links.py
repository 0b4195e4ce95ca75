"""How fast the links of this machine should be, as its system tells it: NVLink, PCIe, InfiniBand, Ethernet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from llmtrain.health.gpus import nvlink_gb_s, smi
from llmtrain.health.limits import INFINIBAND

# GB/s of a lane after its encoding, by PCIe generation (PCI-SIG base specifications 1.0 to 6.0).
_PCIE_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}


@dataclass(frozen=True, slots=True)
class Links:
    """GB/s in one direction; None where the system does not say."""

    gpu: float | None  # between GPUs of this machine, out of each
    gpu_kind: str  # what that is
    host: float | None  # out of this machine, over all its adapters
    host_kind: str


def own_links(gpu: str | None) -> Links:
    """Ask this machine.

    Args:
        gpu: the driver's name for this process's (`GPU-` and its UUID); None without. Not its index, which is another
            in torch where CUDA_VISIBLE_DEVICES hides some.
    """
    between, kind = (None, "memory of the machine") if gpu is None else _between_gpus(gpu)
    infiniband = infiniband_gb_s(INFINIBAND)
    if infiniband:
        return Links(between, kind, infiniband, "InfiniBand")
    return Links(between, kind, ethernet_gb_s(), "Ethernet")


def _between_gpus(gpu: str) -> tuple[float | None, str]:
    nvlink = nvlink_gb_s(smi("nvlink", "--status", "-i", gpu) or "")
    if nvlink:
        return nvlink, "NVLink"
    told = smi("--query-gpu=pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader", "-i", gpu) or ""
    found = re.match(r"(\d+),\s*(\d+)", told)
    lane = _PCIE_LANE.get(int(found[1])) if found else None
    return (lane * int(found[2]), f"PCIe {found[1]} × {found[2]}") if found and lane else (None, "PCIe")


def infiniband_gb_s(folder: Path) -> float:
    """All ports that are up, RoCE's too; their rate is written as `400 Gb/sec (4X NDR)`."""
    total = 0.0
    for port in sorted(folder.glob("*/ports/*")):
        state, rate = ((port / name).read_text() if (port / name).is_file() else "" for name in ("state", "rate"))
        if "ACTIVE" in state and (found := re.match(r"([\d.]+) Gb/sec", rate)):
            total += float(found[1]) / 8
    return total


def ethernet_gb_s() -> float | None:
    """The fastest network adapter that is up and says its speed; virtual ones do not."""
    speeds = [stats.speed for name, stats in psutil.net_if_stats().items() if stats.isup and name != "lo"]
    fastest = max(speeds, default=0)
    return fastest / 8e3 if 0 < fastest < 2**31 else None
