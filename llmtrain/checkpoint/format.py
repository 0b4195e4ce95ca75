"""A checkpoint folder: what is in it, how it is written, and how any slice of it is read back.

::

    step-00000500/
      rank00000.safetensors   float fragments of this rank: key "<name>@<start>", 1-D; after 512 MiB
      rank00000-1.safetensors …   they go on in further files, for these are written and verified in parallel
      rank00000.json          what those files hold: size, SHA-256, and for each tensor its shape and fragments
      state.json              step, position in the data, best loss, meters: everything that is not a tensor
      config.yaml             the resolved config
      tokenizer/              so that the folder alone can generate
      manifest.json           size and SHA-256 of every file above, fingerprints, versions
      COMMITTED               SHA-256 of manifest.json; written last: without it the folder does not exist

A fragment is a 1-D slice of a flattened tensor, so ranks may hold any parts of it and a reader may ask for any other.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llmtrain import __version__
from llmtrain.checkpoint.folders import MARKER
from llmtrain.checkpoint.tensor_files import write_files
from llmtrain.checkpoint.tensor_reader import Wish, read_file
from llmtrain.data.shards import FileInfo, Report, check_inside, hash_file, verify_files
from llmtrain.data.staging import sync_path
from llmtrain.engine import Fragment
from llmtrain.errors import CorruptError, UserError
from llmtrain.storage.again import again

VERSION: Final = 1
MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
_TENSORS = ".safetensors"
_Model = TypeVar("_Model", bound=BaseModel)


class TensorInfo(BaseModel):
    """One tensor of the training state: its whole shape, and where its fragments are."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shape: tuple[int, ...]
    fragments: tuple[tuple[str, int, int], ...]  # (file, start, numel) in the flattened tensor

    def check(self, where: str) -> None:
        """Raise CorruptError unless the fragments hold every value exactly once: a gap would be read as any number."""
        reached = 0
        for _, start, numel in sorted(self.fragments, key=itemgetter(1, 2)):
            if start != reached or numel < 0:
                raise CorruptError(f"{where} has a gap or an overlap at value {min(start, reached)}")
            reached += numel
        if reached != math.prod(self.shape):
            raise CorruptError(f"{where} has {reached} of {math.prod(self.shape)} values")


class RankRecord(BaseModel):
    """`rankNNNNN.json`: one rank's files and the fragments in them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    files: tuple[FileInfo, ...]
    tensors: dict[str, TensorInfo]


class CheckpointManifest(BaseModel):
    """`manifest.json` of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["llmtrain-checkpoint"] = "llmtrain-checkpoint"
    version: Literal[1] = VERSION
    step: int
    engine: str
    world_size: int
    data_fingerprint: str
    tokenizer_sha256: str
    llmtrain_version: str
    torch_version: str
    files: tuple[FileInfo, ...]


def write_rank(folder: Path, rank: int, fragments: Iterable[Fragment]) -> None:
    """Write one rank's fragments and its record, hashed while written and flushed to disk."""
    files = write_files(folder, f"rank{rank:05d}", fragments)
    tensors: dict[str, TensorInfo] = {}
    for info, part in files:
        for f in part:
            before = tensors[f.name].fragments if f.name in tensors else ()
            here = (info.path, f.start, f.values.numel())
            tensors[f.name] = TensorInfo(shape=f.shape, fragments=(*before, here))
    # Rank 0 takes the record for a sign that this rank is done, so it must appear whole.
    record = RankRecord(files=tuple(info for info, _ in files), tensors=tensors)
    write_whole(folder / f"rank{rank:05d}.json", record.model_dump_json())


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file and flush it to disk."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: str) -> None:
    """Write a small file that is either not there or whole, at any moment."""
    unfinished = path.with_name(f".{path.name}")
    write_file(unfinished, content)
    unfinished.replace(path)


def describe_file(folder: Path, path: Path) -> FileInfo:
    """Size and hash of a file in the folder, for a manifest."""
    return FileInfo(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=hash_file(path))


def commit(folder: Path, manifest: CheckpointManifest) -> None:
    """Make the checkpoint exist: the manifest, then, when all is on disk, the marker."""
    text = manifest.model_dump_json(indent=1)
    write_file(folder / MANIFEST, text)
    sync_path(folder)
    write_whole(folder / MARKER, hashlib.sha256(text.encode()).hexdigest())
    sync_path(folder)
    sync_path(folder.parent)


class CheckpointReader:
    """A committed checkpoint: opened by its manifest alone, verified on request or while any slices of it are loaded.

    Raises:
        CorruptError: the manifest or a record is damaged, or names a file outside the folder.
        UserError: the manifest is whole, and of a version that is not known.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        text = _read_text(folder / MANIFEST)
        self.digest = hashlib.sha256(text.encode()).hexdigest()  # of the manifest, and so of the whole checkpoint
        if self.digest != _read_text(folder / MARKER).strip():
            raise CorruptError(f"{folder / MANIFEST}: differs from the hash in {MARKER}")
        _refuse_unknown_version(folder, text)
        self.manifest = _parse(CheckpointManifest, folder / MANIFEST, text)
        for file in self.manifest.files:
            check_inside(folder, file.path, folder / MANIFEST)
        self._tensors: dict[str, TensorInfo] | None = None

    def verify(self, report: Report = lambda _bytes: None) -> list[str]:
        """Check the size and hash of every file, in parallel; return one line for each that is wrong."""
        return verify_files(self.folder, list(self.manifest.files), report)

    def check_records(self, report: Report = lambda _bytes: None) -> list[str]:
        """Check all files but those of tensors: what says what is to be loaded, and where it goes.

        Returns:
            one line for each that is wrong.
        """
        records = [file for file in self.manifest.files if not file.path.endswith(_TENSORS)]
        return verify_files(self.folder, records, report)

    def tensor_files(self) -> list[FileInfo]:
        """The files that hold tensors."""
        return [file for file in self.manifest.files if file.path.endswith(_TENSORS)]

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return self.manifest.world_size

    def path(self, name: str) -> Path:
        """Where a file of the checkpoint lies.

        Raises:
            CorruptError: the manifest does not list it, so no hash vouches for what is there.
        """
        if all(file.path != name for file in self.manifest.files):
            raise CorruptError(f"{self.folder / MANIFEST}: lists no '{name}', so nothing vouches for what is there")
        return self.folder / name

    def state(self) -> dict[str, Any]:
        """The parsed `state.json`."""
        path = self.path(STATE)
        try:
            state: dict[str, Any] = json.loads(_read_text(path))
        except ValueError as error:
            raise CorruptError(f"{path}: not JSON: {error}") from error
        return state

    def tensors(self, report: Report = lambda _bytes: None) -> dict[str, TensorInfo]:
        """All tensors by name, the ranks' records joined."""
        if self._tensors is None:
            shapes: dict[str, tuple[int, ...]] = {}
            fragments: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
            for rank in range(self.manifest.world_size):
                path = self.path(f"rank{rank:05d}.json")
                text = _read_text(path)
                report(len(text))
                for name, info in _parse(RankRecord, path, text).tensors.items():
                    shapes[name] = info.shape
                    fragments[name] += info.fragments
            self._tensors = {
                name: TensorInfo(shape=shape, fragments=tuple(fragments[name])) for name, shape in shapes.items()
            }
            for name, joined in self._tensors.items():
                joined.check(f"{self.folder}: '{name}'")
        return self._tensors

    def load(
        self,
        wanted: Iterable[Fragment],
        check: Collection[str],
        *,
        is_shared: bool = False,
        report: Report = lambda _bytes: None,
    ) -> list[str]:
        """Fill the fragments' values with what was saved of them, and check the size and hash of the files named.

        Each file is read once, for both.

        Args:
            wanted: any slices of the saved tensors, on any device.
            check: paths of tensor files, as in the manifest.
            is_shared: other ranks read the same files.
            report: called with the number of bytes that were read, before they are used.

        Returns:
            one line for each file that is wrong; if there is one, what was filled is worth nothing.

        Raises:
            UserError: a tensor was not saved, or in another shape.
            CorruptError: a record is damaged or contradicts itself.
        """
        self.tensors(report)
        wishes: dict[str, list[Wish]] = {name: [] for name in check}
        for fragment in wanted:
            for name, wish in self._wishes(fragment):
                wishes.setdefault(name, []).append(wish)
        infos = {info.path: info for info in self.manifest.files}
        if strange := wishes.keys() - infos.keys():
            raise CorruptError(f"{self.folder}: a record names '{min(strange)}', which is not in the manifest")

        names = {self.folder / name: name for name in wishes}

        def read(path: Path, report: Report) -> str | None:
            name = names[path]
            sha256 = read_file(path, wishes[name], whole=name in check, is_shared=is_shared, report=report)
            return sha256 if name in check else None

        return verify_files(self.folder, [infos[name] for name in wishes], report, read)

    def _wishes(self, wanted: Fragment) -> Iterator[tuple[str, Wish]]:
        """Which parts of which files make up a slice."""
        info = self.tensors().get(wanted.name)
        if info is None:
            raise UserError(f"{self.folder}: holds no '{wanted.name}'; it was saved with another model or optimizer")
        if info.shape != wanted.shape:
            raise UserError(f"{self.folder}: '{wanted.name}' has shape {info.shape}, the run wants {wanted.shape}")
        begin, end = wanted.start, wanted.start + wanted.values.numel()
        for file, start, numel in info.fragments:
            low, high = max(begin, start), min(end, start + numel)
            if low < high:
                yield (
                    file,
                    Wish(f"{wanted.name}@{start}", numel, low - start, wanted.values[low - begin : high - begin]),
                )


def _read_text(path: Path) -> str:
    try:
        return again(lambda: path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path}: cannot be read: {error}") from error


def _refuse_unknown_version(folder: Path, manifest: str) -> None:
    """Not as damage: a run would go back, and put aside what another llmtrain can read."""
    try:
        content = json.loads(manifest)
    except (ValueError, RecursionError):
        return  # what is wrong then is said when it is parsed
    version = content.get("version", VERSION) if isinstance(content, dict) else VERSION
    if version != VERSION:
        raise UserError(
            f"{folder}: a checkpoint of format version {version}, written by llmtrain "
            f"{content.get('llmtrain_version')}; llmtrain {__version__} reads version {VERSION}: take the other one"
        )


def _parse(kind: type[_Model], path: Path, text: str) -> _Model:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
