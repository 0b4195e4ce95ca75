"""`llmtrain prepare`: text in, token shards out.

    find files → divide into training and validation → fit the tokenizer on training → encode, in several processes
    → shards and manifest in `OUT.partial-HOST-PID` → renamed to OUT

What is written depends on the input and the options only, never on the number of workers or their speed. OUT appears
in one step at the end: whatever happens before leaves nothing that looks finished.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llmtrain import __version__
from llmtrain.arguments import VerbParser, fraction, positive_int
from llmtrain.data.corpus import ReadOptions, SourceFile, cut_into_chunks, digest, find_files
from llmtrain.data.encode import ChunkEncoder, Division, SplitName
from llmtrain.data.progress_bar import Report, progress_bar
from llmtrain.data.shards import MANIFEST, TOKENIZER_FOLDER, Manifest, ShardWriter, SplitInfo, TokenDataset
from llmtrain.data.split import AUGMENTATIONS, Picker, Splitter
from llmtrain.data.staging import staged_folder
from llmtrain.data.tokenizer import (
    DEFAULT_VOCAB_SIZE,
    KINDS,
    Tokenizer,
    existing_tokenizer_file,
    fit_tokenizer,
    id_dtype,
    tokenizer_info,
)
from llmtrain.data.workers import ordered_map
from llmtrain.errors import CorruptError, LlmtrainError, UserError, run_main

ENOUGH_DOCUMENTS = 20  # from here on `--val-by auto` sets whole documents aside
# A spawned worker costs about half a second, the time in which one process encodes tens of megabytes.
BYTES_PER_WORKER = 16 << 20
# Tokenizers learn from at most so much text, taken evenly from the whole input; `char` must see every character.
SAMPLE_BYTES = {"char": None, "word": 200 << 20, "bbpe": 200 << 20, "bpe": 50 << 20, "unigram": 50 << 20}


@dataclass(frozen=True)
class Options:
    """What to prepare and how: the flags of the command."""

    inputs: tuple[str, ...] = ("stdlib",)
    out: Path = Path("data/stdlib")
    tokenizer: str = "bbpe"
    vocab_size: int | None = None
    val_split: float = 0.05
    val_by: Literal["auto", "document", "tail"] = "auto"
    seed: int = 1337
    augment: tuple[str, ...] = ()
    shard_tokens: int = 100_000_000
    max_files: int | None = None
    text_field: str = "text"
    skip_bad: bool = False
    workers: int | None = None

    def request(self, files: Sequence[SourceFile]) -> dict[str, Any]:
        """Everything that decides what is written, as JSON values: equal requests give equal data."""
        tokenizer_file = existing_tokenizer_file(self.tokenizer)
        return {
            "inputs": list(self.inputs),
            "files": len(files),
            "files_digest": digest(files),
            "tokenizer": self.tokenizer,
            "tokenizer_digest": digest(find_files([str(tokenizer_file)])) if tokenizer_file else None,
            "vocab_size": self.vocab_size,
            "val_split": self.val_split,
            "val_by": self.val_by,
            "seed": self.seed,
            "augment": list(self.augment),
            "shard_tokens": self.shard_tokens,
            "max_files": self.max_files,
            "text_field": self.text_field,
            "skip_bad": self.skip_bad,
        }


@dataclass(frozen=True)
class Outcome:
    """What `prepare` did: the manifest, whether it stood there already, and how long each part took."""

    manifest: Manifest
    already_prepared: bool = False
    fit_seconds: float = 0.0
    encode_seconds: float = 0.0


def prepare(options: Options, show_progress: bool = False) -> Outcome:
    """Write prepared data to `options.out`, or find that the same request was written there before.

    Raises:
        UserError: bad input, options that do not fit it, or a folder that cannot be written; nothing is left.
    """
    files = find_files(options.inputs, options.max_files)
    request = options.request(files)
    if (existing := _existing(options.out, request)) is not None:
        return Outcome(existing, already_prepared=True)
    reading = ReadOptions(options.text_field, options.skip_bad)
    division = Division(reading, _choose_splitter(files, reading, options), options.augment, options.seed)
    with staged_folder(options.out) as folder:
        started = time.perf_counter()
        tokenizer = _fit(files, division, options)
        (folder / TOKENIZER_FOLDER).mkdir()
        tokenizer.save(folder / TOKENIZER_FOLDER)
        fitted = time.perf_counter()
        with progress_bar("encoding", sum(file.bytes for file in files), show_progress) as report:
            manifest = _encode(files, division, options, tokenizer=tokenizer, folder=folder, report=report)
        manifest.recipe["request"] = request
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return Outcome(manifest, False, fitted - started, time.perf_counter() - fitted)


def _existing(out: Path, request: dict[str, Any]) -> Manifest | None:
    """Return the manifest of data that the same request made; None if there is nothing; refuse anything else."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({error.strerror})") from error
    try:
        data = TokenDataset(out)
    except LlmtrainError:
        raise UserError(f"{out}: exists and is not data prepared here; choose another --out or delete it") from None
    if data.manifest.recipe.get("request") != request:
        raise UserError(f"{out}: holds data prepared from other input or options; choose another --out or delete it")
    try:
        data.check()
    except CorruptError as error:
        raise UserError(f"{out}: damaged; delete it or choose another --out ({error})") from error
    return data.manifest


def _choose_splitter(files: list[SourceFile], reading: ReadOptions, options: Options) -> Splitter:
    """Decide how validation text is set aside, reading no more documents than that takes."""
    by_document = Splitter(options.val_split, "document", options.seed)
    by_tail = Splitter(options.val_split, "tail", options.seed)
    enough = ENOUGH_DOCUMENTS if options.val_by == "auto" else 1
    count, sides = 0, set()
    skipped: Counter[str] = Counter()
    for chunk in cut_into_chunks(files, reading):
        for ordinal, text in chunk.read(reading, skipped):
            if options.val_split == 0 or options.val_by == "tail":
                return by_tail
            count += 1
            sides.add(by_document.divide(ordinal, text)[0] == "")
            if count >= enough and len(sides) == 2:
                return by_document
    if count == 0:
        raise UserError(f"{', '.join(options.inputs)}: no text in it{_in_brackets(_counted(skipped))}")
    if options.val_by == "auto":
        return by_tail
    raise UserError(
        f"{count} documents are too few to set {options.val_split:g} of them aside;"
        " use --val-by tail or a larger --val-split"
    )


def _fit(files: list[SourceFile], division: Division, options: Options) -> Tokenizer:
    def documents(split: SplitName) -> Iterator[str]:
        return division.documents(cut_into_chunks(files, division.reading), split)

    limit = SAMPLE_BYTES.get(options.tokenizer)
    training = documents("train") if limit is None else _sample(files, division, limit)
    return fit_tokenizer(options.tokenizer, training, options.vocab_size, documents("val"))


def _sample(files: list[SourceFile], division: Division, limit: int) -> Iterator[str]:
    """Yield training documents of at most `limit` characters together, from chunks spread over the whole input."""
    picker = Picker(min(1.0, limit / max(1, sum(file.bytes for file in files))), division.seed)
    chunks = enumerate(cut_into_chunks(files, division.reading))
    picked = (chunk for index, chunk in chunks if picker.picks(index))
    empty = True
    for document in _at_most(division.documents(picked, "train"), limit):
        empty = False
        yield document
    if empty:  # few chunks, and none with training text was picked
        yield from _at_most(division.documents(cut_into_chunks(files, division.reading), "train"), limit)


def _at_most(documents: Iterator[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document[:characters]
        characters -= len(document)
        if characters <= 0:
            return


def _encode(
    files: list[SourceFile], division: Division, options: Options, *, tokenizer: Tokenizer, folder: Path, report: Report
) -> Manifest:
    """Write the shards; return the manifest without the request."""
    info = tokenizer_info(folder / TOKENIZER_FOLDER, tokenizer)
    dtype = id_dtype(info.vocab_size)
    names = ("train", "val") if options.val_split > 0 else ("train",)
    writers = {name: ShardWriter(folder, name, dtype, options.shard_tokens) for name in names}
    skipped, unknown, written = Counter[str](), Counter[str](), 0
    workers = options.workers or _default_workers(files)
    make_encoder: Callable[[], ChunkEncoder] = (
        partial(ChunkEncoder, division, tokenizer)
        if workers == 1
        else partial(ChunkEncoder.load, division, folder / TOKENIZER_FOLDER)
    )
    for chunk in ordered_map(make_encoder, cut_into_chunks(files, division.reading), workers):
        for name, documents in chunk.splits.items():
            writers[name].append(documents.ids, documents.lengths, documents.text_bytes)
            unknown[name] += documents.unknown
        skipped += chunk.skipped
        written += sum(len(documents.lengths) for documents in chunk.splits.values())
        report(chunk.source_bytes, f"{written:,} documents")
    splits: dict[str, SplitInfo] = {name: writer.close() for name, writer in writers.items()}
    for split_name, split in splits.items():
        if split.documents == 0:
            raise UserError(f"too little text: the {split_name} split is empty; use --val-split 0 or more text")
    recipe = {
        "llmtrain": __version__,
        "split_by": division.splitter.by if options.val_split > 0 else None,
        "skipped": dict(sorted(skipped.items())),
        "unknown_tokens": {name: count for name, count in sorted(unknown.items()) if count},
    }
    return Manifest(dtype=dtype, tokenizer=info, splits=splits, recipe=recipe)


def _default_workers(files: list[SourceFile]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, sum(file.bytes for file in files) // BYTES_PER_WORKER))


def _summary(outcome: Outcome, out: Path) -> dict[str, Any]:
    """The facts that `--json` prints and the text form tells."""
    manifest = outcome.manifest
    return {
        "out": str(out),
        "already_prepared": outcome.already_prepared,
        "tokenizer": manifest.tokenizer.kind,
        "vocab_size": manifest.tokenizer.vocab_size,
        "dtype": manifest.dtype,
        "splits": {
            name: {
                "tokens": split.tokens,
                "documents": split.documents,
                "text_bytes": split.text_bytes,
                "bytes_per_token": round(split.text_bytes / split.tokens, 3),
            }
            for name, split in manifest.splits.items()
        },
        "split_by": manifest.recipe.get("split_by"),
        "skipped": manifest.recipe.get("skipped", {}),
        "unknown_tokens": manifest.recipe.get("unknown_tokens", {}),
        "fingerprint": manifest.fingerprint(),
        "fit_seconds": round(outcome.fit_seconds, 3),
        "encode_seconds": round(outcome.encode_seconds, 3),
    }


def _as_text(summary: dict[str, Any]) -> str:
    state = "already prepared" if summary["already_prepared"] else "prepared"
    lines = [f"{state}: {summary['out']}  ({summary['tokenizer']}, {summary['vocab_size']:,} ids, {summary['dtype']})"]
    for name, split in summary["splits"].items():
        lines.append(
            f"  {name:<5} {split['tokens']:>13,} tokens  {split['documents']:>9,} documents"
            f"  {split['text_bytes'] / 1e6:>9,.2f} MB of text  {split['bytes_per_token']:.2f} bytes per token"
        )
    if summary["skipped"]:
        lines.append(f"  skipped: {_counted(summary['skipped'])}")
    for name, count in summary["unknown_tokens"].items():
        lines.append(
            f"  {count:,} tokens of {name} are <unk>: what the tokenizer, fitted on training text, cannot spell"
        )
    lines.append(f"next: llmtrain train --config configs/debug.yaml data.path={summary['out']}")
    return "\n".join(lines)


def _counted(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(skipped.items()))


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _augmentations(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in text.split(",") if kind.strip()))
    if unknown := set(kinds) - set(AUGMENTATIONS):
        raise argparse.ArgumentTypeError(f"no '{unknown.pop()}'; there are {', '.join(AUGMENTATIONS)}")
    return kinds


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        "prepare",
        "Turn text into token shards, with a tokenizer fitted on the training part.",
        "llmtrain prepare --input books/ --input 'web/*.jsonl.zst' --tokenizer bbpe --out data/mine",
    )
    _add_flags(parser.add_argument, Options())
    return parser


def _add_flags(add: Callable[..., Any], default: Options) -> None:
    add(
        "--input",
        action="append",
        metavar="SRC",
        help="a file, a folder, a glob (in quotes), *.jsonl or *.txt (also .gz, .zst), *.parquet, or stdlib: this"
        " Python's own library (the default); repeatable",
    )
    add("--out", type=Path, default=default.out, metavar="DIR", help="folder to make (default: %(default)s)")
    add(
        "--tokenizer",
        default=default.tokenizer,
        metavar="KIND",
        help=f"{', '.join(KINDS)}, or an existing SentencePiece .model or tokenizer.json (default: %(default)s)",
    )
    add(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help=f"exactly so many ids (default: {DEFAULT_VOCAB_SIZE}, or what the text supports)",
    )
    add(
        "--val-split",
        type=fraction,
        default=default.val_split,
        metavar="F",
        help="share of the text set aside for validation (default: %(default)s)",
    )
    add(
        "--val-by",
        choices=("auto", "document", "tail"),
        default=default.val_by,
        help="set whole documents aside, or the end of each; auto: documents from"
        f" {ENOUGH_DOCUMENTS} on (default: %(default)s)",
    )
    add(
        "--augment",
        type=_augmentations,
        default=(),
        metavar="KINDS",
        help="comma-separated: case (flips a tenth of the letters), punctuation (drops half of the marks), whitespace"
        " (changes a third of the blanks); each adds one altered copy of every training document",
    )
    add("--seed", type=int, default=default.seed, metavar="N", help="of split and augmentation (default: %(default)s)")
    add(
        "--text-field", default=default.text_field, metavar="NAME", help="JSONL field or Parquet column (default: text)"
    )
    add("--skip-bad", action="store_true", help="leave broken lines and files that are not UTF-8 out, and count them")
    add("--max-files", type=positive_int, metavar="N", help="take only the first N files")
    add(
        "--shard-tokens",
        type=positive_int,
        default=default.shard_tokens,
        metavar="N",
        help="tokens per file (default: %(default)s)",
    )
    add("--workers", type=positive_int, metavar="N", help="processes (default: one per core, fewer for small input)")
    add("--json", action="store_true", help="print the summary as JSON")


def main(argv: list[str]) -> None:
    """Run `llmtrain prepare`."""
    flags = vars(_parser().parse_args(argv))
    as_json = flags.pop("json")
    inputs = tuple(flags.pop("input") or Options.inputs)
    options = Options(inputs=inputs, **flags)
    summary = _summary(prepare(options, show_progress=sys.stderr.isatty()), options.out)
    print(json.dumps(summary, indent=1) if as_json else _as_text(summary))


if __name__ == "__main__":
    sys.exit(run_main(main))
