"""Ways to lay a run out over GPUs: what each holds, how fast it is, and which of those that fit is the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import ModelSection
from llmtrain.model.cost import flops_per_token, model_flops_utilization
from llmtrain.model.memory import EngineName, Offload, auto_compiles, rank_memory
from llmtrain.model.peak import peak_memory
from llmtrain.planning.communication import links_between
from llmtrain.planning.compute import Work
from llmtrain.planning.hardware import Gpu
from llmtrain.planning.step_time import Step, step_seconds

# As the launch files are called, from the one that exchanges least to the one that holds least.
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3-offload")
CHECKPOINTING = ("none", "selective", "full")  # from the one that computes least to the one that holds least
MOST_MICRO_BATCH = 1 << 16  # sequences; more are not looked for
TIE = 0.1  # speeds that are closer than this, relatively, are within the error of the formulas


@dataclass(frozen=True)
class Run:
    """What is trained on what; the same for all layouts."""

    model: ModelSection  # with vocab_size
    seq_len: int
    global_batch: int  # sequences
    optimizer: str
    precision: str  # bf16 or fp32
    compile: bool | Literal["auto"]  # `training.compile`, on GPUs that can
    gpu: Gpu
    per_machine: int
    network: float | None = None  # bytes/s for each GPU; None: usual for the kind


@dataclass(frozen=True)
class Layout:
    """How a run is cut."""

    engine: str  # one of ENGINES
    gpus: int
    micro_batch: int
    checkpointing: str


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at most, by part; parts are not all there at once, so `peak` is less than their sum."""

    weights: float  # and float32 masters
    gradients: float
    optimizer: float
    casts: float  # of weights, in bf16
    activations: float
    logits: float
    buffers: float  # of exchanges, with what ZeRO-3 gathers
    host: float  # in the memory of the machine
    peak: float  # on the device
    moment: str  # at which it is held


@dataclass(frozen=True)
class Outcome:
    """What the formulas say of a layout."""

    layout: Layout
    memory: Memory
    fits: bool
    accumulation: int
    step: Step
    tokens_per_second: float
    mfu: float | None  # own count, attention as causal
    mfu_palm: float | None  # by PaLM's formula, which counts attention twice


def _stage(engine: str) -> tuple[EngineName, Offload]:
    if engine == "zero3-offload":
        return "zero3", "parameters"
    stage: dict[str, EngineName] = {
        "single": "single", "ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3",
    }  # fmt: skip
    return stage[engine], "none"


def is_compiled(run: Run, layout: Layout) -> bool:
    """Whether a run's blocks would be compiled in a layout."""
    if run.compile == "auto":
        cuts_weights = _stage(layout.engine)[0] == "zero3"
        return auto_compiles(cuts_weights=cuts_weights, checkpointing=layout.checkpointing)
    return run.compile


def memory_of(run: Run, layout: Layout) -> Memory:
    """Bytes of one rank."""
    engine, offload = _stage(layout.engine)
    compiled = is_compiled(run, layout)
    accumulates = run.global_batch > layout.micro_batch * layout.gpus
    peak = peak_memory(
        run.model, run.seq_len, layout.micro_batch, engine=engine, world_size=layout.gpus, optimizer=run.optimizer,
        offload=offload, precision=run.precision, checkpointing=layout.checkpointing, accumulates=accumulates,
        compiled=compiled,
    )  # fmt: skip
    own = rank_memory(
        engine, run.model, run.seq_len, world_size=layout.gpus, optimizer=run.optimizer, offload=offload,
        precision=run.precision, accumulates=accumulates,
    )  # fmt: skip
    parts = peak.activations
    return Memory(
        weights=own.weights + own.masters,
        gradients=own.gradients,
        optimizer=own.optimizer,
        casts=peak.casts if compiled else own.casts,
        activations=parts.kept + parts.output + parts.recomputed + parts.gradients,
        logits=max(parts.loss, parts.loss_gradients),
        buffers=own.buffers + own.exchange + own.gathered,
        host=own.host,
        peak=peak.bytes,
        moment=peak.moment,
    )


def fits(run: Run, layout: Layout) -> bool:
    """Whether a GPU holds what a rank needs."""
    return memory_of(run, layout).peak <= run.gpu.memory


def outcome_of(run: Run, layout: Layout) -> Outcome:
    """Say what a layout holds and how fast it is; its micro-batches must divide the global batch."""
    memory = memory_of(run, layout)
    accumulation, rest = divmod(run.global_batch, layout.micro_batch * layout.gpus)
    assert not rest
    engine, offload = _stage(layout.engine)
    compiled = is_compiled(run, layout)
    work = Work(
        run.model, run.seq_len, layout.micro_batch, bf16=run.precision == "bf16", checkpointing=layout.checkpointing,
        compiled=compiled,
    )  # fmt: skip
    links = links_between(run.gpu, layout.gpus, run.per_machine, run.network)
    step = step_seconds(
        run.gpu, links, engine, work, accumulation=accumulation, optimizer=run.optimizer, offload=offload != "none",
    )  # fmt: skip
    speed = run.global_batch * run.seq_len / step.total

    def share(causal: bool) -> float | None:
        flops = speed * flops_per_token(run.model, run.seq_len, causal=causal)
        return model_flops_utilization(flops, run.gpu.name, layout.gpus)

    return Outcome(layout, memory, memory.peak <= run.gpu.memory, accumulation, step, speed, share(True), share(False))


def micro_batches(run: Run, gpus: int) -> list[int]:
    """Those that divide a rank's share of the global batch, rising; none where the batch does not divide by ranks."""
    share, rest = divmod(run.global_batch, gpus)
    return [] if rest else [size for size in range(1, share + 1) if share % size == 0]


def nearest_micro_batch(run: Run, gpus: int, wanted: int) -> int:
    """The largest that divides a rank's share and is not above the wanted one; 0 where there is none."""
    return max((size for size in micro_batches(run, gpus) if size <= wanted), default=0)


def largest_micro_batch(run: Run, engine: str, gpus: int, checkpointing: str) -> int:
    """The largest that fits, whether or not it divides the global batch; 0 where not even one sequence does."""
    low, high = 0, 1
    while high <= MOST_MICRO_BATCH and fits(run, Layout(engine, gpus, high, checkpointing)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(run, Layout(engine, gpus, middle, checkpointing)):
            low = middle
        else:
            high = middle
    return low


def engines_for(gpus: int) -> tuple[str, ...]:
    """Those that make sense on so many: alone nothing is shared, together nothing is single."""
    return ("single", "zero3-offload") if gpus == 1 else ENGINES[1:]


def layouts(run: Run, gpus: int, engines: tuple[str, ...]) -> Iterator[Layout]:
    """All that fit, of some engines."""
    sizes = micro_batches(run, gpus)
    for engine in engines:
        for checkpointing in CHECKPOINTING:
            for size in sizes:
                layout = Layout(engine, gpus, size, checkpointing)
                if not fits(run, layout):
                    break  # larger ones do not, either
                yield layout


def fastest(run: Run, gpus: int, engines: tuple[str, ...] | None = None) -> Outcome | None:
    """The fastest layout that fits; of equals the first in the order of ENGINES. None: nothing fits."""
    found = [outcome_of(run, layout) for layout in layouts(run, gpus, engines or engines_for(gpus))]
    return max(found, key=lambda outcome: outcome.tokens_per_second, default=None)


def why(run: Run, chosen: Outcome) -> str:
    """In words, why this engine: what those that exchange less would need, or how much slower they are."""
    layout, gigabytes = chosen.layout, 1e9
    total = run.gpu.memory / gigabytes
    reasons = []
    for engine in engines_for(layout.gpus):
        if engine == layout.engine:
            break
        least = Layout(engine, layout.gpus, 1, "full")
        need = memory_of(run, least).peak / gigabytes
        if need > total:
            reasons.append(f"{engine} needs {need:,.0f} GB even with micro-batches of 1 and all recomputed")
        elif other := fastest(run, layout.gpus, (engine,)):
            slower = 1 - other.tokens_per_second / chosen.tokens_per_second
            error = ", less than the formulas' error" if slower < TIE else ""
            reasons.append(f"{engine} fits, and is {slower:.0%} slower{error}")
    held = f"it holds {chosen.memory.peak / gigabytes:,.1f} of {total:,.0f} GB"
    virtue = {
        "single": "one GPU holds all and exchanges nothing",
        "ddp": "a GPU holds the whole state, and gradients are exchanged once a step, while the backward pass runs",
        "zero1": "the optimizer is cut over the ranks; gradients are exchanged once a step",
        "zero2": "gradients and the optimizer are cut over the ranks",
        "zero3": "weights are cut over the ranks as well, and gathered block by block while others are computed",
        "zero3-offload": "the state lies in the memory of the machine, and the GPU's link to it sets the speed",
    }[layout.engine]
    return "; ".join([f"{layout.engine}: {virtue}; {held}", *reasons])
