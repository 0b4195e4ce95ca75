"""What is finished of a folder of shards, so that a prepare that was killed goes on behind it.

Whenever a chunk has finished a shard, all that is written is synced, and then a line is added to the journal: how many
chunks are done, and where each split is. A process that comes later takes the last whole line and drops what was
written after it. So nothing is lost but the shards that were open, and of these only what came since the line.

What can still grow is copied before it is gone on with, and the copy takes its name: a process that was taken for dead,
on a node that has lost its network, then writes into files that have none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmtrain.data.corpus import BEGINNING, Position
from llmtrain.data.shard_writer import NOTHING, ShardWriter, WriterState
from llmtrain.data.shards import ShardInfo, hash_file, verify_files
from llmtrain.data.staging import Say, sync_path
from llmtrain.errors import UserError

_AT_ONCE = 1 << 20


class Done(BaseModel):
    """What is done of an input: so many chunks, of which the last began at a position, and what they came to."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    plan_sha256: str = ""
    chunks: int = Field(default=0, ge=0)
    last: Position = BEGINNING
    source_bytes: int = Field(default=0, ge=0)
    splits: dict[str, WriterState] = {}
    skipped: dict[str, int] = {}
    unknown: dict[str, int] = {}
    sources: dict[str, dict[int, int]] = {}


def chunks_done(journal: Path, plan_sha256: str) -> int:
    """How many chunks are done by a journal; 0 where there is none, or it is damaged or of another plan."""
    with suppress(OSError, ValueError, IndexError):
        data = journal.read_bytes()
        last = Done.model_validate_json(data[: data.rfind(b"\n") + 1].splitlines()[-1])
        return last.chunks if last.plan_sha256 == plan_sha256 else 0
    return 0


class Journal:
    """The lines about one folder, in a file beside it.

    Args:
        path: the file; what is in it is read, and what it says is done is checked, at once.
        folder: of the shards.
        plan_sha256: what another plan has made is not gone on with.
        say: is told that work goes on.

    Raises:
        UserError: what was finished is damaged, or cannot be read now; it stays.
    """

    def __init__(self, path: Path, folder: Path, plan_sha256: str, say: Say):
        self._path, self._folder, self._plan_sha256, self._say = path, folder, plan_sha256, say
        path.touch()
        sync_path(path.parent)
        try:
            self.done = self._read()
        except ValueError as error:
            problem = str(error)
            if isinstance(error, ValidationError):
                problem = f"{path.name} is damaged ({error.errors()[0]['msg']})"
            raise UserError(
                f"{path.parent}: cannot be gone on with: {problem}; mend that, or delete the folder to make it again"
            ) from error

    def add(self, writers: Mapping[str, ShardWriter], done: Done) -> None:
        """Note `done`, and the plan and where all writers are, whatever it says of these."""
        states = {name: writer.sync() for name, writer in writers.items()}
        sync_path(self._folder)
        noted = done.model_copy(update={"plan_sha256": self._plan_sha256, "splits": states})
        line = noted.model_dump_json() + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> Done:
        """Put the lines together; one that was not written to its end is dropped. ValueError: something is damaged."""
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        lines = [Done.model_validate_json(line) for line in data[:whole].splitlines()]
        if lines and lines[-1].plan_sha256 != self._plan_sha256:
            self._say(f"{self._path}: of another plan; what it made is made again")
            whole = 0
        give_own(self._path, whole, self._path.with_suffix(".tmp"))
        if not whole:
            return Done()
        splits = dict[str, WriterState]()
        for name, last in lines[-1].splits.items():
            shards = tuple(shard for line in lines for shard in line.splits.get(name, NOTHING).shards)
            splits[name] = last.model_copy(update={"shards": shards})
        count = sum(len(state.shards) for state in splits.values())
        finished = f"{count:,} finished shard{'s' if count > 1 else ''}"
        self._say(f"going on behind {finished} in {self._folder}; first the hashes are compared")
        self._check(splits)
        return lines[-1].model_copy(update={"splits": splits})

    def _check(self, splits: Mapping[str, WriterState]) -> None:
        finished = [file for state in splits.values() for shard in state.shards for file in shard.files()]
        for problem in verify_files(self._folder, finished):
            raise ValueError(problem)
        for file in (file for state in splits.values() for file in (state.open_ids, state.open_ends) if file):
            path = self._folder / file.path
            if not path.is_file() or hash_file(path, begin=file.bytes) != file.sha256:
                raise ValueError(f"{path} was changed")
            give_own(path, file.bytes, self._path.with_suffix(".tmp"))  # not among the shards


class Copied(BaseModel):
    """A shard of a join that is whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    plan_sha256: str
    split: str
    number: int = Field(ge=0)
    shard: ShardInfo


def copied(journal: Path, plan_sha256: str) -> list[Copied]:
    """What is whole by the journal of a join; nothing where it is damaged or of another plan."""
    with suppress(OSError, ValueError):
        data = journal.read_bytes()
        lines = [Copied.model_validate_json(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        return lines if all(line.plan_sha256 == plan_sha256 for line in lines) else []
    return []


class JoinJournal:
    """The lines about the shards of a join, each of which is copied on its own.

    Args:
        path: the file; what it says is whole is checked at once, and what is not, or is of another plan, dropped.
        folder: of the shards.
        plan_sha256: of the parts.
        say: is told that work goes on.
    """

    def __init__(self, path: Path, folder: Path, plan_sha256: str, say: Say):
        self._path, self._folder, self._plan_sha256 = path, folder, plan_sha256
        path.touch()
        found = copied(path, plan_sha256)
        if found:
            joined = f"{len(found):,} joined shard{'s' if len(found) > 1 else ''}"
            say(f"going on behind {joined} in {folder}; first the hashes are compared")
        with ThreadPoolExecutor(max_workers=8) as pool:  # there may be terabytes
            are_whole = list(pool.map(lambda line: self._is_whole(line.shard), found))
        kept_lines = (line for line, is_whole in zip(found, are_whole, strict=True) if is_whole)
        self.whole = {(line.split, line.number): line.shard for line in kept_lines}
        kept = [self._line(*place, shard) for place, shard in self.whole.items()]
        own = path.with_suffix(".tmp")
        own.unlink(missing_ok=True)
        own.write_text("".join(kept), encoding="utf-8")
        sync_path(own)
        own.replace(path)
        sync_path(path.parent)

    def add(self, split: str, number: int, shard: ShardInfo) -> None:
        """Note a shard that is written, once it is on the disk."""
        for file in shard.files():
            sync_path(self._folder / file.path)
        sync_path(self._folder)
        with self._path.open("a", encoding="utf-8") as journal:
            journal.write(self._line(split, number, shard))
            journal.flush()
            os.fsync(journal.fileno())

    def _line(self, split: str, number: int, shard: ShardInfo) -> str:
        line = Copied(plan_sha256=self._plan_sha256, split=split, number=number, shard=shard)
        return line.model_dump_json() + "\n"

    def _is_whole(self, shard: ShardInfo) -> bool:
        return not verify_files(self._folder, shard.files())


def give_own(path: Path, size: int, own: Path) -> None:
    """Copy the first bytes of a file into its place, by way of `own`, as one that no other process has open."""
    own.unlink(missing_ok=True)
    with path.open("rb") as file, own.open("xb") as copy:
        while size and (data := file.read(min(size, _AT_ONCE))):
            size -= copy.write(data)
        copy.flush()
        os.fsync(copy.fileno())
    own.replace(path)
    sync_path(path.parent)
