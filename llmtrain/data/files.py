"""The files of an input, in a fixed order: of files, folders, globs and `stdlib`, as the user typed them."""

from __future__ import annotations

import errno
import glob
import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Literal

from llmtrain.data.hub import PREFIX, DatasetShard, find_shards
from llmtrain.data.select import Selection
from llmtrain.data.walk import Walked, is_prepared, made_for, matches, walk
from llmtrain.errors import UserError

_FORMATS: dict[str, Literal["jsonl", "parquet"]] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSIONS: dict[str, Literal["", ".gz", ".zst"]] = {".gz": ".gz", ".zst": ".zst"}
EVERYTHING = Selection()
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """One input file: what it holds, how it is compressed, and whether the user named it or it was found."""

    path: Path
    named: bool
    format: Literal["text", "jsonl", "parquet", "dataset"]
    compression: Literal["", ".gz", ".zst"]
    bytes: int
    modified_ns: int
    dataset: DatasetShard | None = None  # what it is part of, where it is no file of its own
    source: int = 0  # the number of the input that it is from
    identity: tuple[int, int] | None = None  # device and inode, of a file of its own: the same by whatever name

    @property
    def is_text(self) -> bool:
        """Whether the whole file is one document."""
        return self.format == "text"


@dataclass(frozen=True)
class Found:
    """The files of an input, and how many were left out of it, by reason."""

    files: list[SourceFile]
    left_out: Counter[str]


def find_files(
    inputs: Sequence[str], max_files: int | None = None, selection: Selection = EVERYTHING
) -> list[SourceFile]:
    """List the files of the inputs; see `find`."""
    return find(inputs, max_files, selection).files


def find(
    inputs: Sequence[str],
    max_files: int | None = None,
    selection: Selection = EVERYTHING,
    *,
    skip_bad: bool = False,
    out: Path | None = None,
) -> Found:
    """List the files of the inputs, in the order of the inputs and sorted within each.

    Args:
        inputs: files, folders (all files below, hidden ones left out), globs, or `stdlib`.
        max_files: keep only the first so many.
        selection: of the files in folders and globs.
        skip_bad: leave links that lead nowhere out.
        out: what is made of it, and is no part of it.

    Raises:
        UserError: an input does not exist, matches nothing, is empty or cannot be read; a link leads nowhere; or two
            inputs have a file in common.
    """
    left_out = Counter[str]()
    files = list[SourceFile]()
    for number, source in enumerate(inputs):
        found = _files_of(source, made_for(out))
        left_out.update(found.left_out)
        for link in found.dead_links:
            if selection.takes(_below(link, source), False, 0, left_out):
                left_out[_dead_link(link, skip_bad)] += 1
        kept = [
            file
            for file in found.files
            if file.named or selection.takes(_below(file.path, source), file.is_text, file.bytes, left_out)
        ]
        if not kept:
            raise UserError(f"{source}: none of its {len(found.files):,} files is taken ({_told(left_out)})")
        files += [replace(file, source=number) for file in kept] if number else kept
    _refuse_twice(files[:max_files], inputs)
    return Found(files[:max_files], left_out)


def _refuse_twice(files: Sequence[SourceFile], inputs: Sequence[str]) -> None:
    """Refuse a file that two inputs reach, by whatever names: it would be trained on twice, and be validated on.

    Within one input there may be links; nobody names it to have a file twice.
    """
    if len(inputs) == 1:
        return
    first = dict[object, SourceFile]()
    for file in files:
        other = first.setdefault(file.identity or file.path, file)
        # Some file systems give a number of a file again, so two that have it are looked at once more.
        if other.source != file.source and _are_same(file, other):
            also = "" if other.path == file.path else f" (as {other.path})"
            raise UserError(
                f"{file.path}: is taken by --input {inputs[other.source]}{also} and by --input {inputs[file.source]};"
                " name each file once (to train on some text more often, prepare it by itself and mix by data.sources)"
            )


def _are_same(file: SourceFile, other: SourceFile) -> bool:
    try:
        return file.dataset is not None or file.path.samefile(other.path)
    except OSError:  # removed just now, which is told by whoever reads it
        return False


def _told(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in left_out.items())


def _dead_link(link: Path, skip_bad: bool) -> str:
    """What a link that leads nowhere counts as; a file that is not there any more is missed, so it is refused."""
    if not skip_bad:
        raise UserError(f"{link}: {_nowhere(link)}; remove it, mend it, or leave such links out with --skip-bad")
    return "links that lead nowhere"


def _nowhere(link: Path) -> str:
    if leads_in_circle(link):
        return "a link that leads in a circle"
    return f"a link to {link.readlink()}, which is not there"


def _below(path: Path, source: str) -> Path:
    """A path from the folder on below which the files of a source lie."""
    base = _base_of(source)
    return path.relative_to(base) if path.is_relative_to(base) else path


@cache
def _base_of(source: str) -> Path:
    if source == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    return Path(*takewhile(lambda part: not glob.has_magic(part), Path(source).parts))


def digest(files: Iterable[SourceFile]) -> str:
    """SHA-256 over names, sizes and times of modification: changes when the input was changed."""
    return digest_of((file.path, file.bytes, file.modified_ns) for file in files)


def digest_of(entries: Iterable[tuple[Path, int, int]]) -> str:
    """SHA-256 over (path, bytes, time of modification) of files."""
    lines = (f"{path}\0{size}\0{modified_ns}\n" for path, size, modified_ns in entries)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def suffixes(path: Path) -> tuple[str, Literal["", ".gz", ".zst"]]:
    """What a file's name says it holds (`.jsonl`) and how it is compressed, whatever the case of its letters."""
    if compression := _COMPRESSIONS.get(path.suffix.lower(), ""):
        path = path.with_suffix("")
    return path.suffix.lower(), compression


def leads_in_circle(path: Path) -> bool:
    """Whether a path goes through links that lead back to themselves."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


@dataclass(frozen=True)
class _Listed:
    """The files of one input, before any are chosen; see `Walked`."""

    files: list[SourceFile]
    dead_links: Sequence[Path] = ()
    left_out: Counter[str] = field(default_factory=Counter)


def _files_of(source: str, own: Iterable[Path]) -> _Listed:
    if source == "stdlib":
        return _Listed(_standard_library())
    if source.startswith(PREFIX):
        return _Listed([
            SourceFile(Path(f"{source}#{number}"), True, "dataset", "", found.bytes, found.stamp, found.shard)
            for number, found in enumerate(find_shards(source))
        ])  # fmt: skip
    path = Path(source)
    if is_prepared(path) or is_prepared(_base_of(source)):
        raise UserError(f"{source}: holds data that was prepared, not text; llmtrain train takes it as data.path")
    if path.is_dir():
        return _listed(source, walk(path, own), "a folder without files")
    if path.is_file():
        file = _describe(path, named=True)
        if file.bytes == 0:
            raise UserError(f"{source}: the file is empty")
        return _Listed([file])
    if glob.has_magic(source):
        return _listed(source, matches(source, _base_of(source), own), "matches no file")
    if leads_in_circle(path):
        raise UserError(f"{source}: a link that leads in a circle")
    if path.is_symlink():
        raise UserError(f"{source}: {_nowhere(path)}")
    raise UserError(f"{source}: {'not a file or folder' if path.exists() else 'no such file or folder'}")


def _listed(source: str, walked: Walked, if_none: str) -> _Listed:
    if not walked.files and not walked.dead_links:
        but = f" (left out: {_told(walked.left_out)})" if walked.left_out else ""
        raise UserError(f"{source}: {if_none}{but}")
    return _Listed([_describe(path, named=False) for path in walked.files], walked.dead_links, walked.left_out)


def _standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in walk(root).files if path.suffix == ".py"]
    kept = [path for path in modules if not NOT_LIBRARY & set(path.relative_to(root).parts)]
    if not kept:
        raise UserError(f"stdlib: this Python has no library sources in {root}")
    return [_describe(path, named=False) for path in kept]


def _describe(path: Path, named: bool) -> SourceFile:
    inner, compression = suffixes(path)
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return SourceFile(
        path,
        named,
        _FORMATS.get(inner, "text"),
        compression,
        status.st_size,
        status.st_mtime_ns,
        identity=(status.st_dev, status.st_ino),
    )
