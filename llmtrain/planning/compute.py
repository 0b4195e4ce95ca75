"""Seconds that one rank computes, without any exchange: products, attention, and what only moves memory.

A product takes as long as its FLOPs at the rate that products reach in training, or as its operands take to be read and
written, whichever is longer (the roofline of Williams et al. 2009). Tiles of 128 × 128 are dealt out to the
multiprocessors in waves, of which the last may not be full. All else is bound by memory: for operators one by one its
bytes are those that a block of this model reads and writes (tests/planning/test_compute.py counts them), compiled they
are what is left if all between two products is one kernel.

SUSTAINED was set by a published throughput: one row of one machine (docs/plan.md), for every other. KERNEL_S and the
bytes of compiled blocks are estimates; the rest is counted or quoted, as is said beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.config import ModelSection, default_ff_dim
from llmtrain.model.cost import block_matrix_parameters
from llmtrain.planning.hardware import Gpu

SUSTAINED = 0.80  # of the best product's rate, by a model's products in a long run
MEMORY_SHARE = 0.85  # of the nominal bandwidth, by kernels that only stream (BabelStream, Deakin et al. 2018)
TILE = 128
# Scores of so many tokens go at half the rate of long sequences: FlashAttention-2's figures with a causal mask, from
# 512 tokens on (Dao 2023, figures 4 to 7).
HALF_RATE_TOKENS = 512
KERNEL_S = 6e-6  # for which the host is busy with one operator, about: PyTorch's dispatch and autograd, and the launch
# Beside a forward pass: counted in blocks of this model, 1.5 to 1.75 of its bytes and 1.45 of its operators.
BACKWARD_BYTES, BACKWARD_KERNELS = 1.7, 1.45
ROPE_BYTES = 37  # for each number of queries and keys: two products, a turned copy, a sum, and the cast of it


@dataclass(frozen=True)
class Work:
    """What a rank computes for one micro-batch."""

    model: ModelSection  # with vocab_size
    seq_len: int
    micro_batch: int  # sequences
    bf16: bool = True
    checkpointing: str = "none"
    compiled: bool = False
    stream_bytes: int = 4  # of a number of the residual stream; this model's is float32
    fused_norm: bool = True
    rope_bytes: int = ROPE_BYTES  # where it is not compiled
    remade_products: float | None = None  # share of the blocks' products that selective checkpointing makes again; 0

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return self.micro_batch * self.seq_len

    @property
    def remade(self) -> tuple[float, float]:
        """Shares of forward products and of attention that are made again."""
        if self.checkpointing == "full":
            return 1.0, 1.0
        return (self.remade_products or 0.0, 0.0) if self.checkpointing == "selective" else (0.0, 0.0)

    def block_shapes(self) -> list[tuple[int, int]]:
        """Width of the result and of the input of each product in a block."""
        model = self.model
        queries, keys = model.query_width, model.key_width
        ff_dim = model.ff_dim or default_ff_dim(model.dim, model.activation)
        ups = 2 if model.activation == "swiglu" else 1
        return [
            (queries, model.dim), (keys, model.dim), (keys, model.dim), (model.dim, queries),
            *[(ff_dim, model.dim)] * ups, (model.dim, ff_dim),
        ]  # fmt: skip


@dataclass(frozen=True)
class Seconds:
    """Of one micro-batch on one rank, by what takes them; `host` in the place of all, where the host is slower."""

    products: float
    attention: float
    memory: float
    forward_share: float  # of all of them
    host: float

    @property
    def total(self) -> float:
        """Until the device is done."""
        return max(self.products + self.attention + self.memory, self.host)

    @property
    def forward(self) -> float:
        """Without what is made again."""
        return self.total * self.forward_share

    @property
    def backward(self) -> float:
        """With what is made again."""
        return self.total - self.forward


def compute_seconds(gpu: Gpu, work: Work, clock: float = 1.0) -> Seconds:
    """Seconds of a micro-batch.

    Args:
        gpu: the kind.
        work: what is to be done.
        clock: of the multiprocessors, beside the usual one; see `clock_at`.
    """
    products = _Products(gpu, work, clock)
    blocks = products.blocks
    head = products.both(work.model.vocab_size or 0, work.model.dim)
    again, attention_again = work.remade
    attention = _attention_forward(gpu, work, clock)
    bandwidth = gpu.memory_bandwidth * MEMORY_SHARE
    streamed = work.model.layers * work.tokens * _block_bytes(work) / bandwidth
    # Weights are cast for each micro-batch (6 bytes each), and their gradients cast and added up (14).
    matrices = work.model.layers * block_matrix_parameters(work.model) + (work.model.vocab_size or 0) * work.model.dim
    casts = matrices * (20 if work.bf16 else 12) / bandwidth
    # Logits, and their cast, softmax, gradient, and its cast: read and written.
    logits = work.tokens * (work.model.vocab_size or 0) * (30 if work.bf16 else 28) / bandwidth
    # Backward is two products for each, five for attention's two (Dao 2023, section 3.1), twice the reads and writes.
    forward = blocks + head + attention + streamed + (casts + logits) / 3
    # What is made again is a forward pass of operators between products, whatever is kept of the products.
    remakes = work.checkpointing != "none"
    total_products = (3 + again) * blocks + 3 * head
    total_attention = (3.5 + attention_again) * attention
    moved = (1 + BACKWARD_BYTES + remakes) * streamed + casts + logits
    host = work.model.layers * _kernels(work) * (1 + BACKWARD_KERNELS + remakes) * KERNEL_S
    whole = total_products + total_attention + moved
    return Seconds(total_products, total_attention, moved, forward / whole, host)


def clock_at(watts: float, nominal_watts: float) -> float:
    """Clock under a limit of power, beside the usual one: power goes with its third power (f × V², V with f)."""
    return min(1.0, math.cbrt(watts / nominal_watts))


class _Products:
    def __init__(self, gpu: Gpu, work: Work, clock: float):
        peak = gpu.bf16_flops if work.bf16 else gpu.float32_flops
        self._rate = peak * gpu.matmul_share * SUSTAINED * clock
        self._gpu, self._size, self._tokens = gpu, 2 if work.bf16 else 4, work.tokens
        self.blocks = work.model.layers * sum(self.both(*shape) for shape in work.block_shapes())

    def both(self, rows: int, columns: int) -> float:
        """A third of the seconds of a product and the two of its backward pass."""
        tokens = self._tokens
        triples = ((tokens, rows, columns), (tokens, columns, rows), (rows, columns, tokens))
        return sum(self._seconds(*triple) for triple in triples) / 3

    def _seconds(self, rows: int, columns: int, inner: int) -> float:
        waves = math.ceil(rows / TILE) * math.ceil(columns / TILE) / self._gpu.multiprocessors
        full = waves / math.ceil(waves)
        if waves < 1:  # then the inner side is cut as well, and the parts are added up
            full = min(1.0, waves * max(1, inner // (4 * TILE)))
        moved = self._size * (rows * inner + inner * columns + rows * columns)
        return max(
            2 * rows * columns * inner / (self._rate * full), moved / (self._gpu.memory_bandwidth * MEMORY_SHARE)
        )


def _attention_forward(gpu: Gpu, work: Work, clock: float) -> float:
    """Seconds of all layers' scores and sums forward, of which a causal mask leaves half."""
    model, positions = work.model, (work.seq_len + 1) / 2
    flops = 2 * 2 * model.layers * work.tokens * positions * model.query_width
    rate = gpu.bf16_flops * gpu.attention_share if work.bf16 else gpu.float32_flops / 2
    return flops / (rate * clock * work.seq_len / (work.seq_len + HALF_RATE_TOKENS))


def _block_bytes(work: Work) -> float:
    """Bytes that a block reads and writes for each token forward, beside products and attention."""
    model, stream = work.model, work.stream_bytes
    product = 2 if work.bf16 else 4
    dim, ff_dim = model.dim, model.ff_dim or default_ff_dim(model.dim, model.activation)
    turned = model.query_width + model.key_width
    gated = model.activation == "swiglu"
    rotary = model.positions == "rope"
    if work.compiled:
        # Twice: stream and the branch's result read, the sum and its norm written.
        norms = 2 * dim * (2 * stream + 2 * product)
        return norms + (rotary or model.qk_norm) * 2 * product * turned + (3 if gated else 2) * product * ff_dim
    # Not fused: cast, square, mean, scale, cast and weight one by one, in float32 (36 bytes for a number of 2).
    norms = 2 * dim * (2 * stream if work.fused_norm else 32 + 2 * stream)
    if stream != product:  # autocast casts what each product reads: three in attention, one or two after it
        norms += (5 if gated else 4) * dim * (stream + product)
    residuals = 2 * dim * (2 * stream + product)
    # The norm of queries and keys is float32, and so is what is turned after it: 10 bytes more for each number.
    turning = (rotary * (work.rope_bytes + 10 * model.qk_norm) + 24 * model.qk_norm) * turned
    passes = {"swiglu": 5, "relu2": 4, "gelu": 2}[model.activation]
    return norms + residuals + turning + passes * product * ff_dim


def _kernels(work: Work) -> int:
    """Operators of a block forward, counted in one of this model; compiled: one between two products."""
    model = work.model
    if work.compiled:
        return 2 * len(work.block_shapes()) + 1
    return (
        22
        + {"swiglu": 4, "relu2": 1, "gelu": 0}[model.activation]
        + 12 * (model.positions == "rope")
        + 7 * model.qk_norm
        + 3 * model.qkv_bias  # the cast of each
    )
