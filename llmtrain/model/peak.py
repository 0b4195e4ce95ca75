"""The most that a rank holds at once: the model's own memory and its activations, moment by moment.

What is never there together must not be added: gradients grow while activations shrink, logits are gone before the
blocks' backward pass begins, and an update has no activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config import ModelSection, RunConfig, default_ff_dim
from llmtrain.model.activations import Activations, activation_memory
from llmtrain.model.cost import block_matrix_parameters, parameter_count
from llmtrain.model.limits import BATCH_NUMEL
from llmtrain.model.memory import REDUCE_BUCKET, EngineName, Offload, largest_matrix, rank_memory


@dataclass(frozen=True)
class PeakMemory:
    """Bytes on the device at the moments of a step at which most may be held, and which parts activations have."""

    moments: dict[str, float]
    activations: Activations
    casts: float  # of the blocks' matrices, in bf16, where most of them are there

    @property
    def moment(self) -> str:
        """When most is held."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def bytes(self) -> float:
        """The most that is held."""
        return self.moments[self.moment]


def peak_memory(
    config: ModelSection,
    seq_len: int,
    micro_batch: int,
    *,
    engine: EngineName = "single",
    world_size: int = 1,
    optimizer: str = "adamw",
    offload: Offload = "none",
    precision: str = "bf16",
    checkpointing: str = "none",
    accumulates: bool = True,
    device: str = "cuda",
    compiled: bool = False,
) -> PeakMemory:
    """The most that a rank's device holds during a step after the first; the arguments are those of `rank_memory` and
    `activation_memory`, with their limits.

    It is what tensors take. A GPU's allocator rounds each up to 512 bytes, and libraries have workspaces (cuBLAS 32 MB
    on a Hopper): some tens of MB more.
    """
    assert config.vocab_size is not None
    # Casts are added below, when they are there; so the model's own memory is asked for without.
    model = rank_memory(
        engine, config, seq_len, world_size=world_size, optimizer=optimizer, offload=offload, precision="fp32",
        accumulates=accumulates,
    )  # fmt: skip
    # On one device, and under ZeRO-1, the gradients of a step's only micro-batch are made one after the other; else
    # they, or the buckets in which they will lie, are there all the time.
    grown = model.gradients if engine in ("single", "zero1") and not accumulates else 0.0
    bf16, block = precision == "bf16", 4.0 * block_matrix_parameters(config)
    # Eager ZeRO-3 casts again for the backward pass. Of what is compiled, see `auto_compiles`.
    keeps_casts = bf16 and (checkpointing == "none" if compiled else engine != "zero3")
    largest = 4.0 * largest_matrix(config)
    # ZeRO-3 lets go of a block's gradients together, as of its weights.
    made_at_once = block if compiled or engine == "zero3" else largest
    weights = _Weights(
        state=model.device - model.exchange - grown,
        exchange=model.exchange,
        is_sent_at_the_end=parameter_count(config, seq_len) <= REDUCE_BUCKET,
        grown=grown,
        head=4.0 * config.vocab_size * config.dim,
        block=block,
        gradients=made_at_once + bf16 * largest / 2,
        tied=config.tie_embeddings,
        bf16=bf16,
        casts=config.layers * block / 2 * keeps_casts,
        cast=block / 2 * (bf16 and (compiled or keeps_casts)),
    )
    parts = activation_memory(config, seq_len, micro_batch, precision, checkpointing, device=device, compiled=compiled)
    moments = _forward(weights, parts) | _backward(weights, parts, config.layers, checkpointing)
    product = 2 if bf16 or device != "cpu" else 4  # bytes of a number in Muon's
    moments["update"] = weights.state + weights.exchange + grown + _update(config, optimizer, engine, product)
    return PeakMemory(moments, parts, max(weights.casts, weights.cast))


def peak_of_run(
    config: RunConfig, *, engine: EngineName = "single", world_size: int = 1, device: str = "cuda"
) -> PeakMemory:
    """`peak_memory` of a resolved config."""
    training = config.training
    return peak_memory(
        config.model, config.data.seq_len, training.micro_batch_size, engine=engine, world_size=world_size,
        optimizer=config.optimizer.name, precision=training.precision, checkpointing=training.activation_checkpointing,
        accumulates=training.global_batch_size > training.micro_batch_size * world_size, device=device,
        compiled=training.compile is True,
    )  # fmt: skip


@dataclass(frozen=True)
class _Weights:
    """Bytes of weights and what belongs to them, in float32."""

    state: float  # what is there all the time
    exchange: float  # taken while a bucket of gradients is sent
    is_sent_at_the_end: bool  # since one bucket holds them all
    grown: float  # gradients that are made one after the other; 0 where `state` has them
    head: float
    block: float  # all matrices of one
    gradients: float  # those that are being made, and cast: of the largest matrix, or of a compiled block
    tied: bool
    bf16: bool
    casts: float  # bf16 copies of all blocks' matrices, where they stay until the forward pass is over
    cast: float  # of one block's, in its backward pass


def _forward(weights: _Weights, parts: Activations) -> dict[str, float]:
    # Autocast has the casts of eager blocks, whatever is made again; see `auto_compiles` for others.
    return {"loss": weights.state + parts.kept + parts.output + weights.casts + parts.loss}


def _backward(weights: _Weights, parts: Activations, layers: int, checkpointing: str) -> dict[str, float]:
    state, grown, head = weights.state, weights.grown, weights.head
    cast, casts = weights.cast, weights.casts if checkpointing == "none" else 0.0  # autograd's, until they were used
    stream = parts.stream / layers
    in_a_block = parts.recomputed + parts.gradients + weights.gradients
    # A tied weight has two gradients. The head's waits for the embedding's, and autograd adds them in place only if the
    # first is no view, as it is after a float32 product. Where other micro-batches' gradients are, they wait, too.
    waiting = head * (weights.tied * (1 if weights.bf16 else 2) + (not grown))
    made = max(0.0, grown - weights.block - (0 if weights.tied else head))  # when it comes to the first block
    tied_head = head if weights.tied and not grown else 0.0
    sent = state if weights.is_sent_at_the_end else state + weights.exchange
    return {
        "backward of the loss": state + parts.kept + parts.output + casts + parts.loss_gradients,
        "backward of the final norm": state + parts.kept + parts.output - stream + casts + head
        + parts.output_gradients,
        "backward of the last block": sent + parts.kept + max(casts, cast) + head + in_a_block,
        "backward of the first block": sent + parts.kept / layers + cast + made + tied_head + in_a_block,
        "backward of the embedding": state + weights.exchange + grown + waiting + stream,
    }  # fmt: skip


def _update(config: ModelSection, optimizer: str, engine: EngineName, product: int) -> float:
    """What an optimizer takes for a while. Only Muon does; see llmtrain/optim/muon.py."""
    if optimizer != "muon":
        return 0.0
    ff_dim = config.ff_dim or default_ff_dim(config.dim, config.activation)
    members: dict[tuple[int, int], int] = {}
    ups = 3 if config.activation == "swiglu" else 2
    for other, count in ((config.query_width, 2), (config.key_width, 2), (ff_dim, ups)):
        shape = (min(config.dim, other), max(config.dim, other))
        members[shape] = members.get(shape, 0) + count * config.layers
    most = 0.0
    for (rows, columns), count in members.items():
        together = 1 if engine.startswith("zero") else min(count, max(1, BATCH_NUMEL // (rows * columns)))
        # Float32: moved momenta, directions, directions as one, and the result. In the products' type: the argument of
        # a step and two square ones.
        most = max(most, together * rows * (columns * (16.0 + product) + 2 * product * rows))
    return most
