"""The command line of `prepare`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.arguments import VerbParser, fraction, id_number, positive_int
from llmtrain.data.filters import FILTERS
from llmtrain.data.fit import ENOUGH_DOCUMENTS
from llmtrain.data.recipe import Options
from llmtrain.data.select import LANGUAGES
from llmtrain.data.split import AUGMENTATIONS
from llmtrain.data.tokenizer import DEFAULT_VOCAB_SIZE, KINDS
from llmtrain.storage.remote import path_or_url


def parser() -> VerbParser:
    """The parser; what it gives are the fields of `Options`, and some more for `main`."""
    made = VerbParser(
        "prepare",
        "Turn text into token shards, with a tokenizer fitted on the training part.",
        "llmtrain prepare --input books/ --input 'web/*.jsonl.zst' --tokenizer bbpe --out data/mine",
        instead="what to read is given by --input",
    )
    add, default = made.add_argument, Options()
    _add_source_flags(add, default)
    _add_split_flags(add, default)
    _add_content_flags(add, default)
    _add_work_flags(add)
    return made


def _add_source_flags(add: Callable[..., Any], default: Options) -> None:
    """What is read, and with which tokenizer."""
    add(
        "--input",
        action="append",
        type=_source,
        metavar="SRC",
        help="a file, a folder, a glob (in quotes), *.jsonl, *.ndjson or *.txt (also .gz, .zst), *.parquet,"
        " hf:NAME[:CONFIG] or hf:FOLDER (a Hugging Face dataset, streamed), or stdlib: this Python's own library (the"
        " default); or token files, which are used in place: .bin of nanoGPT or llm.c, .bin"
        " with .idx of Megatron, or a folder of such; repeatable",
    )
    add(
        "--include",
        type=_names,
        action="extend",
        default=[],
        metavar="GLOBS",
        help="of the files in folders and globs only those of these names, such as '*.py,src/*.rs'; repeatable",
    )
    add(
        "--language",
        type=_names,
        dest="languages",
        action="extend",
        default=[],
        metavar="NAMES",
        help=f"only source files of these languages; adds to --include. {', '.join(LANGUAGES)}",
    )
    add(
        "--max-file-bytes",
        type=positive_int,
        metavar="N",
        help="leave larger text files of folders and globs out",
    )
    add(
        "--tokenizer",
        metavar="KIND",
        help=f"{', '.join(KINDS)}, an existing SentencePiece .model or tokenizer.json, the tokenizer folder of "
        "prepared data or a checkpoint, or a Hugging Face folder"
        f" (default: {default.tokenizer}; of token files, the one that the ids belong to)",
    )
    add(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help=f"exactly so many ids (default: {DEFAULT_VOCAB_SIZE}, or what the text supports)",
    )
    add(
        "--digits",
        choices=("join", "split"),
        help="of bbpe, bpe and unigram: split makes each of 0 to 9 a token of its own; join (the default) lets"
        " frequent numbers be tokens",
    )
    add(
        "--whitespace",
        choices=("join", "split"),
        help="of bbpe, bpe and unigram: join lets runs of blanks be tokens, as suits source code (the default of"
        " bbpe); split makes each blank one, or the start of one (the default of bpe and unigram)",
    )


def _add_split_flags(add: Callable[..., Any], default: Options) -> None:
    """What is for validation."""
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
        "--val-input",
        action="append",
        type=_source,
        dest="val_inputs",
        metavar="SRC",
        help="token files for validation, in the place of --val-split; repeatable",
    )
    add("--eos-id", type=id_number, metavar="N", help="of token files: the id that ends a document (Megatron's say so)")
    add("--token-dtype", choices=("uint16", "uint32"), help="of token files that do not say it (default: uint16)")


def _add_content_flags(add: Callable[..., Any], default: Options) -> None:
    """What else decides the result."""
    add(
        "--augment",
        type=_augmentations,
        default=(),
        metavar="KINDS",
        help="comma-separated: case (flips a tenth of the letters), punctuation (drops half of the marks), whitespace"
        " (changes a third of the blanks); each adds one altered copy of every training document",
    )
    add("--normalize", choices=("nfc", "nfkc"), help="bring text into this Unicode form before anything looks at it")
    add("--min-chars", type=positive_int, metavar="N", help="leave shorter documents out")
    add("--max-chars", type=positive_int, metavar="N", help="leave longer documents out")
    known = "; ".join(f"{name} ({filter_.default:g}): {filter_.about}" for name, filter_ in FILTERS.items())
    add(
        "--filter",
        dest="filters",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help=f"keep only documents of which this is true; repeatable. {known}",
    )
    add(
        "--filter-module",
        type=Path,
        metavar="FILE",
        help="a Python file with filters of your own for --filter; it is run (docs/data.md has one)",
    )
    add(
        "--dedup",
        action="store_true",
        help="leave exact copies of earlier documents out; reads the input once more, and takes 24 to 48 bytes a"
        " document on the disk of --out meanwhile",
    )
    add("--seed", type=int, default=default.seed, metavar="N", help="of split and augmentation (default: %(default)s)")
    add(
        "--text-field",
        default=default.text_field,
        metavar="NAME",
        help="JSONL field, Parquet or dataset column (default: text)",
    )
    add("--skip-bad", action="store_true", help="count, and leave out, what is broken, no UTF-8 or cannot be spelled")
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
    add(
        "--workers",
        type=positive_int,
        metavar="N",
        help="processes (default: one per core, one fewer for byte and char; fewer for small input)",
    )
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


def _augmentations(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in text.split(",") if kind.strip()))
    if unknown := set(kinds) - set(AUGMENTATIONS):
        raise argparse.ArgumentTypeError(f"no '{unknown.pop()}'; there are {', '.join(AUGMENTATIONS)}")
    return kinds


def _source(text: str) -> str:
    if not text.strip():  # as a path the empty one is the current folder
        raise argparse.ArgumentTypeError("names nothing (a shell variable that is not set?); '.' is the current folder")
    return text


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:  # all files would be taken
        raise argparse.ArgumentTypeError("names nothing (a shell variable that is not set?); leave it out")
    return names


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 3/16, not '{text}'")
    return int(found[1]), int(found[2])
