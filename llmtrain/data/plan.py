"""What the processes that prepare one input in parts leave for each other on the file system they share.

    OUT.parts/
        plan/                  plan.json and tokenizer/, made by whichever process comes first and used by all
        part-00003-of-00016/   part.json and shards: one stretch of the input
        joined/                all of it together; renamed to OUT at once
        *.partial-HOST-kept/   what of such a folder is written, and a journal of what is finished of it
        *.lock

Each of these folders appears whole, by a rename. A stretch is a run of the chunks that the whole input is cut into, so
the parts, one after another, hold what a single process writes, for which all is one stretch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmtrain.data.corpus import BEGINNING, Position
from llmtrain.data.encode import Encoded
from llmtrain.data.lock import FileLock, is_locked
from llmtrain.data.progress_bar import Report
from llmtrain.data.shards import (
    MANIFEST,
    TOKENIZER_FOLDER,
    FileInfo,
    TokenizerInfo,
    check_inside,
    verify_files,
)
from llmtrain.data.staging import is_begun, sync_path
from llmtrain.data.survey import Outline
from llmtrain.data.tokenizer import id_dtype
from llmtrain.errors import CorruptError, UserError

PLAN = "plan.json"
PART = "part.json"
# Of a request: what is told by its digest, not by what the user typed.
CONTENT = {
    "files": "the input",
    "files_digest": "the input",
    "tokenizer_digest": "the tokenizer file",
    "filter_digest": "the code of a filter",
}


# What files and tokenizers mean: one more whenever the same ones would give other ids, so that no shards of both kinds
# are put together.
READING = 2


class Stretch(BaseModel):
    """What one part prepares: so many chunks from a position on; None: all."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    start: Position = BEGINNING
    chunks: int | None = Field(default=0, ge=0)
    source_bytes: int = Field(default=0, ge=0)


class Plan(BaseModel):
    """`plan.json`: what all parts must agree on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["llmtrain-parts"] = "llmtrain-parts"
    version: Literal[1] = 1
    reading: int = 1  # `READING` of the process that made it
    llmtrain: str
    request: dict[str, Any]
    split_by: Literal["document", "tail"]
    tokenizer: TokenizerInfo
    duplicates: FileInfo | None = None
    not_given_back: tuple[str, str] | None = None
    stretches: tuple[Stretch, ...]

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """What holds all ids of the tokenizer."""
        return id_dtype(self.tokenizer.vocab_size)

    def difference(self, llmtrain: str, request: dict[str, Any], parts: int | None) -> str | None:
        """Say in what this plan is another than one would make now; None if in nothing."""
        if parts not in (None, (begun := len(self.stretches))):
            return f"it was begun in {begun} part{'s' * (begun > 1)}, not {parts}"
        for key in {**request, **self.request}:
            value = request.get(key)
            if self.request.get(key) != value:
                if key in CONTENT:
                    return f"{CONTENT[key]} was changed since"
                flag = {"inputs": "input"}.get(key, key).replace("_", "-")
                return f"it was begun with --{flag} {_plain(self.request.get(key))}, not {_plain(value)}"
        if self.reading != READING:
            return (
                f"it was begun by a llmtrain that read the same files otherwise (reading {self.reading}, not {READING})"
            )
        return None if llmtrain == self.llmtrain else f"it was begun by llmtrain {self.llmtrain}, this is {llmtrain}"


class PartRecord(BaseModel):
    """`part.json`: the plan that a part followed, and what it wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    plan_sha256: str
    encoded: Encoded

    def files(self) -> list[FileInfo]:
        """Every file that the part wrote."""
        shards = [shard for split in self.encoded.splits.values() for shard in split.shards]
        return [file for shard in shards for file in shard.files()]

    def size(self) -> int:
        """How many bytes these are."""
        return sum(file.bytes for file in self.files())


class PartsFolder:
    """`OUT.parts`: where its things are, and reading them back, checked."""

    def __init__(self, out: Path):
        real = Path(os.path.realpath(out))  # also of a link in a circle, which is told where OUT is looked at
        self.path = real.with_name(f"{real.name}.parts")
        self.plan = self.path / "plan"
        self.joined = self.path / "joined"
        self.tokenizer = self.plan / TOKENIZER_FOLDER

    def part(self, number: int, count: int) -> Path:
        """The folder of part `number` (from 1) of `count`."""
        return self.path / f"part-{number:05d}-of-{count:05d}"

    def missing(self, count: int) -> list[int]:
        """The numbers of the parts that are not done."""
        return [number for number in range(1, count + 1) if not self.part(number, count).is_dir()]

    def has_plan(self) -> bool:
        """Whether there is one.

        Raises:
            UserError: that cannot be seen.
        """
        try:
            return self.plan.is_dir()
        except OSError as error:
            raise UserError(f"{self.plan}: cannot be read ({error.strerror})") from error

    def read_plan(self) -> Plan:
        """Read the plan and check the files of its tokenizer.

        Raises:
            UserError: there is none, or it is damaged.
        """
        plan = self._read(self.plan / PLAN, Plan)
        self._check(self.plan, PLAN, [*plan.tokenizer.files, *([plan.duplicates] if plan.duplicates else [])])
        return plan

    def read_part(self, number: int, count: int, report: Report | None = None) -> PartRecord:
        """Read what a part wrote, and check that it followed this plan.

        Args:
            number: of the part, from 1.
            count: of all parts.
            report: is given where all its files are to be read and their hashes compared; told of the bytes read.

        Raises:
            UserError: it is not there, damaged, or of another plan.
        """
        folder = self.part(number, count)
        record = self._read(folder / PART, PartRecord)
        if record.plan_sha256 != self.plan_hash():
            raise UserError(f"{folder}: was made by another plan than {self.plan / PLAN}; {self.advice(folder)}")
        splits = record.encoded.splits.values()
        problems = [line for split in splits for line in split.contradictions()]
        if any(len(shard.files()) != 2 for split in splits for shard in split.shards):
            problems.append("refers to files elsewhere, which no part does")
        if problems:
            raise UserError(f"{folder / PART}: damaged (a split {problems[0]}); {self.advice(folder)}")
        if report is not None:
            self._check(folder, PART, record.files(), report)
        return record

    def plan_hash(self) -> str:
        """What parts record of the plan they follow: it holds the hashes of the tokenizer."""
        try:
            return hashlib.sha256((self.plan / PLAN).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{self.plan / PLAN}: cannot be read ({error.strerror})") from error

    def advice(self, folder: Path) -> str:
        """What to do about a damaged folder in here."""
        damaged = self.path if folder == self.plan else folder
        return f"delete {damaged} and run {'all parts' if folder == self.plan else 'that part'} again"

    def publish(self, out: Path) -> None:
        """Make OUT of what is joined, unless another process was faster."""
        try:
            self.joined.rename(out.resolve())
            sync_path(self.path.parent)
        except OSError as error:
            if not (out / MANIFEST).is_file():
                raise UserError(f"{out}: cannot be written ({error.strerror}); {self.joined} is whole") from error

    def has_more_than_plan(self) -> bool:
        """Whether something was made by a plan: something whole, or a journal of what is finished."""
        whole = (self.joined, *self.path.glob("part-?????-of-?????"))
        return any(path.is_dir() for path in whole) or any(is_begun(path) for path in self.path.glob("*.partial-*"))

    def remove_if_free(self) -> bool:
        """Delete all of it, unless a process may be at something in here that all wait for; return whether it did.

        The locks are held meanwhile and go last, so whoever waits for one finds no half of what was here.
        """
        if not self.path.is_dir():
            return True
        there = set(self.path.glob("*.lock"))
        if any(is_locked(path) is not False for path in there):
            return False
        always = {path.with_name(f"{path.name}.lock") for path in (self.plan, self.joined)}
        locks = [FileLock(path) for path in there | always]
        try:
            if any(lock.acquire() for lock in locks):
                return False
            self.remove()
            return True
        except OSError:  # no room for a lock, or not ours
            return False
        finally:
            for lock in locks:
                lock.release()

    def remove(self) -> None:
        """Delete all of it, when OUT is there; what another process is holding on to may be left for the next call.

        What was made by the plan goes before it: one that is killed meanwhile leaves nothing without its plan.
        """
        paths = list(self.path.glob("*"))
        for path in sorted(paths, key=lambda path: (path.suffix == ".lock", path == self.plan)):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self, path: Path, kind: type[Kind]) -> Kind:
        try:
            return kind.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: damaged ({where}: {first['msg']}); {self.advice(path.parent)}") from error

    def _check(
        self, folder: Path, name: str, files: list[FileInfo], report: Callable[[int], None] = lambda _: None
    ) -> None:
        try:
            for file in files:
                check_inside(folder, file.path, folder / name)
        except CorruptError as error:
            raise UserError(f"{error}; {self.advice(folder)}") from error
        if problems := verify_files(folder, files, report):
            raise UserError(f"{problems[0]}; {self.advice(folder)}")


Kind = TypeVar("Kind", Plan, PartRecord)


def cut_evenly(outlines: Iterable[Outline], total_bytes: int, parts: int) -> tuple[Stretch, ...]:
    """Deal the chunks of an input out to parts, in order and by their size in the input files.

    Args:
        outlines: of all chunks, in order.
        total_bytes: of the input files.
        parts: how many; some have no chunk where there are fewer chunks.
    """
    stretches = [Stretch()] * parts
    done = 0
    for outline in outlines:
        # It belongs where its middle lies.
        middle = done + outline.source_bytes // 2
        part = min(parts - 1, middle * parts // max(1, total_bytes))
        before = stretches[part]
        stretches[part] = Stretch(
            start=before.start if before.chunks else outline.start,
            chunks=(before.chunks or 0) + outline.chunks,
            source_bytes=before.source_bytes + outline.source_bytes,
        )
        done += outline.source_bytes
    return tuple(stretches)


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
