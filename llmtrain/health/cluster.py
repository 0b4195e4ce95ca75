"""What the processes of a launch can do together: who they are, and how fast they exchange.

Bus bandwidth is what makes exchanges of any kind and number of ranks comparable with a link: bytes of the whole tensor
by time, times 2 (n − 1) / n for all-reduce and (n − 1) / n for all-gather (nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llmtrain.engine import Engine
from llmtrain.health.finding import Finding, ok, warn
from llmtrain.health.links import Links, own_links

_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}  # large enough that only bandwidth counts
_TINY_VALUES = 8  # so little that only latency counts
_REPEATS = 8
_WARMUP = 3
EXPECTED_SHARE = 0.5  # of a link's speed; NCCL reaches 0.7 to 0.95 where all is well (nccl-tests)
SLOW_LINK = 0.5  # of the median link
SLOW_GPU = 0.9  # of the median GPU
_MATRIX = 8192


@dataclass(frozen=True, slots=True)
class Member:
    """One rank, as the others get to know it."""

    host: str
    device: str
    links: Links


def cluster_findings(engine: Engine) -> Iterator[Finding]:
    """Measure; every rank must go through all of it, and every rank gets the same findings."""
    name, gpu = engine.device.type, None
    if name == "cuda":
        properties = torch.cuda.get_device_properties(engine.device)
        name, gpu = properties.name, f"GPU-{properties.uuid}"
    members = engine.gather(Member(platform.node(), name, own_links(gpu)))
    yield _ranks(members)
    if engine.device.type == "cuda":
        yield _gpus(engine, members)
    tiny = torch.zeros(_TINY_VALUES, device=engine.device)
    yield ok(
        "latency",
        f"an all-reduce of {tiny.nbytes} bytes takes {1e6 * _seconds(engine, lambda: dist.all_reduce(tiny)):,.0f} µs",
    )
    expected, link = expected_gb_s(members)
    for kind, gb_s in _bandwidths(engine):
        yield bandwidth_finding(kind, gb_s, expected, link)
    if engine.world_size > 2:
        yield links_finding(engine.gather(_from_previous(engine)), members)


def _ranks(members: list[Member]) -> Finding:
    hosts = Counter(member.host for member in members)
    devices = Counter(member.device for member in members)
    kinds = ", ".join(f"{count} × {device}" for device, count in devices.items())
    detail = f"{len(members)} on {len(hosts)} host{'s' if len(hosts) > 1 else ''}: {kinds}"
    if len(devices) > 1:
        return warn("ranks", f"{detail}; the slowest kind sets the pace of all")
    if len(set(hosts.values())) > 1:
        return warn("ranks", f"{detail}, not equally many on each ({', '.join(f'{h}: {n}' for h, n in hosts.items())})")
    return ok("ranks", detail)


def _seconds(engine: Engine, work: Callable[[], object]) -> float:
    """The median time of an exchange, on the slowest rank."""
    times = []
    for repeat in range(_WARMUP + _REPEATS):
        _wait(engine)
        dist.barrier()
        began = time.perf_counter()
        work()
        _wait(engine)
        if repeat >= _WARMUP:
            times.append(time.perf_counter() - began)
    return max(engine.gather(statistics.median(times)))


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def _bandwidths(engine: Engine) -> Iterator[tuple[str, float]]:
    """All-reduce and all-gather of float32, as DDP and ZeRO use them; bus bandwidth in GB/s."""
    ranks = engine.world_size
    part = torch.ones(_BYTES.get(engine.device.type, _BYTES["cpu"]) // 4 // ranks, device=engine.device)
    whole = torch.ones(len(part) * ranks, device=engine.device)
    seconds = _seconds(engine, lambda: dist.all_reduce(whole))
    yield "all-reduce", whole.nbytes / seconds * 2 * (ranks - 1) / ranks / 1e9
    # Its new name, since torch 2.13; the old one warns there.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    seconds = _seconds(engine, lambda: all_gather(whole, part))
    yield "all-gather", whole.nbytes / seconds * (ranks - 1) / ranks / 1e9


def expected_gb_s(members: list[Member]) -> tuple[float | None, str]:
    """The slowest link that an exchange between all ranks goes over, and what it is; None: not known.

    A ring over hosts enters and leaves each of them over all its adapters together (nccl-tests, PERFORMANCE.md).
    """
    speeds: list[tuple[float | None, str]] = []
    hosts = {member.host: member.links for member in members}
    if max(Counter(member.host for member in members).values()) > 1:
        speeds += [(member.links.gpu, member.links.gpu_kind) for member in members]
    if len(hosts) > 1:
        speeds += [(links.host, links.host_kind) for links in hosts.values()]
    unknown = [kind for speed, kind in speeds if speed is None]
    if unknown:
        return None, unknown[0]
    return min((speed, kind) for speed, kind in speeds if speed is not None)


def bandwidth_finding(kind: str, gb_s: float, expected: float | None, link: str) -> Finding:
    """Compare what was measured with what the link should give."""
    detail = f"{gb_s:,.2f} GB/s of bus bandwidth"
    if expected is None:
        return ok(kind, f"{detail}; the speed of the link ({link}) is not told by the system")
    detail += f", {gb_s / expected:.0%} of what {link} should give ({expected:,.1f} GB/s)"
    if gb_s >= EXPECTED_SHARE * expected:
        return ok(kind, detail)
    return warn(
        kind,
        f"{detail}; NCCL_DEBUG=INFO says which way NCCL takes: NET/Socket where there is InfiniBand, or no P2P between"
        " GPUs, is the usual cause (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, ACS in the BIOS)",
    )


def _from_previous(engine: Engine) -> float:
    """GB/s from the rank before this one, while all ranks send to the next."""
    ranks, rank = engine.world_size, engine.rank
    sent = torch.ones(_BYTES.get(engine.device.type, _BYTES["cpu"]) // 16, device=engine.device)
    got = torch.empty_like(sent)
    times = []
    for _ in range(_WARMUP + _REPEATS):
        dist.barrier()
        _wait(engine)
        began = time.perf_counter()
        exchange = [
            dist.P2POp(dist.isend, sent, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, got, (rank - 1) % ranks),
        ]
        for request in dist.batch_isend_irecv(exchange):
            request.wait()
        _wait(engine)
        times.append(time.perf_counter() - began)
    return got.nbytes / min(times) / 1e9


def links_finding(gb_s: list[float], members: list[Member]) -> Finding:
    """Name the slowest link of the ring over all ranks; `gb_s[r]` is that from rank r − 1 to rank r."""
    slowest = min(range(len(gb_s)), key=lambda rank: gb_s[rank])
    median, before = statistics.median(gb_s), (slowest - 1) % len(gb_s)
    detail = (
        f"from rank to next {median:,.2f} GB/s at the median, least {gb_s[slowest]:,.2f} from {before} to {slowest}"
    )
    if gb_s[slowest] >= SLOW_LINK * median:
        return ok("links", detail)
    hosts = dict.fromkeys((members[before].host, members[slowest].host))
    return warn("links", f"{detail}; look at the cables and adapters of {' and '.join(hosts)}, or leave them out")


def _gpus(engine: Engine, members: list[Member]) -> Finding:
    """A product of matrices on each GPU at the same time: one that is hot or broken is slower than the others."""
    square = torch.ones(_MATRIX, _MATRIX, device=engine.device, dtype=torch.bfloat16)
    times = []
    for _ in range(_WARMUP + _REPEATS):
        _wait(engine)
        began = time.perf_counter()
        square @ square
        _wait(engine)
        times.append(time.perf_counter() - began)
    return gpus_finding(engine.gather(2e-12 * _MATRIX**3 / min(times)), members)


def gpus_finding(tflops: list[float], members: list[Member]) -> Finding:
    """Name the GPUs that are slower than most."""
    median = statistics.median(tflops)
    detail = f"{median:,.0f} TFLOP/s in bf16 at the median"
    slow = [
        f"rank {rank} on {members[rank].host}: {value:,.0f}"
        for rank, value in enumerate(tflops)
        if value < SLOW_GPU * median
    ]
    if not slow:
        return ok("gpu speed", detail)
    return warn(
        "gpu speed", f"{detail}, but {', '.join(slow)}; look at its heat and clock (nvidia-smi -q -d PERFORMANCE)"
    )
