"""Bytes that training holds, as formulas: for the model itself by each engine, and with activations at each moment.

What is held for the model itself comes first, in the notation of ZeRO (Rajbhandari et al. 2020, section 3.1): weights,
gradients and optimizer states; section 5 cuts the last two (stages 1 and 2) and the weights (stage 3) over the ranks,
6.2 speaks of buffers. Where the paper has bf16 weights beside float32 masters, here all is float32, and so the paper's
"2 + 2 + 12 bytes" for Adam become 4 + 4 + 8. What DeepSpeed holds beyond the paper is read in deepspeed 0.19.8,
runtime/zero/stage_1_and_2.py and stage3.py; tests/model/test_memory.py measures it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llmtrain.config import ModelSection, default_ff_dim
from llmtrain.model.cost import bias_parameters, block_matrix_parameters, norm_parameters, parameter_count

EngineName = Literal["single", "ddp", "zero1", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "parameters"]  # `parameters`: both, as launch/zero3-offload.yaml does

# In values, of four bytes each here. DeepSpeed's own bucket of gradients, 5e8 values, is meant for two bytes each: it
# would hold 2 GB of every GPU. The rest are its defaults (runtime/zero/config.py).
REDUCE_BUCKET = 100_000_000
PREFETCH_BUCKET = 50_000_000
MOST_LIVE = 1_000_000_000


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank holds at most, by part, without activations; for what each part is see `rank_memory`."""

    weights: float = 0
    masters: float = 0
    gradients: float = 0
    optimizer: float = 0
    casts: float = 0
    gathered: float = 0
    buffers: float = 0
    exchange: float = 0  # taken only while a full bucket of gradients is sent
    host: float = 0  # in the memory of the machine, for each rank on it

    @property
    def device(self) -> float:
        """All that lies on the device."""
        model = self.weights + self.masters + self.gradients + self.optimizer
        return model + self.casts + self.gathered + self.buffers + self.exchange


def auto_compiles(*, cuts_weights: bool, checkpointing: str) -> bool:
    """Whether `training.compile: auto` may mean yes, where the machine can.

    A compiled block keeps the bf16 casts of its weights from its forward to its backward pass: on every rank those of
    all blocks, which an engine that cuts weights (ZeRO-3) is to avoid. Where it recomputes, it makes them anew.
    """
    return not cuts_weights or checkpointing != "none"


def optimizer_values(optimizer: str, config: ModelSection, seq_len: int) -> int:
    """Float32 values that an optimizer keeps for the whole model.

    SGD keeps a momentum, Adam and AdamW two moments (Kingma and Ba 2015); Muon a momentum for the matrices of the
    blocks, and AdamW's two for all else.
    """
    parameters = parameter_count(config, seq_len)
    matrices = config.layers * block_matrix_parameters(config)
    return {"sgd": parameters, "muon": 2 * parameters - matrices}.get(optimizer, 2 * parameters)


def largest_matrix(config: ModelSection) -> int:
    """Values of the feed-forward's matrices, each."""
    return config.dim * (config.ff_dim or default_ff_dim(config.dim, config.activation))


def rank_memory(
    engine: EngineName,
    config: ModelSection,
    seq_len: int,
    *,
    world_size: int = 1,
    optimizer: str = "adamw",
    offload: Offload = "none",
    precision: str = "bf16",
    accumulates: bool = True,
) -> RankMemory:
    """Bytes that a rank holds at most while it trains, without activations.

    - `weights`: float32, what the model computes with; cut over the ranks by ZeRO-3.
    - `masters`: float32, this rank's part of the copy that ZeRO updates; one device and DDP update the weights
      themselves. (ZeRO-3 would do so where its weights are float32, but compares their device with the name of one,
      which are never equal: `_create_fp32_partitions`.)
    - `gradients`: float32; whole, or this rank's part. ZeRO-2 holds the sum so far beside what a micro-batch adds.
    - `optimizer`: see `optimizer_values`; all ZeRO stages cut it.
    - `casts`: under bf16 autocast, the bf16 copies of matrices from a forward pass to its backward pass, as far as they
      are there when most is held: without accumulation gradients take their place. ZeRO-3 casts once more for the
      backward pass instead (deepspeed runtime/zero/linear.py).
    - `gathered`: ZeRO-3, parameters that are whole for a while, in float32: those that are needed again soon, those
      fetched ahead and the block that is computed, MOST_LIVE or three blocks; and small ones, always.
    - `buffers`: DDP has buckets for all gradients. Those of a step's only micro-batch lie in them from the start
      (`gradient_as_bucket_view`), sums of several only when they are exchanged. ZeRO copies gradients into a bucket
      that is REDUCE_BUCKET long however small the model is.
    - `exchange`: stages 2 and 3 put what is in the bucket in another order before they send it, and a gradient that is
      longer, too.
    - `host`: what offload moves there, and what the exchange with the device needs.

    Args:
        engine: the launch files' names.
        config: with `vocab_size` set.
        seq_len: tokens in a sequence.
        world_size: ranks that share the model.
        optimizer: `optimizer.name`.
        offload: what lies in the memory of the host.
        precision: `bf16` or `fp32`.
        accumulates: whether a step has more than one micro-batch on each rank.
    """
    assert config.vocab_size is not None
    whole, head = 4.0 * parameter_count(config, seq_len), config.vocab_size * config.dim
    casts = 2.0 * (config.layers * block_matrix_parameters(config) + head) if precision == "bf16" else 0.0
    sizes = _Sizes(
        whole=whole,
        part=whole / world_size,
        state=4.0 * optimizer_values(optimizer, config, seq_len) / (world_size if engine.startswith("zero") else 1),
        casts=casts if accumulates or engine in ("ddp", "zero2") else 0.0,
        largest=4.0 * max(head, largest_matrix(config), config.dim * config.query_width),
        small=4.0 * (norm_parameters(config) + bias_parameters(config)),
        block=4.0 * block_matrix_parameters(config),
    )
    if engine == "zero3":
        return _zero3(sizes, offload)
    if engine in ("zero1", "zero2"):
        return _zero12(engine, sizes, offload, accumulates)
    return RankMemory(whole, 0, whole, sizes.state, sizes.casts, buffers=whole * (engine == "ddp" and accumulates))


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what is held, in float32 but for `casts`."""

    whole: float  # the parameters
    part: float  # a rank's share of them
    state: float  # what the optimizer keeps on a rank
    casts: float
    largest: float  # parameter
    small: float  # parameters together
    block: float  # the matrices of one


def _zero12(engine: EngineName, sizes: _Sizes, offload: Offload, accumulates: bool) -> RankMemory:
    """Stages 1 and 2 (ZeRO, sections 5.1 and 5.2; offload: ZeRO-Offload, Ren et al. 2021)."""
    whole, part, bucket, casts = sizes.whole, sizes.part, 4.0 * REDUCE_BUCKET, sizes.casts
    gradients, sums = whole, 0.0
    exchanged = 0.0  # what is taken for a while when a bucket is full; all gradients may fit in one
    if engine == "zero2":
        gradients, sums = part, part if accumulates else 0.0
        exchanged = min(whole, max(bucket, sizes.largest))
        # By then the backward pass is over for what is in the bucket, and its casts are gone.
        casts = max(casts - exchanged, casts * (1 - exchanged / whole))
    if offload != "none":
        # On the host: masters, their gradients, and the copy through which weights return; and sums of micro-batches.
        host = 3 * part + sums + sizes.state + sizes.largest
        gradients = whole if engine == "zero1" else 0.0
        buffers = bucket + sizes.largest
        return RankMemory(whole, gradients=gradients, casts=casts, buffers=buffers, exchange=exchanged, host=host)
    if engine == "zero2" and whole <= bucket:
        exchanged -= part  # the part is taken out when the exchange is over; else after the first bucket
    return RankMemory(whole, part, gradients + sums, sizes.state, casts, buffers=bucket, exchange=exchanged)


def _zero3(sizes: _Sizes, offload: Offload) -> RankMemory:
    """Stage 3 (ZeRO, section 5.3; offload: ZeRO-Infinity, Rajbhandari et al. 2021, section 5)."""
    part, bucket = sizes.part, 4.0 * REDUCE_BUCKET
    gathered = min(sizes.whole, max(4.0 * MOST_LIVE, 3 * sizes.block) + sizes.small)
    held = RankMemory(gathered=gathered, buffers=bucket, exchange=min(sizes.whole, max(bucket, sizes.largest)))
    if offload == "none":
        return replace(held, weights=part, masters=part, gradients=part, optimizer=sizes.state)
    # On the host: masters, their gradients, and the sums of gradients that become them.
    host = 3 * part + sizes.state
    if offload == "optimizer":
        return replace(held, weights=part, host=host)
    return replace(held, host=host + part)
