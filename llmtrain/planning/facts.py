"""The whole plan as plain facts: what `plan --json` prints, and what its tables show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llmtrain.config import RunConfig
from llmtrain.errors import UserError, nearest
from llmtrain.model.cost import (
    bias_parameters,
    block_matrix_parameters,
    flops_per_token,
    norm_parameters,
    parameter_count,
)
from llmtrain.planning.budget import checkpoint_cost, checkpoints_kept, compute_optimal, planned_tokens
from llmtrain.planning.hardware import Gpu
from llmtrain.planning.layout import (
    ENGINES,
    Layout,
    Outcome,
    Run,
    engines_for,
    fastest,
    largest_micro_batch,
    memory_of,
    micro_batches,
    nearest_micro_batch,
    outcome_of,
    why,
)
from llmtrain.resolve import resolve

ASSUMED_VOCABULARY = 50_304  # GPT-2's, padded to a multiple of 128
SCALING = tuple(2**power for power in range(14))  # 1 to 8,192 GPUs
Facts = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the config."""

    gpu: Gpu
    gpus: int
    per_machine: int
    engine: str | None  # None: the one that is recommended
    tokens: int | None  # None: what the config says
    price_per_gpu_hour: float | None
    disk: float  # bytes/s
    network: float | None  # bytes/s for each GPU
    search: bool


def plan(config: RunConfig, asked: Asked) -> Facts:
    """Plan a run.

    Raises:
        UserError: the batch does not divide by the GPUs, the engine is not known or not for so many GPUs, or values
            contradict the data.
        CorruptError: the data's manifest is damaged.
    """
    notes: list[str] = []
    compile_blocks = config.training.compile  # what `auto` means depends on the layout
    config, data_tokens = _resolved(config, notes)
    _check(config, asked)
    if asked.network is None and not asked.gpu.has_nvlink and asked.gpus > asked.per_machine:
        notes.append("between machines 25 Gb/s for each GPU are assumed; --network-gbps says otherwise")
    run = _run(config, asked, compile_blocks)
    tokens, source = (asked.tokens, "--tokens") if asked.tokens else planned_tokens(config, data_tokens)
    chosen, best = _choose(config, run, asked, notes)
    # The fastest layout may have other micro-batches and checkpointing than the config.
    length = _length(config, chosen, tokens, source, asked)
    return {
        "config": _config_facts(config),
        "gpu": _gpu_facts(asked),
        "parameters": _parameters(config),
        "flops_per_token": _flops(config),
        "memory": _memory(config, run, asked),
        "layout": _layout_facts(chosen),
        "engine_why": why(run, best) if best else _nothing_fits(run),
        "run": length,
        "checkpoint": _checkpoint(config, chosen, asked, length["steps"]),
        "optimal": _optimal(config, tokens),
        "fastest": _layout_facts(best) | _length(config, best, tokens, source, asked) if best else None,
        "search": _search(config, run, asked, tokens, _counts_up_to(asked.gpus)) if asked.search else None,
        "scaling": _search(config, run, asked, tokens, SCALING),
        "notes": notes,
    }


def _resolved(config: RunConfig, notes: list[str]) -> tuple[RunConfig, int | None]:
    """The config with what the data decides, and the tokens of the training split, if it is prepared."""
    vocabulary, tokens = 0, 0
    for path in config.data.paths:
        if "://" in path or not Path(path, "manifest.json").is_file():
            vocabulary = 0
            break
        from llmtrain.data.shards import read_manifest

        manifest = read_manifest(Path(path))
        vocabulary = max(vocabulary, manifest.tokenizer.vocab_size)
        tokens += manifest.splits["train"].tokens if "train" in manifest.splits else 0
    if not vocabulary and not config.model.vocab_size:
        notes.append(
            f"{config.data.where}: not prepared here, so a vocabulary of {ASSUMED_VOCABULARY:,} is assumed; "
            "model.vocab_size=N says otherwise"
        )
    known = vocabulary or config.model.vocab_size or ASSUMED_VOCABULARY
    if config.training.fp8:
        notes.append("training.fp8 is not in the formulas: times are those of bf16")
    if config.data.document_mask or config.data.packing == "best_fit":
        notes.append("documents apart are not in the formulas: attention counts as over whole windows")
    if config.model.dropout:
        notes.append("what dropout keeps aside is not in the formulas")
    resolved = resolve(config, vocab_size=known, world_size=1, bf16_native=True, compile_auto=True)
    return resolved, tokens if vocabulary else None


def _check(config: RunConfig, asked: Asked) -> None:
    batch = config.training.global_batch_size
    if batch % asked.gpus:
        together = asked.gpus * config.training.micro_batch_size
        fitting = [count for count in range(1, asked.gpus) if batch % count == 0]
        raise UserError(
            f"training.global_batch_size {batch} is not divisible by {asked.gpus} GPUs; --gpus {fitting[-1]} fits, or "
            f"training.global_batch_size={-(-batch // together) * together}"
        )
    if asked.engine is None:
        return
    if asked.engine not in ENGINES:
        raise UserError(f"--engine '{asked.engine}' is not known: {nearest(asked.engine, list(ENGINES))}")
    if asked.engine == "single" and asked.gpus > 1:
        raise UserError(f"--engine single is for one GPU, not {asked.gpus}; choose ddp or one of zero1 to zero3")


def _run(config: RunConfig, asked: Asked, compile_blocks: bool | Literal["auto"]) -> Run:
    return Run(
        config.model, config.data.seq_len, config.training.global_batch_size, config.optimizer.name,
        config.training.precision, compile_blocks, asked.gpu, asked.per_machine, asked.network,
    )  # fmt: skip


def _choose(config: RunConfig, run: Run, asked: Asked, notes: list[str]) -> tuple[Outcome, Outcome | None]:
    """The config's own layout on the engine that was asked for, or is the fastest with it; and the fastest of all."""
    training = config.training
    micro = nearest_micro_batch(run, asked.gpus, training.micro_batch_size)
    if micro != training.micro_batch_size:
        notes.append(
            f"micro_batch_size {training.micro_batch_size} × {asked.gpus} GPUs does not divide the global batch of "
            f"{run.global_batch}: {micro} is planned"
        )
    engines = (asked.engine,) if asked.engine else engines_for(asked.gpus)
    own = [outcome_of(run, Layout(name, asked.gpus, micro, training.activation_checkpointing)) for name in engines]
    fitting = [outcome for outcome in own if outcome.fits]
    # Where none fits, the one that comes nearest.
    chosen = (
        max(fitting, key=lambda outcome: outcome.tokens_per_second)
        if fitting
        else min(own, key=lambda outcome: outcome.memory.peak)
    )
    return chosen, fastest(run, asked.gpus, (asked.engine,) if asked.engine else None)


def _nothing_fits(run: Run) -> str:
    return f"nothing fits {run.gpu.memory / 1e9:.0f} GB: more GPUs (ZeRO-3 cuts all over them), or a smaller model"


def _config_facts(config: RunConfig) -> Facts:
    model, training = config.model, config.training
    return {
        "dim": model.dim, "layers": model.layers, "heads": model.heads, "vocab_size": model.vocab_size,
        "seq_len": config.data.seq_len, "global_batch_size": training.global_batch_size,
        "batch_tokens": training.global_batch_size * config.data.seq_len, "precision": training.precision,
        "optimizer": config.optimizer.name,
    }  # fmt: skip


def _gpu_facts(asked: Asked) -> Facts:
    gpu = asked.gpu
    return {
        "name": gpu.name, "count": asked.gpus, "per_machine": asked.per_machine, "memory_bytes": gpu.memory,
        "bf16_flops": gpu.bf16_flops, "memory_bandwidth": gpu.memory_bandwidth, "link_bandwidth": gpu.link,
        "network_bandwidth": gpu.network if asked.network is None else asked.network,
    }  # fmt: skip


def _parameters(config: RunConfig) -> Facts:
    model, seq_len = config.model, config.data.seq_len
    total = parameter_count(model, seq_len)
    blocks = model.layers * block_matrix_parameters(model) + bias_parameters(model)
    norms = norm_parameters(model)
    return {"total": total, "blocks": blocks, "norms": norms, "embeddings": total - blocks - norms}


def _flops(config: RunConfig) -> Facts:
    model, seq_len = config.model, config.data.seq_len
    return {
        "causal": flops_per_token(model, seq_len),
        "palm": flops_per_token(model, seq_len, causal=False),
        "6n": 6.0 * parameter_count(model, seq_len),
    }


def _memory(config: RunConfig, run: Run, asked: Asked) -> Facts:
    """By engine, with the config's micro-batch; `single` and `ddp` hold the same on any number of GPUs."""
    checkpointing = config.training.activation_checkpointing
    micro = nearest_micro_batch(run, asked.gpus, config.training.micro_batch_size)
    rows = {}
    for engine in ENGINES:
        gpus = 1 if engine == "single" else asked.gpus
        layout = Layout(engine, gpus, micro, checkpointing)
        memory = memory_of(run, layout)
        rows[engine] = {
            **asdict(memory),
            "fits": memory.peak <= run.gpu.memory,
            "largest_micro_batch": largest_micro_batch(run, engine, gpus, checkpointing),
        }
    return {"micro_batch_size": micro, "activation_checkpointing": checkpointing, "engines": rows}


def _layout_facts(outcome: Outcome) -> Facts:
    step = outcome.step
    return {
        **asdict(outcome.layout),
        "accumulation": outcome.accumulation,
        "fits": outcome.fits,
        "peak_bytes": outcome.memory.peak,
        "step_s": step.total,
        "step_parts_s": {name: seconds for name, seconds in asdict(step).items() if name != "hidden"},
        "hidden_exchange_s": step.hidden,
        "tokens_per_second": outcome.tokens_per_second,
        "tokens_per_second_per_gpu": outcome.tokens_per_second / outcome.layout.gpus,
        "mfu": outcome.mfu,
        "mfu_palm": outcome.mfu_palm,
    }


def _length(config: RunConfig, outcome: Outcome, tokens: int, source: str, asked: Asked) -> Facts:
    gpus = outcome.layout.gpus
    seconds = tokens / outcome.tokens_per_second
    hours = seconds * gpus / 3600
    price = asked.price_per_gpu_hour
    batch = config.training.global_batch_size * config.data.seq_len
    return {
        "tokens": tokens,
        "tokens_from": source,
        "steps": -(-tokens // batch),
        "flops": tokens * flops_per_token(config.model, config.data.seq_len),
        "seconds": seconds,
        "gpu_hours": hours,
        "price_per_gpu_hour": price,
        "cost": None if price is None else hours * price,
    }


def _checkpoint(config: RunConfig, outcome: Outcome, asked: Asked, steps: int) -> Facts:
    cost = checkpoint_cost(config, asked.disk, asked.gpu.host_link, outcome.layout.gpus)
    every = config.checkpoint.save_every
    return {
        **asdict(cost),
        "disk_bytes_per_second": asked.disk,
        "save_every": every,
        "seconds_between": None if every is None else every * outcome.step.total,
        "kept_bytes": cost.bytes * checkpoints_kept(config, steps),
    }


def _optimal(config: RunConfig, tokens: int) -> Facts:
    parameters = parameter_count(config.model, config.data.seq_len)
    optimum = compute_optimal(6.0 * parameters * tokens)
    return {
        "tokens_per_parameter": tokens / parameters,
        "tokens_for_this_size": 20 * parameters,
        "parameters_for_this_compute": optimum.parameters,
        "tokens_for_this_compute": optimum.tokens,
    }


def _counts_up_to(gpus: int) -> tuple[int, ...]:
    return tuple(sorted({*(count for count in SCALING if count < gpus), gpus}))


def _search(config: RunConfig, run: Run, asked: Asked, tokens: int, counts: tuple[int, ...]) -> list[Facts]:
    """The fastest layout that fits on each number of GPUs."""
    rows = []
    for gpus in counts:
        if not micro_batches(run, gpus):
            break  # more GPUs than sequences, or the batch does not divide
        engines = (asked.engine,) if asked.engine in engines_for(gpus) else engines_for(gpus)
        outcome = fastest(run, gpus, engines)
        if outcome is None:
            rows.append({"gpus": gpus, "fits": False})
        else:
            rows.append(_layout_facts(outcome) | _length(config, outcome, tokens, "", asked))
    return rows
