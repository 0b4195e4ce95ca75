"""Existing token files become prepared data without being copied: the manifest refers to ranges of them.

    find the files → open the tokenizer → cut each file into a range for training and one for validation
    → read every range once, in a few threads: ids within the vocabulary, hash, document ends → manifest

All that is written is the manifest, the tokenizer, and 8 bytes for each document.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain import __version__
from llmtrain.cores import usable_cores
from llmtrain.data.ends import EndsWriter
from llmtrain.data.files import digest_of
from llmtrain.data.outside import Ids, TokenRange, hash_samples, place_in_file, read_blocks
from llmtrain.data.progress_bar import Report, progress_bar
from llmtrain.data.recipe import Options, Outcome, check_unused, find_existing, save_tokenizer
from llmtrain.data.shards import (
    MANIFEST,
    Manifest,
    ShardInfo,
    SplitInfo,
    outside_vocabulary,
)
from llmtrain.data.staging import Say, staged_folder
from llmtrain.data.token_files import TokenFile, find_token_files
from llmtrain.data.tokenizer import FITTED_KINDS, Tokenizer, existing_digest, fit_tokenizer
from llmtrain.data.tokenizer_none import NoTokenizer
from llmtrain.errors import UserError, require_utf8

TEXT_FLAGS = {
    "--augment": "augment",
    "--text-field": "text_field",
    "--skip-bad": "skip_bad",
    "--dedup": "dedup",
    "--include, --language, --max-file-bytes": "selection",
    "--filter, --filter-module, --normalize, --min-chars, --max-chars": "refine",
    "--digits, --whitespace": "pieces",
    "--seed": "seed",
    "--shard-tokens": "shard_tokens",
}
SPLIT_FLAGS = {"--val-split": "val_split", "--val-by": "val_by"}
THREADS = 8  # of which each hashes a file: hashing lets the others run


@dataclass(frozen=True)
class Piece:
    """What one shard of the result refers to: tokens `first` to before `last` of a file."""

    name: str  # of the shard
    file: TokenFile
    first: int
    last: int

    @property
    def bytes(self) -> int:
        """Of its ids."""
        return (self.last - self.first) * self.file.itemsize


def adopt(options: Options, *, say: Say, show_progress: bool = False) -> Outcome:
    """Write prepared data that refers to the token files of `options.inputs`, or find that it was written before.

    Raises:
        UserError: files that are damaged, hold other ids than the tokenizer has, or are too few; nothing is left.
    """
    check_unused(options, TEXT_FLAGS, "for text only; token files are used as they are")
    train, val = find_token_files(options.inputs, options.val_inputs, options.token_dtype)
    train = train[: options.max_files]
    if val:
        check_unused(options, SPLIT_FLAGS, f"nothing is set aside, as {val[0].path} is for validation; leave it out")
    options.check_names()
    for file in train + val:
        require_utf8(str(file.path))
    request = _request(options, train, val)
    if (existing := find_existing(options.out, request)) is not None:
        return Outcome(existing, already_prepared=True)
    tokenizer = _tokenizer(options)
    _check_dtypes(train + val, tokenizer.vocab_size)
    pieces = _pieces(train, val, options)
    with staged_folder(options.out, say=say) as folder:
        started = time.perf_counter()
        info = save_tokenizer(folder, tokenizer)
        every = [piece for split in pieces.values() for piece in split]
        with progress_bar("checking", sum(piece.bytes for piece in every), show_progress) as report:
            shards = dict(_scan(folder, every, tokenizer.vocab_size, options, report))
        splits = {name: _split([shards[piece.name] for piece in split]) for name, split in pieces.items()}
        widest = max((piece.file for piece in every), key=lambda file: file.itemsize).dtype
        recipe = {
            "llmtrain": __version__,
            "split_by": None if options.val_split == 0 or val else options.val_by,
            "skipped": {},
            "unknown_tokens": {},
            "request": request,
        }
        manifest = Manifest(dtype=widest, tokenizer=info, splits=splits, recipe=recipe)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return Outcome(manifest, False, 0.0, time.perf_counter() - started)


def _request(options: Options, train: list[TokenFile], val: list[TokenFile]) -> dict[str, Any]:
    return {
        "inputs": list(options.inputs),
        "val_inputs": list(options.val_inputs),
        "files": len(train) + len(val),
        "files_digest": _digest(train + val),
        "tokenizer": options.tokenizer,
        "tokenizer_digest": existing_digest(options.tokenizer) if options.tokenizer != NoTokenizer.kind else None,
        "vocab_size": options.vocab_size,
        "val_split": options.val_split,
        "val_by": options.val_by,
        "max_files": options.max_files,
        "token_dtype": options.token_dtype,
        "eos_id": options.eos_id,
    }


def _digest(files: Sequence[TokenFile]) -> str:
    return digest_of((file.path, file.file_bytes, file.modified_ns) for file in files)


def _tokenizer(options: Options) -> Tokenizer:
    """The tokenizer that the ids belong to, which must exist: none can be fitted to ids."""
    first = options.inputs[0]
    if options.tokenizer == NoTokenizer.kind:
        if options.vocab_size is None:
            raise UserError(
                f"{first}: token ids belong to a tokenizer; name it: --tokenizer with a tokenizer.json or SentencePiece"
                " .model, or byte; or say --vocab-size N alone, if there is none to be had"
            )
        if options.eos_id is not None and options.eos_id >= options.vocab_size:
            raise UserError(f"--eos-id {options.eos_id}: outside the vocabulary of {options.vocab_size}")
        return NoTokenizer(options.vocab_size, options.eos_id)
    if options.tokenizer in FITTED_KINDS:
        raise UserError(
            f"{first}: holds token ids, to which no {options.tokenizer} tokenizer can be fitted; name the file of the"
            " one that they belong to"
        )
    tokenizer = fit_tokenizer(options.tokenizer, (), options.vocab_size)
    if options.eos_id is not None and options.eos_id >= tokenizer.vocab_size:
        raise UserError(f"--eos-id {options.eos_id}: outside the vocabulary of {tokenizer.vocab_size}")
    return tokenizer


def _check_dtypes(files: Sequence[TokenFile], vocab_size: int) -> None:
    for file in files:
        if vocab_size > 2 ** (8 * file.itemsize):
            hint = "its ids belong to another tokenizer" if file.header_bytes or file.index else "--token-dtype uint32?"
            raise UserError(
                f"{file.path}: is read as {file.dtype}, which cannot hold a vocabulary of {vocab_size}; {hint}"
            )


def _pieces(train: list[TokenFile], val: list[TokenFile], options: Options) -> dict[str, list[Piece]]:
    """Cut the training files in two, unless there are validation files; each piece becomes one shard."""
    if not train:
        raise UserError(f"{', '.join(options.inputs)}: no token files for training in it")
    cuts = [file.tokens if val or not options.val_split else cut(file, options) for file in train]
    ranges = {"train": [(file, 0, at) for file, at in zip(train, cuts, strict=True)]}
    if val:
        ranges["val"] = [(file, 0, file.tokens) for file in val]
    elif options.val_split:
        ranges["val"] = [(file, at, file.tokens) for file, at in zip(train, cuts, strict=True) if at < file.tokens]
        if not ranges["val"]:
            raise UserError(
                f"{', '.join(options.inputs)}: no place between two documents to set {options.val_split:g} aside; use"
                " --val-by tail or name validation files by --val-input"
            )
    return {
        split: [Piece(f"{split}-{number:05d}", *part) for number, part in enumerate(parts)]
        for split, parts in ranges.items()
    }


def cut(file: TokenFile, options: Options) -> int:
    """How many tokens of a file are for training; the rest, its end, is for validation.

    The cut is where the share says (`tail`), or at the end of a document nearest to there (`document`); `auto` takes
    that if it changes the share by less than half. A file without any stays whole for training under `document`.
    """
    target = int(file.tokens * (1 - options.val_split))
    target = min(max(1, target), max(1, file.tokens - 1))
    if options.val_by == "tail":
        return target
    index = file.read_index()
    found = index.boundaries(target) if index else _boundaries(file, target, options.eos_id)
    inside = [at for at in found if 0 < at < file.tokens]
    nearest = min(inside, key=lambda at: abs(at - target), default=file.tokens)
    if options.val_by == "document":
        return nearest
    wanted = file.tokens - target
    return nearest if wanted < 2 * (file.tokens - nearest) < 3 * wanted else target


def _boundaries(file: TokenFile, target: int, eos_id: int | None) -> Iterator[int]:
    """As `MegatronIndex.boundaries`, by the ids: a document ends with the end-of-document id."""
    if eos_id is None:
        return
    stored, itemsize = np.dtype(file.dtype).newbyteorder("<"), file.itemsize
    step = 1 << 16
    for end in range(target - 1, 0, -step):
        begin = max(0, end - step)
        (block,) = read_blocks(file.path, stored, file.header_bytes + begin * itemsize, (end - begin) * itemsize)
        if len(found := np.flatnonzero(block == eos_id)):
            yield begin + int(found[-1]) + 1
            break
    position = target - 1
    begin = file.header_bytes + position * itemsize
    for block in read_blocks(file.path, stored, begin, (file.tokens - position) * itemsize):
        if len(found := np.flatnonzero(block == eos_id)):
            yield position + int(found[0]) + 1
            return
        position += len(block)


def _scan(
    folder: Path, pieces: list[Piece], vocab_size: int, options: Options, report: Report
) -> Iterator[tuple[str, ShardInfo]]:
    """Read all pieces, several at a time; yield name and shard of each, or raise what is wrong with the first."""
    stop, lock = threading.Event(), threading.Lock()

    def told(done: int) -> None:
        with lock:
            report(done)

    def scan(piece: Piece) -> ShardInfo:
        try:
            return _Scanner(folder, piece, vocab_size, options.eos_id).run(stop, told)
        except OSError as error:
            raise UserError(f"{piece.file.path}: cannot be read ({error.strerror or error})") from error

    with ThreadPoolExecutor(min(options.workers or len(usable_cores()), THREADS)) as pool:
        try:
            yield from zip((piece.name for piece in pieces), pool.map(scan, pieces), strict=True)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


class _Scanner:
    """Reads one piece once."""

    def __init__(self, folder: Path, piece: Piece, vocab_size: int, eos_id: int | None):
        self._folder, self._piece, self._vocab_size, self._eos_id = folder, piece, vocab_size, eos_id
        self._digest = hashlib.sha256()

    def run(self, stop: threading.Event, report: Any) -> ShardInfo:
        """Check the ids, write the document ends, and describe the piece."""
        piece, file = self._piece, self._piece.file
        stored = np.dtype(file.dtype).newbyteorder("<")
        begin, position = file.header_bytes + piece.first * file.itemsize, 0
        with contextlib.closing(EndsWriter(self._folder / f"{piece.name}.ends")) as ends:
            for block in read_blocks(file.path, stored, begin, piece.bytes):
                if stop.is_set():
                    raise UserError(f"{file.path}: not read to its end, as another file is wrong")
                self._check(block, position)
                self._digest.update(block.view(np.uint8).data)
                if self._eos_id is not None and file.index is None:
                    ends.append(np.flatnonzero(block == self._eos_id) + position + 1)
                position += len(block)
                report(block.nbytes)
            if index := file.read_index():
                for several in index.ends(piece.first, piece.last):
                    ends.append(several - piece.first)
            documents, info = ends.finish(position)
        tokens = TokenRange(
            path=str(file.path),
            file_bytes=file.file_bytes,
            dtype=file.dtype,
            header_bytes=file.header_bytes,
            first=piece.first,
            bytes=piece.bytes,
            sha256=self._digest.hexdigest(),
            sample_sha256=hash_samples(file.path, begin, piece.bytes),
        )
        return ShardInfo(tokens=position, documents=documents, ids=tokens, ends=info)

    def _check(self, block: Ids, position: int) -> None:
        if int(block.max()) < self._vocab_size:
            return
        file = self._piece.file
        at = int(np.argmax(block >= self._vocab_size))
        place = place_in_file(file.header_bytes, self._piece.first + position + at, file.itemsize)
        raise UserError(outside_vocabulary(file.path, int(block[at]), place, self._vocab_size))


def _split(shards: list[ShardInfo]) -> SplitInfo:
    return SplitInfo(
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=0,  # not known: it would have to be decoded
        shards=tuple(shards),
    )
