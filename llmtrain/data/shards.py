"""The on-disk token format: write, verify, memory-map.

A prepared folder holds::

    manifest.json           what is here: dtype, vocabulary, splits, every file with its size and SHA-256
    tokenizer/              the tokenizer the ids belong to
    train-00000.bin         token ids, little-endian uint16 or uint32, nothing else in the file
    train-00000.ends        int64: for each document that ends in this shard, the position in it after its last token
    val-00000.bin  …

A split is one stream: shard after shard, document after document, each document closed by the end-of-document id.
Documents may lie across two shards. A folder without `manifest.json` is not prepared data: it is written last.
Where existing token files are used in place, there is no `.bin`: the shard refers to a range of such a file instead.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmtrain.data.outside import SHA256, TokenRange, check_range, hash_samples, read_blocks
from llmtrain.data.reading import IdFile, Ids, Int64s, RowReader
from llmtrain.errors import CorruptError, UserError
from llmtrain.storage.again import again

MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SAMPLED_SHARDS = 32
Report = Callable[[int], None]  # takes the number of bytes that were just dealt with


class FileInfo(BaseModel):
    """One file of the folder: relative path, size in bytes, SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=SHA256)


class ShardInfo(BaseModel):
    """One shard: its tokens (a file of the folder, or part of one elsewhere), and the documents that end in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    ids: FileInfo | TokenRange = Field(union_mode="left_to_right")  # nothing is both, and this is faster
    ends: FileInfo
    sample_sha256: str | None = Field(default=None, pattern=SHA256)  # `hash_samples` of a file of the folder

    def files(self) -> list[FileInfo]:
        """Its files that lie in the folder."""
        return [self.ids, self.ends] if isinstance(self.ids, FileInfo) else [self.ends]

    def path(self, folder: Path) -> Path:
        """Where its ids are."""
        return folder / self.ids.path  # which is absolute where it is elsewhere

    @property
    def end_byte(self) -> int:
        """Where its ids end in their file."""
        return self.ids.bytes + (self.ids.begin if isinstance(self.ids, TokenRange) else 0)

    def place(self, position: int) -> str:
        """Name the place of the id at `position`."""
        return self.ids.place(position) if isinstance(self.ids, TokenRange) else f"position {position}"

    def blocks(self, folder: Path, dtype: np.dtype[Any]) -> Iterator[Ids]:
        """Yield all ids, a few megabytes at a time; `dtype` is that of the folder's own files."""
        if isinstance(self.ids, TokenRange):
            return read_blocks(Path(self.ids.path), self.ids.stored, self.ids.begin, self.ids.bytes)
        return read_blocks(folder / self.ids.path, dtype.newbyteorder("<"), 0, self.ids.bytes)


class SplitInfo(BaseModel):
    """One split: its size in tokens, documents and bytes of UTF-8 text, and its shards in stream order."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    text_bytes: int = Field(ge=0)
    shards: tuple[ShardInfo, ...]

    def contradictions(self) -> list[str]:
        """Say which totals are not the sums over the shards."""
        sums = {what: sum(getattr(shard, what) for shard in self.shards) for what in ("tokens", "documents")}
        said = {what: getattr(self, what) for what in sums}
        return [f"counts {said[what]} {what}, its shards {held}" for what, held in sums.items() if held != said[what]]


class TokenizerInfo(BaseModel):
    """The tokenizer the ids belong to; `sha256` is over its files and decides whether two are the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    vocab_size: int = Field(gt=0)
    sha256: str
    files: tuple[FileInfo, ...]


class DataIdentity(Protocol):
    """What tells data from other data."""

    @property
    def tokenizer(self) -> TokenizerInfo:
        """That its ids were made with."""

    def fingerprint(self) -> str:
        """Equal exactly when the token streams are equal."""


class Manifest(BaseModel):
    """`manifest.json` of a prepared folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["llmtrain-tokens"] = "llmtrain-tokens"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerInfo
    splits: dict[str, SplitInfo]
    recipe: dict[str, Any]  # how it was made: inputs, options, counts of what was skipped

    def files(self) -> list[FileInfo]:
        """Every file of the folder that the manifest vouches for."""
        return [file for shard in self.shards() for file in shard.files()] + list(self.tokenizer.files)

    def shards(self) -> list[ShardInfo]:
        """The shards of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    def outside(self) -> list[TokenRange]:
        """What lies elsewhere and is used in place."""
        return [shard.ids for shard in self.shards() if isinstance(shard.ids, TokenRange)]

    def fingerprint(self) -> str:
        """SHA-256 over the content (not the names or the recipe): equal exactly when the token streams are equal."""
        content = {
            "dtype": self.dtype,
            "tokenizer": self.tokenizer.sha256,
            "splits": {k: [self._content(s.ids) for s in v.shards] for k, v in sorted(self.splits.items())},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _content(self, ids: FileInfo | TokenRange) -> str:
        """What is in a file of ids; the same bytes are other ids in another width than the others'."""
        if isinstance(ids, TokenRange) and ids.dtype != self.dtype:
            return f"{ids.sha256} {ids.dtype}"
        return ids.sha256


class TokenStream:
    """One split as one long sequence of token ids.

    Opening it looks at all file sizes, and at a few pages of at most `SAMPLED_SHARDS` files; ids are read when they are
    asked for.

    Raises:
        CorruptError: a shard is missing, has another size than the manifest says or another content, or the manifest
            contradicts itself.
    """

    def __init__(self, folder: Path, split: SplitInfo, dtype: str, vocab_size: int):
        for problem in split.contradictions():  # found here, or in the middle of a run
            raise CorruptError(f"{folder / MANIFEST}: a split {problem}; prepare the data again")
        self.dtype = np.dtype(dtype)
        self.vocab_size = vocab_size
        self.tokens = split.tokens
        self._folder = folder
        self._shards = [shard for shard in split.shards if shard.tokens]
        self._reader = RowReader(_checked_files(folder, self._shards, self.dtype), self.dtype)
        for number in sampled(len(self._shards)):
            _check_samples(folder, self._shards[number])
        self.bounds = self._reader.bounds  # of shards that hold tokens
        self._has_wrong_ids = vocab_size <= np.iinfo(self.dtype).max  # or there is no id outside the vocabulary

    def __len__(self) -> int:
        return self.tokens

    def gather(self, starts: npt.NDArray[np.int64], length: int) -> Ids:
        """Read `length` tokens from each of `starts`, across shard boundaries.

        Args:
            starts: (rows,) positions in the stream, each at most `len(self) - length`.

        Returns:
            (rows, length) ids in the stored dtype, in one fresh buffer.

        Raises:
            CorruptError: a shard is gone or was cut off; or an id is outside the vocabulary, and where.
        """
        rows = self._reader.rows(starts, length)
        self.refuse_wrong_ids(rows, starts)
        return rows

    def fill(self, target: Ids, begins: Int64s, lengths: Int64s, starts: Int64s) -> None:
        """Fill stretches of an array with the tokens from each start on; ids not checked. See `RowReader.fill`."""
        self._reader.fill(target, begins, lengths, starts)

    def has_wrong_id(self, rows: Ids) -> bool:
        """Whether an id is outside the vocabulary: one pass over a few kilobytes that are in the cache already.

        A wrong id would corrupt memory on a GPU.
        """
        return self._has_wrong_ids and rows.size > 0 and int(np.maximum.reduce(rows, axis=None)) >= self.vocab_size

    def refuse_wrong_ids(self, rows: Ids, starts: npt.NDArray[np.int64]) -> None:
        """Check the rows that were read from these starts.

        Raises:
            CorruptError: an id is outside the vocabulary, and where.
        """
        if not self.has_wrong_id(rows):
            return
        row, column = (int(i[0]) for i in np.nonzero(rows >= self.vocab_size))
        position = int(starts[row]) + column
        shard = bisect_right(self.bounds, position) - 1
        info, place = self._shards[shard], position - self.bounds[shard]
        raise CorruptError(
            outside_vocabulary(info.path(self._folder), int(rows[row, column]), info.place(place), self.vocab_size)
        )


def sampled(shards: int) -> range:
    """The numbers of those shards, spread evenly, of which more is looked at than their sizes when they are opened."""
    return range(0, shards, -(-shards // SAMPLED_SHARDS) or 1)


class TokenDataset:
    """A prepared folder, opened and checked for what is cheap to check (names and sizes)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)

    def split(self, name: str) -> TokenStream:
        """Memory-map the split called `name`.

        Raises:
            UserError: there is no such split.
            CorruptError: what `TokenStream` finds.
        """
        if name not in self.manifest.splits:
            raise UserError(f"{self.path}: no split '{name}'; it has {', '.join(self.manifest.splits)}")
        return TokenStream(
            self.path, self.manifest.splits[name], self.manifest.dtype, self.manifest.tokenizer.vocab_size
        )

    def check_tokenizer(self) -> None:
        """Raise CorruptError if the tokenizer's files, which are small, are not those that the ids were made with."""
        for problem in verify_files(self.path, list(self.manifest.tokenizer.files)):
            raise CorruptError(f"{problem}; prepare the data again")

    def check(self) -> None:
        """Raise CorruptError for any damage that can be seen without reading the files."""
        for file in self.manifest.files():
            _check_size(self.path / file.path, file.bytes)
        for name in self.manifest.splits:
            self.split(name)


def outside_vocabulary(path: Path, token: int, place: str, vocab_size: int) -> str:
    """Say which id is wrong; `place` is as in ``position 7``."""
    return (
        f"{path}: token id {token} at {place} is outside the vocabulary of {vocab_size}; was it prepared "
        "with another tokenizer?"
    )


def _checked_files(folder: Path, shards: Sequence[ShardInfo], dtype: np.dtype[Any]) -> list[IdFile]:
    """Where the ids of shards lie; there may be thousands, each of which costs what is done here."""
    own, prefix, files = dtype.newbyteorder("<"), f"{folder}/", list[IdFile]()  # a Path takes longer
    for shard in shards:
        ids, begin, stored = shard.ids, 0, own
        if isinstance(ids, FileInfo):
            path = prefix + ids.path
        else:
            path, begin, stored = ids.path, ids.begin, ids.stored
        if ids.bytes != shard.tokens * stored.itemsize or stored.itemsize > dtype.itemsize:
            raise CorruptError(f"{path}: the manifest counts {shard.tokens} tokens in {ids.bytes} bytes of {dtype}")
        if isinstance(ids, FileInfo):
            _check_size(path, ids.bytes)
        else:
            check_range(ids, folder / MANIFEST)
        files.append(IdFile(path, begin, shard.tokens, stored))
    return files


def _check_samples(folder: Path, shard: ShardInfo) -> None:
    if isinstance(shard.ids, FileInfo) and shard.sample_sha256:
        path = f"{folder}/{shard.ids.path}"
        if hash_samples(path, 0, shard.ids.bytes) != shard.sample_sha256:
            raise CorruptError(f"{path}: was changed since it was prepared; prepare the data again")


def _check_size(path: str | Path, expected: int) -> None:
    if not _has_size(path, expected) and (problem := _size_problem(path, expected)):
        raise CorruptError(f"{problem}; prepare the data again")


def _has_size(path: str | Path, expected: int) -> bool:
    """Whether it has that size at the first try; of thousands of shards that takes a third less."""
    try:
        return os.stat(path).st_size == expected  # noqa: PTH116 -- a Path takes as long again
    except OSError:
        return False


def _size_problem(path: str | Path, expected: int) -> str | None:
    try:
        actual = again(lambda: Path(path).stat().st_size)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None if actual == expected else f"{path}: has {actual} bytes where the manifest says {expected}; truncated?"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`: its fields, and that every path stays inside the folder."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = "no such folder" if not folder.is_dir() else f"no {MANIFEST} in it"
        source = "stdlib" if folder.name == "stdlib" else "YOUR_TEXTS"
        raise UserError(
            f"{folder}: not prepared data ({hint}); make it: llmtrain prepare --input {source} --out {folder}"
        ) from error
    except NotADirectoryError as error:
        raise UserError(
            f"{folder}: a file, not prepared data; make it: llmtrain prepare --input {folder} --out data/{folder.stem}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    collects = gc.isenabled()
    gc.disable()  # of the thousands of objects that are made here, all stay
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"{path}: {where}: {first['msg']}; prepare the data again") from error
    finally:
        if collects:
            gc.enable()
    # Of thousands of files, but for the tokenizer's a name without more, which is no link, lies in the folder.
    names = {file.path for file in manifest.files()}
    links = {entry.name for entry in os.scandir(folder) if entry.is_symlink()}
    for name in names & {"", ".", "..", *links} | ({name for name in names if "/" in name}):
        check_inside(folder, name, path)
    return manifest


def check_inside(folder: Path, name: str, manifest: Path) -> None:
    """Refuse a name from a manifest that leads out of its folder (absolute, through `..`, or through a link)."""
    try:
        is_inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # which one depends on Python's version
        raise CorruptError(f"{manifest}: names '{name}', a link that leads in a circle; refused") from error
    if not is_inside:
        raise CorruptError(f"{manifest}: names '{name}', which lies outside the folder; refused")


def hash_file(path: Path, report: Report = lambda _bytes: None, begin: int | None = None) -> str:
    """SHA-256 of a file, or of its first `begin` bytes, read in pieces, each of which is reported."""
    digest = hashlib.sha256()
    memory = memoryview(bytearray(1 << 20))  # the same for all pieces: fresh pages cost more than the hashing
    left = sys.maxsize if begin is None else begin
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(memory[:left]):
            digest.update(memory[:count])
            left -= count
            report(count)
    return digest.hexdigest()


def describe(path: Path) -> FileInfo:
    """What a manifest says of a file beside it."""
    return FileInfo(path=path.name, bytes=path.stat().st_size, sha256=hash_file(path))


def verify_files(
    folder: Path,
    files: Iterable[FileInfo],
    report: Report = lambda _bytes: None,
    read: Callable[[Path, Report], str | None] = hash_file,
) -> list[str]:
    """Compare every file with its recorded size and hash, several at a time; return one line for each that differs.

    `read` reads a file and returns its hash; None: it is not to be compared.
    """

    def problem(info: FileInfo) -> str | None:
        path = folder / info.path
        if wrong := _size_problem(path, info.bytes):
            return wrong
        try:
            found = again(lambda: read(path, report))
        except OSError as error:  # a bad disk says so only when it is read
            return f"{path}: cannot be read ({error.strerror})"
        except CorruptError as error:
            return str(error)
        return None if found in (None, info.sha256) else f"{path}: content differs from the hash in the manifest"

    with ThreadPoolExecutor(max_workers=8) as pool:
        return [line for line in pool.map(problem, files) if line]
