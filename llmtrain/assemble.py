"""From a config to what a training step needs: data, windows, batch layout, engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrain.compiling import settle_compile, settle_flex
from llmtrain.config import RunConfig
from llmtrain.data.batches import Layout, Order, Windows, WindowSet
from llmtrain.data.documents import with_mask
from llmtrain.data.mixture import Stage, plan_stages, samples_per_epoch
from llmtrain.data.packed import PackedWindows
from llmtrain.data.sources import TrainingData, doubts, fetch_data, make_order, open_data, weights_from
from llmtrain.engine import Engine, refuse_contradictions
from llmtrain.engine.device import computes_bf16_natively, free_memory, pick_device
from llmtrain.errors import UserError
from llmtrain.health.agreement import patiently, require_agreement, together
from llmtrain.model.cost import flops_per_token
from llmtrain.model.transformer import Transformer
from llmtrain.model.undrawn import Undrawn
from llmtrain.resolve import resolve


@dataclass(frozen=True)
class Assembly:
    """Everything that is fixed for one launch."""

    config: RunConfig  # resolved
    data: TrainingData
    train: WindowSet
    val: dict[str, Windows]  # by source
    sets: dict[str, Windows]  # of data.validation, by name
    layout: Layout
    engine: Engine
    warnings: list[str]  # differences between the ranks that do not make the run wrong
    packing: str  # digest of what packed windows are made of; empty: they are not packed

    def stages(self, past: Sequence[Stage] = (), step: int = 0, position: int = 0) -> list[Stage]:
        """Of a mixture: those past, and those to come seen from `step` steps that consumed `position` samples."""
        if not self.config.data.sources:
            return []
        after = partial(self.layout.position_after, position)
        begin = self.layout.begin_of_batch(position)
        return plan_stages(past, weights_from(self.config.data), step, begin, after)

    def order(self, stages: Sequence[Stage] | None = None) -> Order:
        """The order of the training windows; by default that of a new run."""
        return make_order(self.train, self.config.run.seed, self.stages() if stages is None else stages)

    @property
    def judges(self) -> dict[str, Windows]:
        """What `val_loss` is of: the validation splits of the sources; where none has any, the first set."""
        return self.val or dict(list(self.sets.items())[:1])

    def measure(self, total_steps: int) -> list[Any]:
        """What makes one `val_loss` comparable with another, as a checkpoint remembers it."""
        only_sets = [] if self.val else [*self.judges, *(one.fingerprint() for one in self.data.sets[:1])]
        return [self.last_weights(total_steps), self.config.data.document_mask, *only_sets]

    def last_weights(self, total_steps: int) -> dict[str, float]:
        """By source, those of the last of so many steps."""
        weights = [source.weight_after(total_steps - 1) for source in self.config.data.sources or ()] or [1.0]
        return dict(zip(self.config.data.names, weights, strict=True))

    def total_steps(self, step: int = 0, position: int = 0) -> int:
        """Optimizer steps of the whole run, seen from `step` steps that consumed `position` samples."""
        training = self.config.training
        if training.max_steps:
            return training.max_steps
        if training.max_tokens:
            targets, windows = self._targets_in_windows()
            samples = -(-training.max_tokens * windows // targets)
        else:
            samples = training.epochs * self.layout.windows
        return step + self.layout.steps_to(position, samples)

    def _targets_in_windows(self) -> tuple[int, int]:
        """So many targets are in so many windows."""
        if isinstance(self.train, PackedWindows):
            return self.train.targets, len(self.train)
        return self.train.seq_len, 1

    @property
    def targets_of_a_window(self) -> float:
        """On average."""
        targets, windows = self._targets_in_windows()
        return targets / windows

    def flops_per_token(self, *, causal: bool = True) -> float:
        """To train on one token; of attention within documents no more than is done. `causal`: see `cost`.

        In pieces of unequal length a token looks at more others on average than in as many equal ones; so these are
        counted. Windows cut at the ends of documents and at their own.
        """
        length = float(self.train.seq_len)
        if causal and isinstance(self.train, PackedWindows):
            length = self.train.targets / self.train.pieces
        elif causal and self.config.data.document_mask:
            length = self.data.mean_piece(self.train.seq_len)
        return flops_per_token(self.config.model, length, causal=causal)


def assemble(
    config: RunConfig, engine: Engine, *, is_drawn: bool = True, is_told: Callable[[], bool] = lambda: False
) -> Assembly:
    """Open the data, resolve the config against it and this machine, let the engine build a fresh model.

    Args:
        config: as it was read.
        engine: what is to run it.
        is_drawn: give the weights their first values; not where a checkpoint brings all of them.
        is_told: whether this rank was told to stop, which is asked while data are fetched.

    Raises:
        UserError: the data cannot be used, the config contradicts it, or the ranks do not agree; the same on all ranks.
    """
    folders = patiently(engine, lambda: fetch_data(config.data), is_told)
    data = together(engine, lambda: open_data(config.data, folders))
    compiled, warnings = settle_compile(config, engine, data.tokenizer.vocab_size, data.train_tokens)
    config, val = together(engine, lambda: _settle(data, config, engine.world_size, compiled))
    seq_len = config.data.seq_len
    train: WindowSet
    if config.data.packing == "best_fit":
        train = patiently(engine, lambda: data.packed_windows(seq_len), is_told)
    else:
        train = together(engine, lambda: data.train_windows(seq_len, config.data.stride or seq_len))
    sets = together(engine, lambda: data.set_windows(config.data.seq_len))
    packing = train.digest() if isinstance(train, PackedWindows) else ""
    fingerprint = data.fingerprint() + packing + data.fingerprint_of_sets()
    warnings += [*require_agreement(engine, config, fingerprint), *doubts(config, val)]
    end = together(engine, lambda: data.document_end(val)) if config.data.document_mask else None
    layout = Layout(
        windows=samples_per_epoch(train, config.training.global_batch_size),
        global_batch=config.training.global_batch_size,
        micro_batch=config.training.micro_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    flex, doubt = settle_flex(config, engine)
    warnings += doubt
    torch.manual_seed(config.run.seed)
    with nullcontext() if is_drawn else Undrawn():
        engine.build(
            lambda: Transformer(
                config.model, config.data.seq_len, config.training.activation_checkpointing, end, may_use_flex=flex
            ),
            config.training,
            config.optimizer,
        )
    return Assembly(config, data, train, val, sets, layout, engine, warnings, packing)


def _settle(
    data: TrainingData, config: RunConfig, world_size: int, compiled: bool
) -> tuple[RunConfig, dict[str, Windows]]:
    config = resolve_here(config, data.tokenizer.vocab_size, world_size, compiled)
    config = config.model_copy(update={"data": with_mask(config.data)})
    refuse_contradictions(config.training)
    seq_len, val = config.data.seq_len, data.val_windows(config.data.seq_len)
    if not val and not config.data.validation and config.training.early_stopping_patience:
        raise UserError(
            f"training.early_stopping_patience needs validation data, but the val split of {data.where} has no "
            f"window of {seq_len + 1} tokens; prepare with a larger --val-split"
        )
    return config, val


def resolve_here(config: RunConfig, vocab_size: int, world_size: int = 1, compile_auto: bool = False) -> RunConfig:
    """Resolve the config against the data and this machine.

    Raises:
        UserError: the config contradicts one of them.
    """
    device = pick_device()
    return resolve(
        config,
        vocab_size=vocab_size,
        world_size=world_size,
        bf16_native=computes_bf16_natively(device),
        compile_auto=compile_auto,
    )


def describe(parts: Assembly, steps: int) -> dict[str, str]:
    """What is about to happen, for the header and `--dry-run`."""
    from llmtrain.model.cost import parameter_count
    from llmtrain.model.peak import peak_of_run

    config, layout = parts.config, parts.layout
    model, training, seq_len = config.model, config.training, config.data.seq_len
    val = sum(map(len, [*parts.val.values(), *parts.sets.values()]))
    padding = f", {1 - parts.targets_of_a_window / seq_len:.1%} of them padding"
    accumulation = layout.global_batch // (layout.micro_batch * layout.world_size)
    ranks, device = layout.world_size, parts.engine.device
    peak = peak_of_run(config, engine="ddp" if ranks > 1 else "single", world_size=ranks, device=device.type)
    # Which ZeRO stage shares the model only the engine knows.
    asides = {"dropout": model.dropout, "the document mask": config.data.document_mask}
    aside = "".join(f", what {name} keeps aside" for name, is_on in asides.items() if is_on)
    memory = {"memory": f"{peak.bytes / 1e9:.2f} GB of tensors by the formulas, at the {peak.moment}{aside}"}
    room = free_memory(device)  # the weights are there already
    if peak.bytes > room + 4 * parameter_count(model, seq_len):
        memory["memory"] += f"; but {room / 1e9:.2f} GB are free"
    return {
        "model": f"{parameter_count(model, seq_len):,} parameters · {model.layers} layers × {model.dim} wide · "
        f"{model.heads} heads · vocabulary {model.vocab_size:,}",
        "data": f"{parts.data.where} · {parts.data.train_tokens:,} tokens · {parts.data.tokenizer.kind} · "
        f"{len(parts.train):,} windows of {seq_len}{padding if isinstance(parts.train, PackedWindows) else ''}"
        + (f" · {val:,} for validation" if val else ""),
        "batch": f"{layout.global_batch} sequences = {layout.global_batch * seq_len:,} tokens · micro-batch "
        f"{layout.micro_batch} × {accumulation} accumulated × {layout.world_size} process"
        + ("es" if layout.world_size > 1 else ""),
        "length": f"{steps:,} steps · {layout.steps_per_epoch():,} per epoch · "
        f"{parts.flops_per_token() * steps * layout.global_batch * parts.targets_of_a_window:.2e} FLOPs",
        "numerics": f"{training.precision}{', fp8' if training.fp8 else ''}{', compiled' if training.compile else ''} "
        f"on {parts.engine.device} · "
        f"{config.optimizer.name} · {config.schedule.name}, peak rate {config.optimizer.lr:g}",
        **(memory if parts.engine.name == "accelerate" else {}),
        "run": str(Path(config.run.dir)),
    }
