"""Seconds of an optimizer step under each engine: what is computed, what of the exchanges does not hide behind it.

Volumes are those of ZeRO (Rajbhandari et al. 2020, section 7), for P parameters in the type in which they travel: DDP
and stages 1 and 2 pass on 2P, stage 3 3P. DeepSpeed 0.19.8 reduces in stages 1 and 2 by all-reduce
(`use_multi_rank_bucket_allreduce`), so 3P with the gathering of weights; stage 2 and 3 exchange gradients for every
micro-batch, and stages 1 and 2 not while they compute (`overlap_comm` is only on for stage 3).

An exchange that hides still costs: NCCL's kernels take multiprocessors from the products. And all ranks wait for the
slowest of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from llmtrain.model.cost import block_matrix_parameters, parameter_count
from llmtrain.model.memory import MOST_LIVE, EngineName, optimizer_values
from llmtrain.planning.communication import Links
from llmtrain.planning.compute import MEMORY_SHARE, Seconds, Work, compute_seconds
from llmtrain.planning.hardware import Gpu

NCCL_MULTIPROCESSORS = 16  # that an exchange takes: NCCL's channels between GPUs on NVLink
# By which GPUs of a kind differ under load, as a share of their speed. Sinha et al. 2022 ("Not All GPUs Are Created
# Equal", SC22) found 8 % between the slowest and the fastest of hundreds: about five and a half standard deviations.
SPREAD = 0.015
DDP_BUCKET = 25 << 20  # bytes
HOST_BANDWIDTH = 150e9  # bytes/s of a machine's memory, for an optimizer that lies there; two sockets reach about that


@dataclass(frozen=True)
class Exchange:
    """How values travel between ranks; this trainer's are float32."""

    weight_bytes: int = 4
    gradient_bytes: int = 4
    reuses: int = MOST_LIVE  # parameters that stay whole from the forward to the backward pass


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, by part; their sum is `total`."""

    products: float
    attention: float
    memory: float  # what only moves memory
    host: float  # for which the device waits for operators
    exchanged: float  # exchanges that do not hide behind computing
    slowed: float  # computing beside those that do
    update: float
    offload: float
    waiting: float  # for the slowest rank
    hidden: float  # exchanges that hide; not in the sum

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return (
            self.products + self.attention + self.memory + self.host + self.exchanged + self.slowed + self.update
            + self.offload + self.waiting
        )  # fmt: skip


def step_seconds(
    gpu: Gpu,
    links: Links,
    engine: EngineName,
    work: Work,
    *,
    accumulation: int = 1,
    optimizer: str = "adamw",
    offload: bool = False,
    exchange: Exchange | None = None,
    clock: float = 1.0,
) -> Step:
    """Seconds of an optimizer step.

    Args:
        gpu: the kind of all ranks.
        links: between them.
        engine: how they share the model.
        work: one micro-batch of one rank.
        accumulation: micro-batches in a step on each rank.
        optimizer: `optimizer.name`.
        offload: weights, gradients and optimizer lie in the memory of the host (stage 3 only).
        exchange: how values travel; None: as here.
        clock: see `compute_seconds`.
    """
    exchange = exchange or Exchange()
    seconds = compute_seconds(gpu, work, clock)
    shown, hidden = _exchanges(links, engine, work, seconds, accumulation=accumulation, exchange=exchange)
    update, moved = _update(gpu, links, engine, work, optimizer=optimizer, offload=offload, accumulation=accumulation)
    device = seconds.products + seconds.attention + seconds.memory
    slowed = hidden * NCCL_MULTIPROCESSORS / gpu.multiprocessors
    own = accumulation * seconds.total + slowed + update
    return Step(
        products=accumulation * seconds.products,
        attention=accumulation * seconds.attention,
        memory=accumulation * seconds.memory,
        host=accumulation * (seconds.total - device),
        exchanged=shown,
        slowed=slowed,
        update=update,
        offload=moved,
        waiting=own * SPREAD * slowest_of(links.ranks),
        hidden=hidden,
    )


def slowest_of(ranks: int) -> float:
    """Standard deviations by which the slowest of so many is expected to lie off (Blom 1958)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def _exchanges(
    links: Links, engine: EngineName, work: Work, seconds: Seconds, *, accumulation: int, exchange: Exchange
) -> tuple[float, float]:
    """Seconds of exchanges in a step that do not hide, and of those that do."""
    parameters = parameter_count(work.model, work.seq_len)
    gradients = exchange.gradient_bytes * parameters
    if links.ranks == 1 or engine == "single":
        return 0.0, 0.0
    if engine == "ddp":
        buckets = math.ceil(gradients / DDP_BUCKET)
        reduced = buckets * links.all_reduce_s(gradients / buckets)
        # The last bucket waits for the last gradient.
        shown = max(reduced - seconds.backward, links.all_reduce_s(min(gradients, DDP_BUCKET)))
        return shown, reduced - shown
    if engine in ("zero1", "zero2"):
        times = accumulation if engine == "zero2" else 1
        return times * links.all_reduce_s(gradients) + links.gather_s(exchange.weight_bytes * parameters), 0.0
    shown, hidden = _zero3(links, work, seconds, parameters, exchange)
    return accumulation * shown, accumulation * hidden


def _zero3(links: Links, work: Work, seconds: Seconds, parameters: int, exchange: Exchange) -> tuple[float, float]:
    block = block_matrix_parameters(work.model)
    rest = parameters - work.model.layers * block
    gather_block = links.gather_s(exchange.weight_bytes * block)  # as one
    reduce_block = links.gather_s(exchange.gradient_bytes * block)
    forward = work.model.layers * gather_block + links.gather_s(exchange.weight_bytes * rest)
    again = 1 - min(1.0, exchange.reuses / parameters)
    backward = forward * again + work.model.layers * reduce_block + links.gather_s(exchange.gradient_bytes * rest)
    # Nothing is computed before the first weights are there, and after the last gradients.
    first, last = gather_block, reduce_block
    shown = max(forward - seconds.forward, first) + max(backward - seconds.backward, last)
    return shown, forward + backward - shown


def _update(
    gpu: Gpu, links: Links, engine: EngineName, work: Work, *, optimizer: str, offload: bool, accumulation: int
) -> tuple[float, float]:
    """Seconds of the optimizer, and of what goes between device and host for it."""
    parameters = parameter_count(work.model, work.seq_len)
    states = optimizer_values(optimizer, work.model, work.seq_len)
    shares = links.ranks if engine.startswith("zero") else 1
    # Float32: the gradient read for its norm, then gradient, weight and states read, and all but the gradient written.
    moved = 4.0 * (4 * parameters + 2 * states) / shares
    seconds = moved / (gpu.memory_bandwidth * MEMORY_SHARE)
    if optimizer == "muon":
        seconds += _muon(gpu, work)
        if shares > 1:  # matrices are put together for it
            seconds += links.gather_s(4.0 * work.model.layers * block_matrix_parameters(work.model))
    if not offload:
        return seconds, 0.0
    together = min(links.ranks, links.per_machine)
    on_host = moved * together / HOST_BANDWIDTH
    # A micro-batch brings weights up twice and gradients down once.
    return on_host, accumulation * 3 * 4.0 * parameters / links.ranks / gpu.host_link


def _muon(gpu: Gpu, work: Work) -> float:
    """Seconds of five Newton-Schulz steps for each matrix (Jordan et al. 2024): X Xᵀ, its square, and times X.

    Every rank makes them for all matrices.
    """
    flops = 0.0
    for rows, columns in work.block_shapes():
        short, long = min(rows, columns), max(rows, columns)
        flops += 5 * (4 * short * short * long + 2 * short**3)
    return work.model.layers * flops / (gpu.bf16_flops * gpu.matmul_share)
