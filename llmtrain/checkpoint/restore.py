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
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from llmtrain.data.shards import FileInfo, Report
from llmtrain.engine import Engine, Fragment
from llmtrain.engine.rendezvous import is_exchange_failure
from llmtrain.errors import CorruptError, LlmtrainError, Stopped, StuckError

_ROUND_S = 1.0
_MOST_TOLD = 3  # problems, of each rank and in all: a lost disk has thousands


class Reader(Protocol):
    """What the training state, or the weights of it, can be read from."""

    @property
    def folder(self) -> Path:
        """Where it lies."""

    @property
    def digest(self) -> str:
        """Equal exactly where the content is."""

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""

    def check_records(self, report: Report = ...) -> list[str]:
        """See `CheckpointReader`."""

    def tensor_files(self) -> list[FileInfo]:
        """Those whose hashes are known, and so are checked."""

    def load(
        self, wanted: Iterable[Fragment], check: Collection[str], *, is_shared: bool = ..., report: Report = ...
    ) -> list[str]:
        """See `CheckpointReader`."""


Opened = TypeVar("Opened", bound=Reader)
Choose = Callable[[Callable[[Path], Opened]], Opened | None]  # takes what opens a folder and loads it on all ranks


@dataclass(frozen=True, slots=True)
class _Round:
    """What a rank says after each while of reading."""

    is_over: bool
    problems: tuple[str, ...] = ()  # of the checkpoint
    failure: tuple[type[LlmtrainError], str] | None = None  # of something else: no other checkpoint would help
    is_told: bool = False  # to stop
    is_stuck: bool = False  # it gave up waiting for its storage


class _TogetherError(Exception):
    """All ranks leave at the same place, each with what it has to say."""

    def __init__(self, here: Exception):
        super().__init__(str(here))
        self.here = here


class Restorer(Generic[Opened]):
    """Fills the engine's state on all ranks from a checkpoint that rank 0 chooses."""

    def __init__(self, engine: Engine, timeout_s: float, is_told: Callable[[], bool], opened: Callable[[Path], Opened]):
        """Know how to read.

        Args:
            engine: to be filled.
            timeout_s: how long a rank may read nothing at all.
            is_told: whether this rank was told to stop.
            opened: opens a folder.
        """
        self._engine, self._timeout_s, self._is_told, self._opened = engine, timeout_s, is_told, opened
        self._is_stuck = False  # some rank's storage, at the last load
        self.told: list[str] = []  # on rank 0, of what was loaded last: how much that was, and how long it took

    def restore(
        self,
        choose: Choose[Opened],
        accept: Callable[[Opened], object],
        *,
        optimizer: bool = True,
    ) -> Opened | None:
        """Let rank 0 choose among checkpoints; load each that it opens, until one is good. All ranks call it.

        Args:
            choose: called on rank 0, with what opens a checkpoint and loads it on all ranks.
            accept: called on rank 0 before one is loaded; raises what speaks against it.
            optimizer: load all of the training state, not the weights only.

        Returns:
            the one that was chosen, on all ranks; `Engine.publish` is left to be called.

        Raises:
            Stopped: a rank was told to stop.
            UserError: the checkpoint does not hold what this run needs.
            LlmtrainError: what `choose` and `accept` raise, on rank 0 only; see `together`.
            CorruptError: the chosen one cannot be opened on this rank.
        """
        try:
            return self._follow(optimizer) if self._engine.rank else self._lead(choose, accept, optimizer)
        except _TogetherError as error:
            raise error.here from error.here.__cause__

    def meanwhile(self, work: Callable[[], None]) -> None:
        """On rank 0, while it chooses: do what may take long; the others hear again and again that it is not done.

        Raises:
            Stopped: this rank was told to stop.
        """

        def run(_report: Report) -> list[str]:
            work()
            return []

        job = _Work(run)
        while not job.is_over:
            job.wait(min(_ROUND_S, self._timeout_s / 4))
            if self._is_told():
                raise _stopped()
            if not job.is_over:
                self._call(None, is_chosen=False)
        if job.failure:
            raise job.failure

    def _lead(
        self,
        choose: Choose[Opened],
        accept: Callable[[Opened], object],
        optimizer: bool,
    ) -> Opened | None:
        try:
            chosen = choose(lambda folder: self._open(folder, accept, optimizer))
        except _TogetherError:
            raise
        except Exception as error:
            if not is_exchange_failure(error):
                self._call(None, is_chosen=True)
            raise
        self._call(chosen, is_chosen=True)
        return chosen

    def _follow(self, optimizer: bool) -> Opened | None:
        """What the other ranks do while rank 0 chooses."""
        while True:
            folder, digest, is_chosen = self._engine.gather(("", "", False))[0]
            if is_chosen:
                return self._opened(Path(folder)) if folder else None
            if folder:
                self._load(Path(folder), digest, optimizer)

    def _call(self, reader: Opened | None, *, is_chosen: bool) -> None:
        """Rank 0 says what comes next: a checkpoint to load, what was chosen, or that it is not so far yet."""
        self._engine.gather((str(reader.folder), reader.digest, is_chosen) if reader else ("", "", is_chosen))

    def _open(self, folder: Path, accept: Callable[[Opened], object], optimizer: bool) -> Opened:
        reader = self._opened(folder)  # where this fails, the others need not hear of it
        self._check_records(reader)
        accept(reader)
        self._call(reader, is_chosen=False)
        began = time.monotonic()
        if problems := self._load(folder, reader.digest, optimizer):
            kind = StuckError if self._is_stuck else CorruptError
            raise kind("; ".join(problems[:_MOST_TOLD]))
        size = sum(file.bytes for file in reader.tensor_files())
        self.told = [f"read and checked {size / 1e6:,.1f} MB in {time.monotonic() - began:.2f} s"]
        return reader

    def _check_records(self, reader: Opened) -> None:
        work = _Work(reader.check_records)
        while not work.is_over:
            work.wait(min(_ROUND_S, self._timeout_s / 4))
            if self._is_told():
                raise _stopped()
            if work.idle_s > self._timeout_s:
                raise StuckError(self._unreadable(reader.folder))
            if not work.is_over:
                self._call(None, is_chosen=False)
        if work.failure:
            raise work.failure
        if work.problems:
            raise CorruptError("; ".join(work.problems[:_MOST_TOLD]))

    def _load(self, folder: Path, digest: str, optimizer: bool) -> list[str]:
        """Load what this rank needs and check its share; return what any rank found wrong, the same on all."""
        work = self._start_loading(folder, digest, optimizer)
        given_up: tuple[str, ...] = ()  # for good, also where the storage answers after all
        while True:
            work.wait(min(_ROUND_S, self._timeout_s / 4))
            if work.idle_s > self._timeout_s:
                work.abandon()
                given_up = (self._unreadable(folder),)
            is_over = work.is_over  # before what it found, or that would be what it had found until then
            problems = given_up or tuple(work.problems[:_MOST_TOLD])
            here = _Round(is_over, problems, _told(work.failure), self._is_told(), bool(given_up))
            rounds = self._engine.gather(here)
            if any(told.is_told for told in rounds):
                work.abandon()
                raise _TogetherError(_stopped())
            if all(told.is_over for told in rounds):
                break
        self._is_stuck = any(told.is_stuck for told in rounds)
        failed = [told.failure for told in rounds if told.failure]
        if failed:
            kind, text = failed[0]
            raise _TogetherError(work.failure or kind(text))
        return [line for told in rounds for line in told.problems]

    def _start_loading(self, folder: Path, digest: str, optimizer: bool) -> _Work:
        try:
            wanted = self._engine.to_fill(optimizer=optimizer)  # here, for ranks may talk in it
        except Exception as error:  # no memory for the optimizer's state, say: the others must hear of it
            if is_exchange_failure(error):
                raise
            return _Work.failed(error)
        return _Work(lambda report: self._read(folder, digest, wanted, report))

    def _read(self, folder: Path, digest: str, wanted: list[Fragment], report: Report) -> list[str]:
        """Load and check on this rank; return what is wrong."""
        place = f" ({self._place})" if self._engine.rank else ""
        try:
            reader = self._opened(folder)
            if reader.digest != digest:
                line = f"{folder}: is another checkpoint here than on rank 0; all hosts must see the same run.dir"
                return [f"{line}{place}"]
            lines = reader.load(wanted, self._share(reader), is_shared=self._is_alike(wanted), report=report)
        except CorruptError as error:
            return [f"{error}{place}"]
        return [f"{line}{place}" for line in lines]

    def _unreadable(self, folder: Path) -> str:
        return f"{folder}: nothing could be read from it for {self._timeout_s:g} s ({self._place})"

    @property
    def _place(self) -> str:
        return f"rank {self._engine.rank} on {platform.node()}"

    def _is_alike(self, wanted: list[Fragment]) -> bool:
        """Whether all ranks want the same: whole tensors."""
        return self._engine.world_size > 1 and all(f.values.numel() == math.prod(f.shape) for f in wanted)

    def _share(self, reader: Opened) -> set[str]:
        """The files that this rank checks: where it can, those that it has to read anyway."""
        ranks, rank = self._engine.world_size, self._engine.rank
        is_same = reader.world_size == ranks
        writers = {f"rank{one:05d}": one for one in range(ranks)} if is_same else {}
        owned = [(writers.get(re.split("[-.]", file.path)[0]), file) for file in reader.tensor_files()]
        dealt = share([file for owner, file in owned if owner is None], ranks)[rank]
        return {file.path for file in [*dealt, *(file for owner, file in owned if owner == rank)]}


def _stopped() -> Stopped:
    return Stopped("stopped by a signal while the checkpoint was read: nothing to save; the same command goes on")


def _told(failure: Exception | None) -> tuple[type[LlmtrainError], str] | None:
    if failure is None:
        return None
    return (type(failure), str(failure)) if isinstance(failure, LlmtrainError) else (LlmtrainError, repr(failure))


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
        self.failure: Exception | None = None  # not of what is read: raised when the others have been told
        self._is_abandoned = False
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(work,), name="loading", daemon=True)
        self._thread.start()

    @classmethod
    def failed(cls, failure: Exception) -> _Work:
        """Work that could not be begun."""

        def fail(_report: Report) -> list[str]:
            raise failure

        return cls(fail)

    def _run(self, work: Callable[[Report], list[str]]) -> None:
        try:
            self.problems = work(self._note)
        except _AbandonedError:
            return
        except Exception as error:  # of whatever kind
            self.failure = error

    def _note(self, _bytes: int) -> None:
        if self._is_abandoned:  # the state may be filled from elsewhere by now
            raise _AbandonedError
        self._last = time.monotonic()

    def abandon(self) -> None:
        """Use nothing of what is read from now on."""
        self._is_abandoned = True

    @property
    def is_over(self) -> bool:
        return self._is_abandoned or not self._thread.is_alive()

    @property
    def idle_s(self) -> float:
        """Seconds since something was read."""
        return 0.0 if self.is_over else time.monotonic() - self._last

    def wait(self, seconds: float) -> None:
        """Wait for the end, but not longer than this."""
        self._thread.join(0.0 if self._is_abandoned else seconds)
