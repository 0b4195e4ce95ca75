"""The checkpoints of a run folder: saving behind the loop's back, links, finding the newest good one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain import __version__
from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import (
    BEST,
    FINAL,
    LATEST,
    MARKER,
    committed_steps,
    folder_of_runs,
    is_committed,
    listed,
    point,
    pointed,
    step_folder,
)
from llmtrain.checkpoint.retention import Retention
from llmtrain.checkpoint.room import Room
from llmtrain.checkpoint.snapshot import Snapshot
from llmtrain.config import CheckpointSection
from llmtrain.data.shards import TOKENIZER_FOLDER
from llmtrain.data.sources import TrainingData
from llmtrain.data.staging import sync_path
from llmtrain.engine import Engine, Fragment
from llmtrain.errors import CorruptError, UserError

OpenCheckpoint = Callable[[Path], fmt.CheckpointReader]  # which raises CorruptError where one is not good
_FORESEEN = (OSError, MemoryError)  # in a save; anything else is a bug
_PACKAGE = Path(__file__).parents[1]
_RECORDS_TIMEOUT_S = 1800.0  # how long rank 0 waits for the other ranks' files before it gives a save up
# The same once a rank is lost: who is still there has nothing else to do than to write its file.
_RECORDS_GRACE_S = 10.0
# A save that takes longer, and ten times as long as the last one, is told of: the loop notices only at the next save.
_LATE_S = 600.0


def check_writable(run_dir: Path) -> None:
    """Check, without writing, that the run folder can be made or written.

    Raises:
        UserError: it cannot.
    """
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{run_dir}: cannot be written: {existing} is not a folder; choose another run.dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{run_dir}: cannot be written: no permission in {existing}; choose another run.dir")


def find_checkpoint(path: Path) -> Path:
    """Resolve PATH of the verbs: a checkpoint itself, or a run folder (its best, else its latest checkpoint)."""
    if is_committed(path):
        return path
    steps = committed_steps(path) if path.is_dir() else []
    if not steps:
        reason = "no such folder" if not path.is_dir() else folder_of_runs(path) or "no finished checkpoint in it"
        raise UserError(f"{path}: {reason}; give a run folder or one of its step-* folders")
    return pointed(path, BEST) or step_folder(path, steps[-1])


def newest_good(
    run_dir: Path, warn: Callable[[str], None], open_one: OpenCheckpoint, before: int | None = None
) -> fmt.CheckpointReader | None:
    """The newest checkpoint (of a step below `before`) that `open_one` opens; damaged ones cost a warning.

    Raises:
        CorruptError: there are checkpoints, and none is good.
    """
    steps = [step for step in committed_steps(run_dir) if before is None or step < before]
    for step in reversed(steps):
        try:
            return open_one(step_folder(run_dir, step))
        except CorruptError as error:
            warn(f"{error}; going back to an older checkpoint")
    if steps:
        raise CorruptError(f"{run_dir}: none of its {len(steps)} checkpoints is good; nothing to resume from")
    return None


def clear_way(run_dir: Path, resumed_step: int, best_step: int | None, warn: Callable[[str], None]) -> None:
    """Leave only checkpoints up to the resumed step, so that new ones meet no older self, and set the links right.

    Step folders without a marker (an interrupted save or deletion) are removed; finished ones of later steps (damaged,
    or rewound past by `--resume PATH`) are renamed, not deleted.
    """
    steps = listed(run_dir, "step-")
    folders = {path: is_committed(path) for path in steps if path.name[5:].isdigit()}  # before anything is changed
    for path in folders:
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path}: leads to {path.readlink()}, which is not there; mount its disk, or delete the link"
            )
    for path in steps:  # nobody else fetches into the folder while we hold its lock
        if ".partial-" in path.name:
            warn(f"{path}: a fetch that was cut short, on this host or another; removed")
            _remove(path, warn)
    for path, is_whole in folders.items():
        if not is_whole:
            warn(f"{path}: an unfinished checkpoint; removed")
            _remove(path, warn)
        elif int(path.name[5:]) > resumed_step:
            aside = path.with_name(f"{path.name}.aside-{time.time_ns()}")  # a run may go back twice in a second
            warn(f"{path}: later than step {resumed_step}, where this run goes on; renamed to {aside.name}")
            path.rename(aside)
    # A kill between a commit and its links leaves them on older steps.
    for name, step in ((LATEST, resumed_step), (BEST, best_step)):
        if step is not None and is_committed(step_folder(run_dir, step)):
            point(run_dir, name, step_folder(run_dir, step).name)
    for name in (LATEST, BEST, FINAL):
        if pointed(run_dir, name) is None:
            (run_dir / name).unlink(missing_ok=True)
        for leftover in listed(run_dir, f".{name}."):
            leftover.unlink()


def _remove(folder: Path, warn: Callable[[str], None]) -> None:
    if folder.is_symlink():
        folder.unlink()
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:  # such as a file that another process has open, on some file systems
        aside = folder.with_name(f"{folder.name}.unfinished-{time.time_ns()}")
        folder.rename(aside)
        warn(f"{folder}: cannot be removed ({error.strerror or error}); renamed to {aside.name}, delete it by hand")


def _give_up(folder: Path) -> None:
    """Remove what an unfinished save left, the marker first; what stays is cleared away by the next launch."""
    with contextlib.suppress(OSError):
        (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _not_listed(paths: list[Path]) -> list[Path]:
    """Those that are not there yet. Their folder is listed: asked for single files, NFS may go on saying no."""
    listed = {path.name for path in paths[0].parent.iterdir()} if paths else set[str]()
    return [path for path in paths if path.name not in listed]


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the others of its part in a save."""

    is_over: bool
    failure: str | None = None
    is_bug: bool = False  # not of the file system: nobody foresaw it
    is_consequence: bool = False  # of another rank's failure


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a save failed, alike on all ranks but for the bug, which is with the rank that has it."""

    reason: str
    is_bug: bool = False  # of some rank
    bug: Exception | None = None

    def __str__(self) -> str:
        return self.reason


class _GivenUpError(OSError):
    """A save that waited in vain for another rank's part."""


def _described(bug: Exception) -> str:
    """What a bug is, and where in our code."""
    frames = traceback.extract_tb(bug.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    place = (own or frames)[-1]
    return f"{bug!r} ({Path(place.filename).name}, line {place.lineno}; a fault of llmtrain {__version__})"


class CheckpointStore:
    """Saves checkpoints of one run. All ranks call `save` and `settle` at the same steps; rank 0 commits."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointSection,
        config_yaml: str,
        data: TrainingData,
        *,
        saved_step: int | None = None,
        last_save_s: float = 0.0,
        on_saved: Callable[[Path], None] = lambda _folder: None,
        is_needed: Callable[[Path], bool] = lambda _folder: False,
    ):
        """`saved_step` is in the run folder already: the run went on from it, or back to it; `last_save_s` is what the
        launch before knew. `on_saved` is told when this rank's part is written, on rank 0 when the checkpoint is
        committed; what `is_needed` is not deleted yet. Both are called from the thread that saves."""
        self.run_dir = run_dir
        self._is_async, self._on_saved = config.async_save, on_saved
        self._retention = Retention(run_dir, config, is_needed)
        self._config_yaml = config_yaml
        self._data = data
        # Read once: a data folder that is moved during the run cannot fail a save.
        self._tokenizer = {path.name: path.read_bytes() for path in sorted(data.tokenizer_folder.iterdir())}
        self._saved_step = saved_step
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self.is_behind = False  # the save under way: the loop may change the state before it is settled
        self._error: Exception | None = None
        self._is_committed = False  # what was saved last, as rank 0 knows
        self._give_up_at = math.inf
        self._is_given_up = threading.Event()
        self._is_waiting = threading.Event()  # rank 0, which has written its own part, for the others' files
        self._unset: dict[str, str] = {}  # pointers, and where they are to lead
        self._committed: list[Path] = []
        self._warnings: list[str] = []
        self._room = Room(run_dir)
        self._began, self._is_told_late = 0.0, False
        self.last_save_s = last_save_s  # from the copy to the commit; on other ranks than 0, of their part

    def expect_saves(self, engine: Engine) -> None:
        """Once the optimizer has its state: get the memory to copy everything to, if it is needed; no exchange."""
        if self._is_async:
            self._snapshot.expect(engine.fragments())

    def save(
        self, engine: Engine, state: dict[str, Any], links: tuple[str, ...], needed_before: int | None = None
    ) -> None:
        """Begin to write the training state; the save before must be settled.

        Where `async_save` is on, the state is copied to host memory first, and the loop may change it at once. Where
        a rank has no memory for that, `is_behind` says on all of them that it may not.

        Args:
            engine: whose fragments are saved.
            state: everything else, JSON-ready; `state["step"]` names the folder.
            links: pointers (`best`, `final`) to set beside `latest` once the checkpoint is committed.
            needed_before: see `Retention.apply`.
        """
        assert self._thread is None, "the save before is not settled"
        self._began, self._is_told_late = time.monotonic(), False
        step = int(state["step"])
        # The same step again (a best that is also the last) is only linked. All ranks must see that alike, so it is
        # remembered and not looked up: on a shared file system one may still see what rank 0 has renamed.
        is_new = step != self._saved_step
        self._is_committed = not is_new
        self._saved_step = step
        self._is_given_up.clear()
        self._is_waiting.clear()
        self.is_behind, fragments = self._is_async, None
        if is_new:
            fragments = self._copied(engine) if self._is_async else None
            self.is_behind = fragments is not None
            fragments = fragments or list(engine.fragments())  # where the loop waits, what it holds is written itself
            self._room.measure(engine, sum(fragment.values.nbytes for fragment in fragments))
        arguments = (engine, fragments, state, links, needed_before)
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"saving step {step}")
        self._thread.start()

    def _copied(self, engine: Engine) -> list[Fragment] | None:
        """The state in host memory; None, on all ranks: one of them has no room for it.

        If only that one waited, the others would wait for it in their next exchange, which ends after a while.
        """
        copied, lack = None, None
        try:
            copied = self._snapshot.take(engine.fragments())
        except MemoryError as error:
            lack = f"rank {engine.rank} on {platform.node()}: {error}"
        lacks = [one for one in engine.gather(lack) if one]
        if not lacks:
            return copied
        self._warnings.append(
            f"no host memory for a copy of the state ({lacks[0]}): the loop waits while it is written; free some, or "
            "set checkpoint.async_save=false"
        )
        return None

    def gone_back_to(self, step: int) -> None:
        """The run went back to this checkpoint: what it saved later was renamed, and will be saved again."""
        self._saved_step = step
        self._unset.clear()
        self._retention.forget()

    @property
    def saved_step(self) -> int | None:
        """The step that was saved last, once that is settled."""
        return self._saved_step

    @property
    def is_under_way(self) -> bool:
        """Whether a save was begun and is not settled; alike on all ranks."""
        return self._thread is not None

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows already that the save under way failed."""
        return self._error is not None

    def settle(self, engine: Engine, written: Callable[[], None] = lambda: None) -> Failure | None:
        """Wait, with all ranks, until the save under way is over, however long it takes.

        A rank that failed makes the others give up: rank 0 would wait in vain for its file.

        Args:
            engine: to talk to the others.
            written: called when all that is left to wait for is what other ranks write.

        Returns:
            why it failed; None: it did not, or there was none.
        """
        if self._thread is None:
            return None
        wait_s, is_written = 0.0, False
        while True:  # in rounds, each of which is far shorter than the timeout of an exchange
            self._thread.join(wait_s)
            own = self._tell(engine.rank)
            if not is_written and (self._is_waiting.is_set() or own.is_over):
                is_written = True
                written()
            told = engine.gather(own)
            failed = [one for one in told if one.failure]
            if failed:
                self._is_given_up.set()
            if all(one.is_over for one in told):
                break
            wait_s = min(2 * wait_s + 0.01, 1.0)
        error, self._error, self._thread = self._error, None, None
        if not failed:
            return None
        self._saved_step = self._clean_up(engine)
        first = min(failed, key=lambda one: (one.is_consequence, not one.is_bug))
        bug = None if isinstance(error, _FORESEEN) else error
        return Failure(str(first.failure), first.is_bug, bug)

    def _tell(self, rank: int) -> _Told:
        assert self._thread is not None
        is_over, error = not self._thread.is_alive(), self._error  # in this order
        if error is None:
            return _Told(is_over)
        is_bug = not isinstance(error, _FORESEEN)
        reason = _described(error) if is_bug else getattr(error, "strerror", None) or str(error) or repr(error)
        place = f" (rank {rank} on {platform.node()})" if rank else ""
        text = f"{self.run_dir}: {self._thread.name} failed: {reason}{place}"
        return _Told(is_over, text, is_bug, isinstance(error, _GivenUpError))

    def _clean_up(self, engine: Engine) -> int | None:
        """Make room for the next try, now that no rank writes any more; return the step if it was committed.

        Rank 0 knows; the disk, which may be what fails, is not asked.
        """
        if engine.rank == 0 and not self._is_committed:
            _give_up(step_folder(self.run_dir, self._saved_step or 0))
        return self._saved_step if engine.gather(self._is_committed)[0] else None

    def hurry(self) -> None:
        """A rank is lost: a save that is under way waits for the others' files for a short while only."""
        self._give_up_at = time.monotonic() + _RECORDS_GRACE_S

    def finish_within(self, within_s: float) -> None:
        """Before the process ends at once: let a save that is under way come to its end, for a limited time."""
        self.hurry()
        if (job := self._thread) is not None:
            job.join(within_s)

    def join(self) -> None:
        """Wait for this rank's part of a save that is under way, however it ends."""
        if self._thread is not None:
            self._thread.join()

    def news(self) -> tuple[list[Path], list[str]]:
        """The checkpoints that were committed since this was last asked, and what to warn of."""
        committed, self._committed = self._committed, []
        warnings, self._warnings = self._warnings, []
        return committed, [*warnings, *self._late()]

    def _late(self) -> list[str]:
        """That the save under way seems to hang, once; what it waits for then, the watchdog finds at the next save."""
        took_s = time.monotonic() - self._began
        is_late = self._thread is not None and self._thread.is_alive() and took_s > max(_LATE_S, 10 * self.last_save_s)
        if not is_late or self._is_told_late:
            return []
        self._is_told_late = True
        waits = "for the files of other ranks" if self._is_waiting.is_set() else "for its storage"
        return [
            f"{self.run_dir}: {self._thread.name} has been under way for {took_s:.0f} s and waits {waits}; earlier "  # type: ignore[union-attr]
            "checkpoints are intact; the next save waits for it"
        ]

    def _write(
        self,
        engine: Engine,
        fragments: list[Fragment] | None,
        state: dict[str, Any],
        links: tuple[str, ...],
        needed_before: int | None,
    ) -> None:
        """What the thread does: write this rank's part; on rank 0 also commit, link, and delete what is not kept."""
        folder = step_folder(self.run_dir, int(state["step"]))
        try:
            if fragments is not None:
                self._warnings += self._room.require()
                folder.mkdir(parents=True, exist_ok=True)
                fmt.write_rank(folder, engine.rank, fragments)
                if engine.rank == 0:
                    self._commit(engine, folder, state)
                    self._is_committed = True
                    self._committed.append(folder)
                self.last_save_s = time.monotonic() - self._began
            if engine.rank == 0:
                self._unset.update({name: folder.name for name in (LATEST, *links)})
                self._link()
        except Exception as error:  # of whatever kind: `settle` tells it
            self._error = error
            return
        try:
            self._on_saved(folder)
            if engine.rank == 0:
                self._warnings += self._retention.apply(needed_before)
        except Exception as error:  # a bug, which takes nothing from what is saved
            self._warnings.append(f"{folder}: saved, but what follows a save failed: {_described(error)}")

    def _commit(self, engine: Engine, folder: Path, state: dict[str, Any]) -> None:
        fmt.write_file(folder / fmt.STATE, json.dumps(state, indent=1, allow_nan=False))
        fmt.write_file(folder / fmt.CONFIG, self._config_yaml)
        (folder / TOKENIZER_FOLDER).mkdir(exist_ok=True)
        for name, content in self._tokenizer.items():
            fmt.write_file(folder / TOKENIZER_FOLDER / name, content)
        sync_path(folder / TOKENIZER_FOLDER)
        records = [folder / f"rank{rank:05d}.json" for rank in range(engine.world_size)]
        self._wait_for(records)
        own = [fmt.STATE, fmt.CONFIG, *(record.name for record in records)]
        own += [f"{TOKENIZER_FOLDER}/{name}" for name in self._tokenizer]
        files = [fmt.describe_file(folder, folder / name) for name in own]
        for record in records:
            files += fmt.RankRecord.model_validate_json(record.read_text()).files
        manifest = fmt.CheckpointManifest(
            step=int(state["step"]),
            engine=engine.name,
            world_size=engine.world_size,
            data_fingerprint=self._data.fingerprint(),
            tokenizer_sha256=self._data.tokenizer.sha256,
            llmtrain_version=__version__,
            torch_version=torch.__version__,
            files=tuple(files),
        )
        fmt.commit(folder, manifest)

    def _wait_for(self, paths: list[Path]) -> None:
        """Wait until other ranks' files are there; the file system is all that a background thread may share."""
        self._is_waiting.set()
        began = time.monotonic()
        missing, wait_s = paths, 0.01
        while missing := _not_listed(missing):
            too_late = time.monotonic() > min(began + _RECORDS_TIMEOUT_S, self._give_up_at)
            if too_late or self._is_given_up.is_set():
                raise _GivenUpError(0, f"{missing[0]} did not appear within {time.monotonic() - began:.0f} s")
            time.sleep(wait_s)
            wait_s = min(1.5 * wait_s, 0.5)
        self._is_waiting.clear()

    def _link(self) -> None:
        """Set the pointers; one that cannot be set is tried again with the next save, before anything is deleted."""
        for name, target in list(self._unset.items()):
            point(self.run_dir, name, target)
            del self._unset[name]
