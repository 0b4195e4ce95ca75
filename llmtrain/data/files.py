"""The files of an input, in a fixed order: of files, folders, globs and `stdlib`, as the user typed them."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

from llmtrain.data.hub import PREFIX, DatasetShard, find_shards
from llmtrain.data.select import Selection
from llmtrain.errors import UserError

_FORMATS: dict[str, Literal["jsonl", "parquet"]] = {".jsonl": "jsonl", ".parquet": "parquet"}
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


def find(inputs: Sequence[str], max_files: int | None = None, selection: Selection = EVERYTHING) -> Found:
    """List the files of the inputs, in the order of the inputs and sorted within each.

    Args:
        inputs: files, folders (all files below, hidden ones left out), globs, or `stdlib`.
        max_files: keep only the first so many.
        selection: of the files in folders and globs.

    Raises:
        UserError: an input does not exist, matches nothing, is empty or cannot be read.
    """
    left_out = Counter[str]()
    files = list[SourceFile]()
    for number, source in enumerate(inputs):
        found, base = _files_of(source), _base_of(source)

        def is_taken(file: SourceFile, base: Path = base) -> bool:
            below = file.path.relative_to(base) if file.path.is_relative_to(base) else file.path
            return file.named or selection.takes(below, file.is_text, file.bytes, left_out)

        kept = [file for file in found if is_taken(file)]
        if not kept:
            reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
            raise UserError(f"{source}: none of its {len(found):,} files is taken ({reasons})")
        files += [replace(file, source=number) for file in kept] if number else kept
    return Found(files[:max_files], left_out)


def _base_of(source: str) -> Path:
    """The folder below which the files of a source lie."""
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


def leads_in_circle(path: Path) -> bool:
    """Whether a path goes through links that lead back to themselves."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _files_of(source: str) -> list[SourceFile]:
    if source == "stdlib":
        return _standard_library()
    if source.startswith(PREFIX):
        return [
            SourceFile(Path(f"{source}#{number}"), True, "dataset", "", found.bytes, found.stamp, found.shard)
            for number, found in enumerate(find_shards(source))
        ]
    path = Path(source)
    if path.is_dir():
        return _found(source, _walk(path), "a folder without files")
    if path.is_file():
        file = _describe(path, named=True)
        if file.bytes == 0:
            raise UserError(f"{source}: the file is empty")
        return [file]
    if glob.has_magic(source):
        matches = map(Path, glob.iglob(source, recursive=True))  # noqa: PTH207 -- may be absolute
        return _found(source, _once(match for match in matches if match.is_file()), "matches no file")
    if leads_in_circle(path):
        raise UserError(f"{source}: a link that leads in a circle")
    raise UserError(f"{source}: {'not a file or folder' if path.exists() else 'no such file or folder'}")


def _found(source: str, paths: list[Path], if_none: str) -> list[SourceFile]:
    if not paths:
        raise UserError(f"{source}: {if_none}")
    return [_describe(path, named=False) for path in paths]


def _once(matches: Iterable[Path]) -> list[Path]:
    """Each file by one of its paths, sorted: the first of the shortest; links that lead in circles make longer ones."""
    paths = dict[Path, Path]()
    for path in sorted(matches, key=lambda path: (len(path.parts), path)):
        paths.setdefault(path.resolve(), path)
    return sorted(paths.values())


def _walk(folder: Path) -> list[Path]:
    """All files below a folder, sorted by path; hidden files and folders are left out, as a glob leaves them out.

    Links to folders are followed, but each folder is taken once, by its own path where it has one: links may lead in
    circles, and text that comes twice would be trained on twice.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    paths, seen, waiting = list[Path](), set[Path](), [folder]
    while waiting:
        links = []
        for start in sorted(waiting):
            for parent, folders, names in os.walk(start, onerror=refuse):
                folders[:] = [name for name in folders if not name.startswith(".")]
                if (real := Path(parent).resolve()) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                links += [path for name in folders if (path := Path(parent, name)).is_symlink()]
                paths += [Path(parent, name) for name in names if not name.startswith(".")]
        waiting = links
    return sorted(path for path in paths if path.is_file())


def _standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in _walk(root) if path.suffix == ".py"]
    kept = [path for path in modules if not NOT_LIBRARY & set(path.relative_to(root).parts)]
    return _found("stdlib", kept, f"this Python has no library sources in {root}")


def _describe(path: Path, named: bool) -> SourceFile:
    compression = _COMPRESSIONS.get(path.suffix, "")
    inner = path.with_suffix("") if compression else path
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return SourceFile(path, named, _FORMATS.get(inner.suffix, "text"), compression, status.st_size, status.st_mtime_ns)
