"""`llmtrain prepare`: text in, token shards out.

    find files → divide into training and validation → fit the tokenizer on training → encode, in several processes
    → shards and manifest in `OUT.partial-HOST-PID` → renamed to OUT

With `--part I/N` many such commands, on any machines that share a file system, encode a stretch of the input each, and
whichever comes last joins them (`data/parts.py`).

What is written depends on the input and the options only, never on the number of workers or parts or on their speed.
OUT appears in one step at the end: whatever happens before leaves nothing that looks finished.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.arguments import VerbParser, fraction, positive_int
from llmtrain.data.corpus import cut_into_chunks, find_files, told
from llmtrain.data.encode import encode_to_shards
from llmtrain.data.fetch import upload_data
from llmtrain.data.fit import ENOUGH_DOCUMENTS
from llmtrain.data.parts import PartOutcome, numbers_as_ranges, prepare_part
from llmtrain.data.progress_bar import progress_bar
from llmtrain.data.recipe import (
    Options,
    Outcome,
    default_workers,
    divide,
    find_existing,
    fit_into,
    total_bytes,
    write_manifest,
)
from llmtrain.data.shards import TOKENIZER_FOLDER, SplitInfo
from llmtrain.data.split import AUGMENTATIONS
from llmtrain.data.staging import staged_folder
from llmtrain.data.tokenizer import DEFAULT_VOCAB_SIZE, KINDS, id_dtype
from llmtrain.errors import UserError, run_main
from llmtrain.storage.cache import cache_folder
from llmtrain.storage.remote import Remote, path_or_url


def prepare(options: Options, show_progress: bool = False) -> Outcome:
    """Write prepared data to `options.out`, or find that the same request was written there before.

    Raises:
        UserError: bad input, options that do not fit it, or a folder that cannot be written; nothing is left.
    """
    files = find_files(options.inputs, options.max_files)
    request = options.request(files)
    if (existing := find_existing(options.out, request)) is not None:
        return Outcome(existing, already_prepared=True)
    division = divide(files, options)
    with staged_folder(options.out, say=_say) as folder:
        started = time.perf_counter()
        tokenizer = fit_into(folder, files, division, options)
        fitted = time.perf_counter()
        with progress_bar("encoding", total_bytes(files), show_progress) as report:
            encoded = encode_to_shards(
                cut_into_chunks(files, division.reading),
                division,
                folder / TOKENIZER_FOLDER,
                id_dtype(tokenizer.vocab_size),
                folder=folder,
                shard_tokens=options.shard_tokens,
                workers=options.workers or default_workers(total_bytes(files)),
                report=report,
            )
        manifest = write_manifest(folder, encoded, tokenizer, division.splitter.by, request)
    return Outcome(manifest, False, fitted - started, time.perf_counter() - fitted)


def _say(line: str) -> None:
    print(f"llmtrain: {line}", file=sys.stderr, flush=True)


def _summary(outcome: Outcome, out: Path | str) -> dict[str, Any]:
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
                **_counts(split),
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
        lines.append(f"  skipped: {told(summary['skipped'])}")
    for name, count in summary["unknown_tokens"].items():
        lines.append(
            f"  {count:,} tokens of {name} are <unk>: what the tokenizer, fitted on training text, cannot spell"
        )
    lines.append(f"next: llmtrain train --config configs/debug.yaml data.path={summary['out']}")
    return "\n".join(lines)


def _part_summary(outcome: PartOutcome, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "part": outcome.number,
        "parts": outcome.count,
        "already_done": outcome.already_done,
        "missing": outcome.missing,
        "splits": {name: _counts(split) for name, split in outcome.encoded.splits.items()},
    }


def _part_as_text(summary: dict[str, Any]) -> str:
    tokens, documents = (sum(split[what] for split in summary["splits"].values()) for what in ("tokens", "documents"))
    return (
        f"part {summary['part']}/{summary['parts']} {'was done already' if summary['already_done'] else 'done'}:"
        f" {tokens:,} tokens, {documents:,} documents; of {summary['out']} still missing: part"
        f" {numbers_as_ranges(summary['missing'])}"
    )


def _counts(split: SplitInfo) -> dict[str, int]:
    return {"tokens": split.tokens, "documents": split.documents, "text_bytes": split.text_bytes}


def _augmentations(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in text.split(",") if kind.strip()))
    if unknown := set(kinds) - set(AUGMENTATIONS):
        raise argparse.ArgumentTypeError(f"no '{unknown.pop()}'; there are {', '.join(AUGMENTATIONS)}")
    return kinds


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 3/16, not '{text}'")
    return int(found[1]), int(found[2])


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        "prepare",
        "Turn text into token shards, with a tokenizer fitted on the training part.",
        "llmtrain prepare --input books/ --input 'web/*.jsonl.zst' --tokenizer bbpe --out data/mine",
    )
    _add_content_flags(parser.add_argument, Options())
    _add_work_flags(parser.add_argument)
    return parser


def _add_content_flags(add: Callable[..., Any], default: Options) -> None:
    """What decides the result."""
    add(
        "--input",
        action="append",
        metavar="SRC",
        help="a file, a folder, a glob (in quotes), *.jsonl or *.txt (also .gz, .zst), *.parquet, or stdlib: this"
        " Python's own library (the default); repeatable",
    )
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


def _add_work_flags(add: Callable[..., Any]) -> None:
    """How it is reached and told."""
    add(
        "--out",
        type=path_or_url,
        default=Options.out,
        metavar="DIR",
        help="folder to make (default: %(default)s); a URL such as s3://bucket/data: made in the cache, then uploaded",
    )
    add("--workers", type=positive_int, metavar="N", help="processes (default: one per core, fewer for small input)")
    add(
        "--part",
        type=_part,
        metavar="I/N",
        help="prepare only the I-th of N parts of the input. Run all N with the same options, in any order, at once or"
        " one after another, on machines that share a file system; one that was killed is run again, one that is done"
        " does nothing. The last to finish joins them: OUT is, byte for byte, what one prepare would make. Until"
        " then the parts lie in OUT.parts (as large as OUT)",
    )
    add("--join", action="store_true", help="only join parts that are all done (if the last was killed while at it)")
    add("--json", action="store_true", help="print the summary as JSON")


def main(argv: list[str]) -> None:
    """Run `llmtrain prepare`."""
    flags = vars(_parser().parse_args(argv))
    as_json, part, join = (flags.pop(name) for name in ("json", "part", "join"))
    if part and join:
        raise UserError("--part and --join: a part joins by itself when it is the last; give one of them")
    inputs, remote = tuple(flags.pop("input") or Options.inputs), None
    if isinstance(url := flags["out"], str):
        if part or join:
            raise UserError(f"--part and --join need a folder that all machines share, not {url}")
        remote = Remote(url)
        remote.check_writable()
        flags["out"] = cache_folder("prepared", url)
    options, show = Options(inputs=inputs, **flags), sys.stderr.isatty()
    outcome: Outcome | PartOutcome
    if part or join:
        outcome = prepare_part(options, *(part or (None, None)), say=_say, show_progress=show)
    else:
        outcome = prepare(options, show)
    where: Path | str = options.out
    if remote is not None:
        upload_data(options.out, remote)
        where = remote.url
    if isinstance(outcome, PartOutcome):
        summary, as_text = _part_summary(outcome, options.out), _part_as_text
    else:
        summary, as_text = _summary(outcome, where), _as_text
    print(json.dumps(summary, indent=1) if as_json else as_text(summary))


if __name__ == "__main__":
    sys.exit(run_main(main))
