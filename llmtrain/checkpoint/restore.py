"""All ranks of a launch load a checkpoint together, and check its hashes on the way, each a share of the bytes.

Rank 0 decides which checkpoints to try, and in which order; the others do as it does until it has decided. A file's
hash needs the whole file, which may take longer to read than `health.timeout_s`. So nobody waits for a whole share: in
every round a rank reads on for a while and then tells all others whether it is done. What ends the wait is a file
system that gives nothing for `health.timeout_s`.
"""

from __future__ import annotations

import heapq
import math
import platform
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.store import OpenVerified
from llmtrain.data.shards import FileInfo, Report
from llmtrain.engine import Engine, Fragment
from llmtrain.engine.rendezvous import is_exchange_failure
from llmtrain.errors import CorruptError, LlmtrainError, Stopped

_ROUND_S = 1.0
_MOST_TOLD = 3  # problems, of each rank and in all: a lost disk has thousands
Choose = Callable[[OpenVerified], CheckpointReader | None]


@dataclass(frozen=True, slots=True)
class _Round:
    """What a rank says after each while of reading."""

    is_done: bool
    problems: tuple[str, ...]
    is_told: bool  # to stop


class Restorer:
    """Fills the engine's state on all ranks from a checkpoint that rank 0 chooses."""

    def __init__(self, engine: Engine, timeout_s: float, is_told: Callable[[], bool]):
        """`timeout_s`: how long a rank may read nothing at all. `is_told`: whether this rank was told to stop."""
        self._engine, self._timeout_s, self._is_told = engine, timeout_s, is_told

    def restore(
        self, choose: Choose, accept: Callable[[CheckpointReader], object], *, optimizer: bool = True
    ) -> CheckpointReader | None:
        """Let rank 0 choose among checkpoints; load each that it opens, until one is good. All ranks call it.

        Args:
            choose: called on rank 0, with what opens a checkpoint and loads it on all ranks.
            accept: called on rank 0 before one is loaded; raises what speaks against it.
            optimizer: load all of the training state, not the weights only.

        Returns:
            the one that was chosen, on all ranks; `Engine.publish` is left to be called.

        Raises:
            Stopped: a rank was told to stop; on rank 0 only.
            LlmtrainError: what `choose` and `accept` raise, on rank 0 only; see `together`.
            CorruptError: the chosen one cannot be opened on this rank.
        """
        if self._engine.rank:
            return self._follow(optimizer)
        try:
            chosen = choose(lambda folder: self._open(folder, accept, optimizer))
        except Exception as error:
            if not is_exchange_failure(error):
                self._call(None, is_chosen=True)
            raise
        self._call(chosen, is_chosen=True)
        return chosen

    def _follow(self, optimizer: bool) -> CheckpointReader | None:
        """What the other ranks do while rank 0 chooses."""
        while True:
            folder, digest, is_chosen = self._engine.gather(("", "", False))[0]
            if is_chosen:
                return CheckpointReader(Path(folder)) if folder else None
            self._load(Path(folder), digest, optimizer)

    def _call(self, reader: CheckpointReader | None, *, is_chosen: bool) -> None:
        """Rank 0 says what comes next: a checkpoint to load, or what was chosen."""
        self._engine.gather((str(reader.folder), reader.digest, is_chosen) if reader else ("", "", is_chosen))

    def _open(self, folder: Path, accept: Callable[[CheckpointReader], object], optimizer: bool) -> CheckpointReader:
        reader = CheckpointReader(folder)  # where this fails, the others need not hear of it
        reader.check_records()
        accept(reader)
        self._call(reader, is_chosen=False)
        problems = self._load(folder, reader.digest, optimizer)
        if problems is None:
            raise Stopped(
                "stopped by a signal while the checkpoint was read: nothing to save; the same command goes on"
            )
        if problems:
            raise CorruptError("; ".join(problems[:_MOST_TOLD]))
        return reader

    def _load(self, folder: Path, digest: str, optimizer: bool) -> list[str] | None:
        """Load what this rank needs and check its share; return what any rank found wrong; None: told to stop."""
        wanted = self._engine.to_fill(optimizer=optimizer)  # here, for ranks may talk in it
        work = _Work(lambda report: self._read(folder, digest, wanted, report))
        while True:
            work.wait(min(_ROUND_S, self._timeout_s / 4))
            problems = tuple(work.problems[:_MOST_TOLD])
            if is_stuck := work.idle_s > self._timeout_s:
                work.abandon()
                place = _place(self._engine)
                problems = (f"{folder}: nothing could be read from it for {self._timeout_s:g} s ({place})",)
            rounds = self._engine.gather(_Round(work.is_done or is_stuck, problems, self._is_told()))
            if any(told.is_told for told in rounds):
                work.abandon()
                return None
            if all(told.is_done for told in rounds):
                work.raise_failure()
                return [line for told in rounds for line in told.problems]

    def _read(self, folder: Path, digest: str, wanted: list[Fragment], report: Report) -> list[str]:
        """Load and check on this rank; return what is wrong."""
        place = f" ({_place(self._engine)})" if self._engine.rank else ""
        try:
            reader = CheckpointReader(folder)
            if reader.digest != digest:
                line = f"{folder}: is another checkpoint here than on rank 0; all hosts must see the same run.dir"
                return [f"{line}{place}"]
            lines = reader.load(wanted, self._share(reader), is_shared=self._is_alike(wanted), report=report)
        except LlmtrainError as error:
            return [f"{error}{place}"]
        return [f"{line}{place}" for line in lines]

    def _is_alike(self, wanted: list[Fragment]) -> bool:
        """Whether all ranks want the same: whole tensors."""
        return self._engine.world_size > 1 and all(f.values.numel() == math.prod(f.shape) for f in wanted)

    def _share(self, reader: CheckpointReader) -> set[str]:
        """The files that this rank checks: where it can, those that it has to read anyway."""
        ranks, rank = self._engine.world_size, self._engine.rank
        is_same = reader.manifest.world_size == ranks
        names = [f"rank{one:05d}" for one in range(ranks)] if is_same else []
        own, others = [], []
        for file in reader.tensor_files():
            writer = re.split("[-.]", file.path)[0]
            if is_same and writer == names[rank]:
                own.append(file)
            elif writer not in names:
                others.append(file)
        return {file.path for file in [*own, *share(others, ranks)[rank]]}


def _place(engine: Engine) -> str:
    return f"rank {engine.rank} on {platform.node()}"


def share(files: list[FileInfo], ranks: int) -> list[list[FileInfo]]:
    """Deal files out so that all ranks read about as many bytes: each file, the largest first, to who has least."""
    shares: list[list[FileInfo]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for file in sorted(files, key=lambda file: (-file.bytes, file.path)):
        load, rank = loads[0]
        shares[rank].append(file)
        heapq.heapreplace(loads, (load + file.bytes, rank))
    return shares


class _AbandonedError(Exception):
    """Nobody waits any more for what is read."""


class _Work:
    """Reading in a thread of its own, so that rounds go on meanwhile."""

    def __init__(self, work: Callable[[Report], list[str]]):
        self.problems: list[str] = []
        self._is_abandoned = False
        self._failure: Exception | None = None
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(work,), name="loading", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Report], list[str]]) -> None:
        try:
            self.problems = work(self._note)
        except _AbandonedError:
            return
        except Exception as error:  # a bug of ours: the others are told, then it is raised
            self._failure = error
            self.problems = [repr(error)]

    def _note(self, _bytes: int) -> None:
        if self._is_abandoned:  # the state may be filled from elsewhere by now
            raise _AbandonedError
        self._last = time.monotonic()

    def abandon(self) -> None:
        """Use nothing of what is read from now on."""
        self._is_abandoned = True

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def idle_s(self) -> float:
        """Seconds since something was read."""
        return 0.0 if self.is_done else time.monotonic() - self._last

    def wait(self, seconds: float) -> None:
        """Wait for the end, but not longer than this."""
        self._thread.join(seconds)

    def raise_failure(self) -> None:
        """Raise what nobody foresaw."""
        if self._failure:
            raise self._failure
