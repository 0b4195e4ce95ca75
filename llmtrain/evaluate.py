"""Loss, perplexity, accuracy and bits per byte of a trained model on prepared data."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.load import TrainedModel, load_model
from llmtrain.checkpoint.resume import check_tokenizer
from llmtrain.config import ValidationSection
from llmtrain.data.ahead import ahead
from llmtrain.data.batches import Layout, Windows, validation_ids
from llmtrain.data.documents import document_end
from llmtrain.data.fetch import local_data
from llmtrain.data.shards import TokenDataset
from llmtrain.data.sliding import SlidingWindows
from llmtrain.errors import UserError, run_main
from llmtrain.harness.tasks import run_tasks
from llmtrain.observe.record import Number, finite
from llmtrain.observe.validation import Validation, mixed, validate, weighted_mean
from llmtrain.parsers import evaluate_parser as parser


@dataclass(frozen=True)
class Part:
    """What of prepared data is evaluated."""

    split: str
    batches: int | None  # only so many global batches of windows, spread evenly over the split; None: all
    stride: int | None  # of overlapping windows; None: they do not overlap


def evaluate(trained: TrainedModel, data: TokenDataset, part: Part) -> Validation:
    """Evaluate just as the trainer does: the same windows, unless they overlap, micro-batches and precision.

    Raises:
        UserError: another tokenizer, no such split, a split without a single window, or too long a stride.
    """
    engine, config = trained.engine, trained.config
    check_tokenizer(trained.reader, data.manifest)
    training = config.training
    windows = _windows(config.data.seq_len, data, part)
    if config.data.document_mask:
        document_end(data, part.split)
    layout = Layout(
        windows=len(windows),
        global_batch=training.global_batch_size,
        micro_batch=training.micro_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    ids = list(validation_ids(windows, layout, part.batches and part.batches * layout.global_batch))
    counted = map(windows.counted, ids) if isinstance(windows, SlidingWindows) else None
    arriving = ahead(map(windows.gather, ids), engine.device)
    return validate(engine, arriving, layout.micro_batch, trained.tokenizer.vocab_size, counted)


def _windows(seq_len: int, data: TokenDataset, part: Part) -> Windows | SlidingWindows:
    stream = data.split(part.split)
    if part.stride and part.stride > seq_len:
        raise UserError(
            f"--stride {part.stride}: is above the {seq_len} tokens that this model sees at once, so it would leave "
            f"tokens out; give at most {seq_len}"
        )
    if len(stream) <= (1 if part.stride else seq_len):
        raise UserError(
            f"{data.path}: the {part.split} split has {len(stream):,} tokens, and one window of this model takes "
            f"{2 if part.stride else seq_len + 1}; prepare more text"
        )
    return SlidingWindows(stream, seq_len, part.stride) if part.stride else Windows(stream, seq_len, seq_len)


def numbers(result: Validation, bytes_per_token: float | None) -> dict[str, Number]:
    """What the verb says of each; `bits_per_byte` is None where the data does not know its size as text."""
    bits = result.bits_per_byte(bytes_per_token) if bytes_per_token else None
    return {
        "loss": finite(result.loss),
        "perplexity": finite(result.perplexity),
        "accuracy": result.accuracy,
        "bits_per_byte": finite(bits),
        "tokens": result.tokens,
    }


def _bytes_per_token(data: TokenDataset, split: str) -> float | None:
    info = data.manifest.splits[split]
    return info.text_bytes / info.tokens if info.text_bytes else None


def report_one(trained: TrainedModel, data: TokenDataset, part: Part) -> dict[str, Any]:
    """What `--json` prints of one prepared folder."""
    result = numbers(evaluate(trained, data, part), _bytes_per_token(data, part.split))
    return {**_head(trained, str(data.path), part), **result}


def report_sources(trained: TrainedModel, sources: Mapping[str, TokenDataset], part: Part) -> dict[str, Any]:
    """The same of a mixture: the mean of its sources by the weights that its validation loss has, and each alone.

    A source without that split, or without a window in it, is None.
    """
    weights: dict[str, float] = trained.reader.state()["judged_by"][0]
    able = {name: data for name, data in sources.items() if _has(trained, data, part)}
    if not able:
        window = trained.config.data.seq_len + 1
        raise UserError(
            f"{trained.reader.folder}: none of its sources has a window of {window} tokens in a {part.split} "
            "split; name another by --split, or data by --data"
        )
    found = {name: evaluate(trained, data, part) for name, data in able.items()}
    sizes = {name: _bytes_per_token(data, part.split) for name, data in able.items()}
    known = {name: size for name, size in sizes.items() if size}
    size = weighted_mean(known, weights) if len(known) == len(sizes) else None
    each = {
        name: {"data": str(data.path), "weight": weights[name], **numbers(found[name], sizes[name])}
        if name in found
        else None
        for name, data in sources.items()
    }
    where = ", ".join(str(data.path) for data in able.values())
    return {**_head(trained, where, part), **numbers(mixed(found, weights), size), "sources": each}


def _has(trained: TrainedModel, data: TokenDataset, part: Part) -> bool:
    split = data.manifest.splits.get(part.split)
    return split is not None and split.tokens > (1 if part.stride else trained.config.data.seq_len)


def _checkpoint(trained: TrainedModel) -> dict[str, Any]:
    return {"checkpoint": str(trained.reader.folder), "step": trained.reader.manifest.step}


def _head(trained: TrainedModel, data: str, part: Part) -> dict[str, Any]:
    stride = {"stride": part.stride} if part.stride else {}
    return {**_checkpoint(trained), "data": data, "split": part.split, **stride}


def as_text(result: Mapping[str, Any]) -> str:
    """For people."""
    if "tasks" in result:
        return "\n".join([f"{'checkpoint':>13}  {result['checkpoint']}", *_of_tasks(result["tasks"])])

    def number(name: str, unit: str) -> str:
        value = result[name]
        return "unknown" if value is None else f"{value:.6g} {unit}".rstrip()

    stride = f", windows {result['stride']} tokens apart" if "stride" in result else ""
    lines = {
        "checkpoint": result["checkpoint"],
        "data": f"{result['data']}, {result['split']} split, {result['tokens']:,} tokens{stride}",
        "loss": number("loss", "nats per token"),
        "perplexity": number("perplexity", ""),
        "accuracy": f"{100 * result['accuracy']:.2f} %",
        "bits per byte": number("bits_per_byte", ""),
    }
    each = [*_table("source", "weight", result.get("sources")), *_table("set", "split", result.get("validation"))]
    return "\n".join([*(f"{name:>13}  {value}" for name, value in lines.items()), *each])


def _of_tasks(scores: Mapping[str, Mapping[str, Number]]) -> Iterator[str]:
    """A line for each metric of each task."""
    for task, values in scores.items():
        for name, value in values.items():
            metric, comma, by = name.partition(",")
            if name == "samples" or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr{comma}{by}")
            told = "unknown" if value is None else f"{value:.4g}"
            told += "" if error is None else f" ± {error:.2g}"
            yield f"{task:>13}  {name} {told}, {values.get('samples', '?')} samples"


def _table(title: str, first: str, rows: Mapping[str, Mapping[str, Any] | None] | None) -> Iterator[str]:
    """A line for each of several data, under a line of titles; `first` is what stands before the numbers."""
    if not rows:
        return
    width = max(13, *map(len, rows))
    titles = f"{first:>8}  {'loss':>8}  {'perplexity':>10}  {'accuracy':>8}  {'bits/byte':>9}  tokens"
    yield f"\n{title:>{width}}  {titles}"
    for name, one in rows.items():
        if one is None:
            yield f"{name:>{width}}  not here, or no window of that split"
            continue
        before = one[first] if isinstance(one[first], str) else f"{one[first]:g}"
        loss, perplexity, bits = (
            "unknown" if one[key] is None else f"{one[key]:.6g}" for key in ("loss", "perplexity", "bits_per_byte")
        )
        yield (
            f"{name:>{width}}  {before:>8}  {loss:>8}  {perplexity:>10}  {100 * one['accuracy']:>6.2f} %  "
            f"{bits:>9}  {one['tokens']:,}"
        )


def _open(trained: TrainedModel, path: Path | str) -> TokenDataset:
    """Open prepared data, the run's own or what was asked for."""
    own = local_data(path)
    section = trained.config.data
    if path in section.paths and not own.is_dir():
        raise UserError(f"{own}: the data that {trained.reader.folder} was trained on is not here; name it by --data")
    return TokenDataset(own)


def report(trained: TrainedModel, path: Path | str | None, part: Part) -> dict[str, Any]:
    """What `--json` prints: of the data at `path`, or else of the run's own and of each of its `data.validation`.

    As in training, the first of these is the main one where the run's own data has no window for validation.
    """
    if path is not None:
        return report_one(trained, _open(trained, path), part)
    section = trained.config.data
    own = {name: _open(trained, place) for name, place in zip(section.names, section.paths, strict=True)}
    each = [_report_set(trained, one, part) for one in section.validation]
    plain = replace(part, stride=None)  # as in training
    if each and each[0] and part.split == "val" and not any(_has(trained, data, plain) for data in own.values()):
        main = each[0]
    elif len(own) > 1:
        main = report_sources(trained, own, part)
    else:
        main = report_one(trained, own[section.names[0]], part)
    rows = {
        name: one and {key: one[key] for key in one if key not in ("checkpoint", "step", "stride")}
        for name, one in zip(section.set_names, each, strict=True)
    }
    return {**main, "validation": rows} if rows else main


def _report_set(trained: TrainedModel, one: ValidationSection, part: Part) -> dict[str, Any] | None:
    """None where the set is not here, or has no window."""
    folder = local_data(one.path)
    if not folder.is_dir():
        return None
    data, part = TokenDataset(folder), replace(part, split=one.split)
    return report_one(trained, data, part) if _has(trained, data, part) else None


def main(argv: list[str]) -> None:
    """`llmtrain evaluate`."""
    args = parser().read(argv)
    _refuse_contradictions(args)
    with load_model(args.path, compiled=True) as trained:
        if args.tasks:
            scores = run_tasks(trained, args.tasks.split(","), args.shots, args.limit)
            result = {**_checkpoint(trained), "tasks": scores}
        else:
            result = report(trained, args.data, Part(args.split or "val", args.batches, args.stride))
        if trained.engine.rank == 0:
            print(json.dumps(result, allow_nan=False) if args.json else as_text(result))


def _refuse_contradictions(args: Namespace) -> None:
    of_data, of_tasks = ("data", "split", "batches", "stride"), ("shots", "limit")
    for name in of_data if args.tasks else of_tasks:
        if getattr(args, name) is not None:
            why = "is of data, and --tasks have their own" if args.tasks else "is for --tasks"
            raise UserError(f"--{name} {why}; leave one out")


if __name__ == "__main__":
    sys.exit(run_main(main))
