"""The training checklist on one batch: what goes wrong silently when a model is trained, looked at once, by name.

It goes the way training goes (the same data, batches, model and engine) and writes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmtrain.assemble import Assembly
from llmtrain.data.batches import WindowSet, batches, inputs_and_targets
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.engine import Engine
from llmtrain.health.agreement import together
from llmtrain.health.finding import Finding, fail, ok, warn
from llmtrain.model.loss import IGNORE_INDEX, cross_entropy_sum
from llmtrain.observe.formats import rate
from llmtrain.optim.schedule import make_schedule

SAMPLED_WINDOWS = 500
# An untied head starts at zero, so on the first step nothing before it has a gradient; on the third everything has.
STEPS = 3
INITIAL_LOSS_TOLERANCE = 0.1  # nats
SHOWN_TOKENS = 12
OVERFIT_LOSS = 0.05  # nats per token
OVERFIT_STEPS = 1000
OVERFIT_ROWS = 8
OVERFIT_WARMUP = 20


@dataclass(frozen=True)
class OneBatch:
    """The first micro-batch of the run, on the device."""

    inputs: Tensor  # (B, S)
    targets: Tensor  # (B, S), IGNORE_INDEX where there is none
    target_count: int


def first_batch(parts: Assembly) -> OneBatch:
    """Read the batch that training would begin with."""
    batch = next(batches(parts.train, parts.layout, parts.order(), position=0))
    tokens, _ = next(batch.micro_batches())
    inputs_BS, targets_BS = inputs_and_targets(tokens, parts.layout.micro_batch, parts.engine.device, batch.padding)
    return OneBatch(inputs_BS, targets_BS, int((targets_BS != IGNORE_INDEX).sum()))


def checklist(parts: Assembly, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Run all checks on a fresh model; where there are several ranks, all of them at the same time."""
    yield together(parts.engine, lambda: _ids(parts, tokenizer))
    batch = first_batch(parts)
    yield _shift(batch, tokenizer)
    yield _first_loss(parts, batch)
    yield from _first_steps(parts, batch)
    yield _learning_rates(parts)


def _ids(parts: Assembly, tokenizer: Tokenizer) -> Finding:
    """Read windows from all over the data; an id outside the vocabulary raises CorruptError on the way."""
    name, seen = "token ids", set[int]()
    unknown = total = 0
    for windows in (parts.train, *parts.val.values(), *parts.sets.values()):
        ids = _spread(windows)
        values, counts = np.unique(ids, return_counts=True)
        seen.update(values.tolist())
        total += int(counts.sum())
        unknown += int(counts[values == tokenizer.unk_id].sum())
    detail = f"{min(seen)} to {max(seen)} of {tokenizer.vocab_size:,}, {len(seen):,} different in {total:,} tokens"
    if len(seen) < 2:
        return fail(name, f"{detail}; there is nothing to learn; look at what was prepared")
    if unknown > 0.01 * total:
        return warn(name, f"{detail}; {unknown / total:.1%} are <unk>; prepare with another tokenizer or a larger one")
    return ok(name, detail)


def _spread(windows: WindowSet) -> np.ndarray[tuple[int, ...], np.dtype[np.integer]]:
    count = min(len(windows), SAMPLED_WINDOWS)
    ids: np.ndarray[tuple[int, ...], np.dtype[np.integer]] = windows.gather(
        np.linspace(0, len(windows) - 1, count).astype(np.int64)
    ).numpy()
    return ids


def _shift(batch: OneBatch, tokenizer: Tokenizer) -> Finding:
    """Show a few inputs beside their targets, so that a human sees the shift, too."""
    filled = int((batch.targets[0] != IGNORE_INDEX).sum())
    inputs_S, targets_S = batch.inputs[0, :filled], batch.targets[0, :filled]
    shown = min(SHOWN_TOKENS, len(inputs_S))
    texts = [[tokenizer.decode([token]) for token in row_S[:shown].tolist()] for row_S in (inputs_S, targets_S)]
    detail = f"inputs {_quoted(texts[0])}  targets {_quoted(texts[1])}"
    if torch.equal(inputs_S[1:], targets_S[:-1]):
        return ok("targets", f"are the inputs shifted by one: {detail}")
    return fail("targets", f"are not the inputs shifted by one: {detail}")


def _quoted(texts: Sequence[str]) -> str:
    return "|".join(repr(text)[1:-1] for text in texts)


def _first_loss(parts: Assembly, batch: OneBatch) -> Finding:
    """A model that knows nothing must find all tokens about equally likely."""
    name, vocab_size = "first loss", parts.config.model.vocab_size or 1
    with parts.engine.evaluating() as model:
        shapes, is_finite, total = set(), True, 0.0
        for row in range(len(batch.inputs)):
            logits_1SV = model(batch.inputs[row : row + 1])  # those of a batch might not fit
            shapes.add(tuple(logits_1SV.shape))
            is_finite &= bool(logits_1SV.isfinite().all())
            total += cross_entropy_sum(logits_1SV, batch.targets[row : row + 1]).item()
    loss, expected = total / batch.target_count, (1, batch.inputs.shape[1], vocab_size)
    if shapes != {expected}:
        return fail(name, f"logits of a sequence have the shape {shapes} instead of {expected}")
    if not is_finite:
        return fail(name, "the logits of a fresh model are not finite; look at its initialisation and precision")
    detail = f"{loss:.4f}, chance is ln({vocab_size:,}) = {math.log(vocab_size):.4f}; logits {expected}, all finite"
    if abs(loss - math.log(vocab_size)) <= INITIAL_LOSS_TOLERANCE:
        return ok(name, detail)
    return fail(name, f"{detail}; more than {INITIAL_LOSS_TOLERANCE} apart: look at the initialisation")


def _first_steps(parts: Assembly, batch: OneBatch) -> Iterator[Finding]:
    """Step a few times at the peak learning rate; name what gets no gradient and what does not move."""
    lr = parts.config.optimizer.lr
    with parts.engine.evaluating() as model:
        parameters = dict(model.named_parameters())
    # Beside the weights a device may have no room for them once more.
    before = {name: values.detach().to("cpu", copy=True) for name, values in _weights(parts.engine, parameters)}
    reached: set[str] = set()
    losses, norms = [], []
    for _ in range(STEPS):
        losses.append(_backward(parts.engine, batch))
        reached |= {name for name, p in parameters.items() if p.grad is not None and bool((p.grad != 0).any())}
        norms.append(parts.engine.step(lr).grad_norm.item())
    told = f"{len(parameters)} parameter tensors"
    if not all(parts.engine.gather(all(map(math.isfinite, losses + norms)))):
        yield fail("gradients", f"not finite: losses {losses}, norms {norms}; lower optimizer.lr")
        return
    unreached = [name for name in parameters if name not in reached]
    if parts.engine.name != "accelerate":  # ZeRO keeps slices of gradients to itself
        yield ok("gradients", f"global norm {norms[0]:.3g} at first")
    elif unreached:
        yield fail("gradients", f"none in {STEPS} steps for {_named(unreached)}; is it part of the loss at all?")
    else:
        yield ok("gradients", f"for all {told}; global norm {norms[0]:.3g} at first")
    moved = [name for name, values in _weights(parts.engine, parameters) if not torch.equal(values.cpu(), before[name])]
    moved_anywhere = set().union(*parts.engine.gather(moved))
    unmoved = [name for name in parameters if name not in moved_anywhere]
    if unmoved:
        why = "optimizer.lr is 0" if lr == 0 else "is it in the optimizer, and is the learning rate large enough?"
        yield fail("updates", f"{_named(unmoved)} did not move in {STEPS} steps; {why}")
    else:
        yield ok("updates", f"all {told} moved; loss {' → '.join(f'{loss:.3f}' for loss in losses)} at lr {rate(lr)}")


def _weights(engine: Engine, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of each parameter: under ZeRO a slice."""
    if engine.name == "accelerate":
        yield from ((name, parameter.detach()) for name, parameter in parameters.items())
        return
    for fragment in engine.fragments():
        kind, _, name = fragment.name.partition("/")
        if kind == "model":
            yield name, fragment.values


def _backward(engine: Engine, batch: OneBatch) -> float:
    targets = sum(engine.gather(batch.target_count))
    loss = engine.forward_backward(batch.inputs, batch.targets, global_targets=targets, sync=True)
    return loss.item() / batch.target_count


def _named(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + rest


def _learning_rates(parts: Assembly) -> Finding:
    config, total = parts.config, parts.total_steps()
    schedule = make_schedule(config.schedule, config.optimizer.lr, total)
    warmup = config.schedule.warmup_steps
    steps = sorted({0, 1, warmup, *(total * quarter // 4 for quarter in (1, 2, 3, 4))})
    detail = " · ".join(f"{step:,}: {rate(schedule(step))}" for step in steps if step <= total)
    if warmup >= total:
        return warn(
            "learning rate", f"{detail}; the warmup of {warmup:,} steps lasts to the end; lower schedule.warmup_steps"
        )
    return ok("learning rate", f"by step {detail}")


def overfit(parts: Assembly, lr: float) -> Finding:
    """Learn one batch by heart: what cannot do that cannot learn anything.

    Args:
        parts: of a config without dropout, in float32.
        lr: constant after a short warmup.
    """
    name = "overfit"
    batch = _unambiguous(first_batch(parts))
    rows, seq_len = batch.inputs.shape
    loss = math.inf
    for step in range(OVERFIT_STEPS + 1):
        loss = _backward(parts.engine, batch)  # before the step: of the model as it is
        if loss < OVERFIT_LOSS:
            told = f"one batch of {rows} × {seq_len} tokens known by heart after {step} steps"
            return ok(name, f"{told}: {loss:.4f} nats per token, at lr {rate(lr)}")
        if not math.isfinite(loss):
            return fail(name, f"the loss became {loss} after {step} steps at lr {rate(lr)}")
        parts.engine.step(lr * min(1.0, (step + 1) / OVERFIT_WARMUP))
    return fail(
        name,
        f"still {loss:.3f} nats after {OVERFIT_STEPS} steps on one batch of {rows} × {seq_len} tokens; look at the "
        "findings above, and at model.dim and model.layers, which may be too small",
    )


def _unambiguous(batch: OneBatch) -> OneBatch:
    """Take only so many rows that they can be known by heart: rows that begin alike and go on differently cannot."""
    filled = int((batch.targets[:, 0] != IGNORE_INDEX).sum())
    rows = min(filled, OVERFIT_ROWS)
    while rows > 1 and _irreducible_loss(batch.inputs[:rows], batch.targets[:rows]) > OVERFIT_LOSS / 4:
        rows //= 2
    inputs_BS, targets_BS = batch.inputs[:rows], batch.targets[:rows]
    return OneBatch(inputs_BS, targets_BS, int((targets_BS != IGNORE_INDEX).sum()))


def _irreducible_loss(inputs_BS: Tensor, targets_BS: Tensor) -> float:
    """Nats per token that no model can go under: the entropy of the targets among rows with equal inputs so far."""
    inputs, targets = inputs_BS.tolist(), targets_BS.tolist()
    nats = 0.0
    for position in range(inputs_BS.shape[1]):
        prefixes = [tuple(row[: position + 1]) for row in inputs]
        if len(set(prefixes)) == len(prefixes):
            break  # all different from here on
        of_prefix = Counter(prefixes)
        of_both = Counter(zip(prefixes, (row[position] for row in targets), strict=True))
        nats -= sum(n * math.log(n / of_prefix[prefix]) for (prefix, _), n in of_both.items())
    return nats / inputs_BS.numel()


def overfit_rate(dim: int) -> float:
    """A learning rate for AdamW that suits the width: wider models take smaller ones."""
    return 3e-3 * min(1.0, 256 / dim)
