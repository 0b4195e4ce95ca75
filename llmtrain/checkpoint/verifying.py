"""All ranks of a launch check a checkpoint's hashes together, each a share of the bytes.

Rank 0 decides which checkpoints to look at, and in which order; the others help it until it has decided. SHA-256 cannot
be split, so a file is read by one rank, which may take longer than `health.timeout_s`. So nobody waits for a whole
share: in every round a rank reads on for a while and then tells all others whether it is done. What ends the wait is a
file system that gives nothing for `health.timeout_s`.
"""

from __future__ import annotations

import heapq
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.store import OpenVerified
from llmtrain.data.shards import FileInfo, verify_files
from llmtrain.engine import Engine
from llmtrain.engine.rendezvous import is_exchange_failure
from llmtrain.errors import CorruptError, Stopped

_ROUND_S = 1.0
_MOST_TOLD = 3  # problems, of each rank and in all: a lost disk has thousands
Choose = Callable[[OpenVerified], CheckpointReader | None]


@dataclass(frozen=True, slots=True)
class _Round:
    """What a rank says after each while of reading."""

    is_done: bool
    problems: tuple[str, ...]
    is_told: bool  # to stop


def choose_together(
    engine: Engine, choose: Choose, timeout_s: float, is_told: Callable[[], bool]
) -> CheckpointReader | None:
    """Let rank 0 choose a checkpoint, and every rank check its share of each that is looked at; open it on all ranks.

    Args:
        engine: joins the ranks; only what they tell each other is used.
        choose: called on rank 0, with what opens a checkpoint and checks it on all ranks.
        timeout_s: how long a rank may read nothing at all.
        is_told: whether this rank was told to stop.

    Raises:
        Stopped: a rank was told to stop; on rank 0 only.
        LlmtrainError: what `choose` raises, on rank 0 only; see `together`.
        CorruptError: the chosen one cannot be opened on this rank.
    """
    if engine.rank:
        return _help(engine, timeout_s, is_told)
    chosen = None
    try:
        chosen = choose(lambda folder: _open_verified(engine, folder, timeout_s, is_told))
    except Exception as error:
        if not is_exchange_failure(error):
            _call(engine, None, None)
        raise
    _call(engine, None, chosen)
    return chosen


def _help(engine: Engine, timeout_s: float, is_told: Callable[[], bool]) -> CheckpointReader | None:
    """What the other ranks do while rank 0 chooses."""
    while True:
        folder, digest, is_chosen = engine.gather(("", "", False))[0]
        if is_chosen:
            return CheckpointReader(Path(folder))
        if not folder:
            return None
        _check_share(engine, Path(folder), digest, timeout_s, is_told)


def _call(engine: Engine, to_check: CheckpointReader | None, chosen: CheckpointReader | None) -> None:
    """Rank 0 says what comes next: a checkpoint to check, or the end, with what was chosen."""
    reader = to_check or chosen
    engine.gather((str(reader.folder), reader.digest, chosen is not None) if reader else ("", "", False))


def _open_verified(engine: Engine, folder: Path, timeout_s: float, is_told: Callable[[], bool]) -> CheckpointReader:
    reader = CheckpointReader(folder)  # where this fails, the others need not hear of it
    _call(engine, reader, None)
    problems = _check_share(engine, folder, reader.digest, timeout_s, is_told)
    if problems is None:
        raise Stopped("stopped by a signal while the checkpoint was checked: nothing to save; the same command goes on")
    if problems:
        raise CorruptError("; ".join(problems[:_MOST_TOLD]))
    return reader


def _check_share(
    engine: Engine, folder: Path, digest: str, timeout_s: float, is_told: Callable[[], bool]
) -> list[str] | None:
    """Check this rank's share of the files; return what any rank found wrong, the same on all; None: told to stop."""
    work = _Work(lambda report: _problems(engine, folder, digest, report))
    while True:
        work.wait(min(_ROUND_S, timeout_s / 4))
        problems = tuple(work.problems[:_MOST_TOLD])
        if is_stuck := work.idle_s > timeout_s:
            problems = (f"{folder}: nothing could be read from it for {timeout_s:g} s ({_place(engine)})",)
        rounds = engine.gather(_Round(work.is_done or is_stuck, problems, is_told()))
        if any(told.is_told for told in rounds):
            return None
        if all(told.is_done for told in rounds):
            work.raise_failure()
            return [line for told in rounds for line in told.problems]


def _problems(engine: Engine, folder: Path, digest: str, report: Callable[[int], None]) -> list[str]:
    place = f" ({_place(engine)})" if engine.rank else ""
    try:
        reader = CheckpointReader(folder)
    except CorruptError as error:
        return [f"{error}{place}"]
    if reader.digest != digest:
        return [f"{folder}: is another checkpoint here than on rank 0; all hosts must see the same run.dir{place}"]
    mine = share(list(reader.manifest.files), engine.world_size)[engine.rank]
    return [f"{line}{place}" for line in verify_files(folder, mine, report)]


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


class _Work:
    """Reading in a thread of its own, so that rounds go on meanwhile."""

    def __init__(self, work: Callable[[Callable[[int], None]], list[str]]):
        self.problems: list[str] = []
        self._failure: Exception | None = None
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(work,), name="verify", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Callable[[int], None]], list[str]]) -> None:
        try:
            self.problems = work(self._note)
        except Exception as error:  # a bug of ours: the others are told, then it is raised
            self._failure = error
            self.problems = [repr(error)]

    def _note(self, _bytes: int) -> None:
        self._last = time.monotonic()

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
