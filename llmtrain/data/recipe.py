"""What to prepare and how, and what both ways to do it (in one process, in parts) have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from llmtrain import __version__
from llmtrain.cores import usable_cores
from llmtrain.data.corpus import ReadOptions, cut_into_chunks, told
from llmtrain.data.dedup import find_duplicates
from llmtrain.data.encode import Division, Encoded
from llmtrain.data.files import EVERYTHING, Found, SourceFile, digest, find, leads_in_circle
from llmtrain.data.filters import code_digest
from llmtrain.data.fit import choose_splitter, fit
from llmtrain.data.pieces import AS_USUAL, Pieces
from llmtrain.data.progress_bar import progress_bar
from llmtrain.data.refine import NO_CHANGE, NORMALIZED, Copies, Refinement
from llmtrain.data.round_trip import first_change
from llmtrain.data.select import Selection
from llmtrain.data.shards import MANIFEST, TOKENIZER_FOLDER, Manifest, TokenDataset, TokenizerInfo
from llmtrain.data.tokenizer import Tokenizer, existing_digest, id_dtype, tokenizer_info
from llmtrain.errors import CorruptError, LlmtrainError, UserError, require_utf8

# To start a worker takes a core one to two seconds, in which it encodes 10 to 150 MB by itself, as the tokenizer is.
BYTES_PER_WORKER = 64 << 20
_LIGHT = ("byte", "char")
CHUNKS_TRIED = 16  # in which the beginnings of documents are looked for that a tokenizer is tried on


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
    val_inputs: tuple[str, ...] = ()
    token_dtype: Literal["uint16", "uint32"] | None = None
    eos_id: int | None = None
    selection: Selection = EVERYTHING
    refine: Refinement = NO_CHANGE
    dedup: bool = False
    pieces: Pieces = AS_USUAL

    def find(self) -> Found:
        """The files of the input."""
        return find(self.inputs, self.max_files, self.selection, skip_bad=self.skip_bad, out=self.out)

    def reading(self, duplicates: Path | None = None) -> ReadOptions:
        """How documents are read; `duplicates` is what `find_duplicates` wrote of this input, if that was asked for."""
        return ReadOptions(self.text_field, self.skip_bad, self.refine, Copies(duplicates) if duplicates else None)

    def check_names(self) -> None:
        """Raise UserError where one that is recorded is not UTF-8."""
        for source in (*self.inputs, *self.val_inputs):
            require_utf8(source)
        for flag, text in (("--tokenizer", self.tokenizer), ("--text-field", self.text_field)):
            require_utf8(text, flag)
        for pattern in self.selection.patterns:
            require_utf8(pattern, "--include")

    def request(self, files: Sequence[SourceFile]) -> dict[str, Any]:
        """Everything that decides what is written, as JSON values: equal requests give equal data.

        Raises:
            UserError: something the user typed cannot be written as JSON.
        """
        self.check_names()
        chosen = {
            "include": list(self.selection.patterns),
            "max_file_bytes": self.selection.max_bytes,
            "normalize": self.refine.normalize,
            "min_chars": self.refine.min_chars,
            "max_chars": self.refine.max_chars,
            "filter": [f"{name}={value!r}" for name, value in self.refine.filters],
            "filter_digest": code_digest(name for name, _ in self.refine.filters),
            "dedup": self.dedup,
            "digits": self.pieces.digits,
            "whitespace": self.pieces.whitespace,
        }
        return {
            "inputs": list(self.inputs),
            "files": len(files),
            "files_digest": digest(files),
            "tokenizer": self.tokenizer,
            "tokenizer_digest": existing_digest(self.tokenizer),
            "vocab_size": self.vocab_size,
            "val_split": self.val_split,
            "val_by": self.val_by,
            "seed": self.seed,
            "augment": list(self.augment),
            "shard_tokens": self.shard_tokens,
            "max_files": self.max_files,
            "text_field": self.text_field,
            "skip_bad": self.skip_bad,
            # Named only where something is chosen: requests from before there was a choice stay what they are.
            **{name: value for name, value in chosen.items() if value not in (None, [], False)},
        }


@dataclass(frozen=True)
class Outcome:
    """What `prepare` did: the manifest, whether it stood there already, and how long each part took."""

    manifest: Manifest
    already_prepared: bool = False
    fit_seconds: float = 0.0
    encode_seconds: float = 0.0


def check_unused(options: Options, flags: Mapping[str, str], why: str) -> None:
    """Refuse options that were given and would do nothing.

    Args:
        options: as the user gave them.
        flags: the field of `Options` for each flag.
        why: what these flags are for.

    Raises:
        UserError: one of them has another value than by default.
    """
    for flag, field in flags.items():
        if getattr(options, field) != getattr(Options(), field):
            raise UserError(f"{flag}: {why}")


def divide(files: Sequence[SourceFile], options: Options, folder: Path, show_progress: bool = False) -> Division:
    """Decide which documents are left out as copies, if any are to be, and which are for validation.

    `folder` gets the file `DUPLICATES`, which is needed until all is encoded; see also `choose_splitter`.
    """
    reading, source = options.reading(), ", ".join(options.inputs)
    if options.dedup:
        workers = options.workers or default_workers(total_bytes(files))
        with progress_bar("looking for copies", total_bytes(files), show_progress) as report:
            chunks = cut_into_chunks(files, reading)
            reading = options.reading(find_duplicates(chunks, reading, folder, workers=workers, report=report))
    splitter = choose_splitter(
        source, files, reading, val_split=options.val_split, val_by=options.val_by, seed=options.seed
    )
    return Division(reading, splitter, options.augment, options.seed)


def fit_into(
    folder: Path, files: Sequence[SourceFile], division: Division, options: Options
) -> tuple[TokenizerInfo, tuple[str, str] | None]:
    """Fit the tokenizer and save it in its folder in `folder`.

    Returns:
        What the manifest says of it, and of the input what does not come back from it, and as what (`first_change`).
    """
    tokenizer = fit(files, division, options.tokenizer, options.vocab_size, options.pieces)
    chunks = islice(cut_into_chunks(files, division.reading), CHUNKS_TRIED)  # filters may leave nothing of them
    documents = division.documents(chunks, "train")
    return save_tokenizer(folder, tokenizer), first_change(tokenizer, documents)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> TokenizerInfo:
    """Save a tokenizer in its folder in `folder`; return what the manifest says of it."""
    (folder / TOKENIZER_FOLDER).mkdir()
    tokenizer.save(folder / TOKENIZER_FOLDER)
    return tokenizer_info(folder / TOKENIZER_FOLDER, tokenizer)


def write_manifest(
    folder: Path,
    encoded: Encoded,
    tokenizer: TokenizerInfo,
    split_by: Literal["document", "tail"],
    *,
    request: dict[str, Any],
    left_out: Counter[str],
    not_given_back: tuple[str, str] | None = None,
) -> Manifest:
    """Write the manifest of a folder whose shards and tokenizer are there.

    Args:
        folder: where they are.
        encoded: what was written.
        tokenizer: that of the ids.
        split_by: how the validation part was set aside.
        request: what was asked for.
        left_out: counts the files that were.
        not_given_back: of `first_change`.

    Raises:
        UserError: a split has no documents.
    """
    for name, split in encoded.splits.items():
        if split.documents == 0:
            why = f" ({told(encoded.skipped)})" if encoded.skipped else ""
            raise UserError(f"too little text: the {name} split is empty{why}; use --val-split 0 or more text")
    counts = Counter(encoded.skipped) + left_out
    changed = {NORMALIZED: count} if (count := counts.pop(NORMALIZED, 0)) else {}
    recipe = {
        "llmtrain": __version__,
        "split_by": split_by if request["val_split"] > 0 else None,
        "skipped": dict(sorted(counts.items())),
        "changed": changed,
        "unknown_tokens": {name: count for name, count in sorted(encoded.unknown.items()) if count},
        "documents_of_inputs": {
            name: [count.get(number, 0) for number in range(len(request["inputs"]))]
            for name, count in encoded.sources.items()
        },
        **({"not_given_back": not_given_back} if not_given_back else {}),
        "request": request,
    }
    manifest = Manifest(dtype=id_dtype(tokenizer.vocab_size), tokenizer=tokenizer, splits=encoded.splits, recipe=recipe)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def find_existing(out: Path, request: dict[str, Any]) -> Manifest | None:
    """Return the manifest of data that the same request made; None if there is nothing; refuse anything else."""
    if leads_in_circle(out):
        raise UserError(f"{out}: a link that leads in a circle")
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


def total_bytes(files: Sequence[SourceFile]) -> int:
    """The size of files as they lie on the disk."""
    return sum(file.bytes for file in files)


def default_workers(work_bytes: int, tokenizer: str | None = None) -> int:
    """One process per core, fewer for little work.

    A kind of tokenizer that has next to none leaves a core to who reads and writes, or two are slower than one alone.
    """
    cores = len(usable_cores()) - (tokenizer in _LIGHT)
    return max(1, min(cores, work_bytes // BYTES_PER_WORKER))
