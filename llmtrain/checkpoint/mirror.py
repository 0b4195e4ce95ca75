"""The run's checkpoints on a store as well: uploaded behind the loop's back, with the same promise as on the disk.

Each rank uploads its own tensors, rank 0 everything else. When every file is there with its size, rank 0 writes the
marker. Losing the store costs a warning, for the run folder has everything; what is missing there is tried again after
a while, with the next checkpoint, and by the next launch.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import BEST, FINAL, LATEST, MARKER, committed_steps, is_committed, pointed, step_folder
from llmtrain.checkpoint.remote import (
    can_do_without,
    is_set_aside,
    read_manifest,
    remote_link,
    remote_steps,
    require_same_run,
    step_name,
    step_of,
)
from llmtrain.checkpoint.retention import problem_of
from llmtrain.config import CheckpointSection, RunConfig
from llmtrain.errors import CorruptError, LlmtrainError
from llmtrain.storage.remote import Remote, in_parallel

_LINKS = (LATEST, BEST, FINAL)
_PEERS_PATIENCE_S = 10.0  # at least; other ranks may take three times as long as rank 0 did before it takes over
_HURRY_S = 10.0
_POLL_S = 0.5
_ROUND_S = 1.0
_RETRY_S, _MAX_RETRY_S = 15.0, 600.0  # after a failure; doubled after each further one
_OF_GRACE = 0.8  # of what a signal leaves, uploads get so much: the exit code must still come
_LAST_TRIES_S = 60.0  # so long the end of a run waits for a store that fails, and does not hang


class NoMirror:
    """Where `checkpoint.remote` is not set, nothing happens."""

    def check_writable(self, warn: Callable[[str], None]) -> None:
        """Check that the store can be written; where the run folder has checkpoints to go on from, only warn."""

    def clear_way(self, resumed_step: int, warn: Callable[[str], None]) -> None:
        """Leave only checkpoints up to the resumed step there."""

    def rewind(self, step: int) -> None:
        """The run went back to a step: what is later there gives way before the next upload; returns at once.

        To be called when the later ones are no longer in the run folder, or they would be uploaded once more. Should
        the process die before, the next knows them there by their markers: see `remote.is_set_aside`.
        """

    def saved(self, folder: Path) -> None:
        """Take note of a checkpoint; returns at once."""

    def holds(self, folder: Path) -> bool:
        """Whether the folder is being uploaded, and so must stay for now."""
        return False

    def news(self) -> list[str]:
        """What to warn of since this was last asked."""
        return []

    def wait(
        self,
        left_s: Callable[[], float] = lambda: math.inf,
        everybody: Callable[[bool, bool], bool] = lambda is_done, is_late: is_done or is_late,
        *,
        is_final: bool = False,
    ) -> None:
        """Wait for an upload that is under way, and try once more what failed, while there is time.

        Args:
            left_s: of what a signal leaves.
            is_final: no launch comes that could upload what is given up now: only a signal ends the wait.
            everybody: asked once a second, with whether this rank is done and whether its time is up, whether all that
                wait together go on.
        """

    def hurry(self, wait_s: float = _HURRY_S) -> None:
        """Wait for a short time only."""


class Mirror(NoMirror):
    """The folder on a store that follows one run folder; each rank has one."""

    def __init__(self, remote: Remote, run_dir: Path, config: CheckpointSection, rank: int, wait_s: float):
        self._remote, self._run_dir, self._config, self._rank = remote, run_dir, config, rank
        self._wait_s = wait_s
        self._state = threading.Condition()  # guards what follows
        self._wanted: Path | None = None  # saved last, and not yet looked at
        self._busy: Path | None = None
        self._is_working = False
        self._warnings: list[str] = []
        self._thread: threading.Thread | None = None
        self._failed: Path | None = None  # what to try again, after a while
        self._retry_s: float | None = None
        self._rewind_to: int | None = None
        self._is_last_try = False
        self._is_lost = False  # when the run began
        self._own_uploaded: Path | None = None  # of rank 1 and up
        self._damaged: set[int] = set()  # here, and told
        self._shared: set[int] = set()  # steps of this launch: the other ranks upload their parts of them

    def check_writable(self, warn: Callable[[str], None]) -> None:
        """See `NoMirror`.

        Raises:
            RemoteError: it cannot, and nothing is here.
        """
        self._is_lost = not can_do_without(self._run_dir, self._remote.check_writable, warn)

    def clear_way(self, resumed_step: int, warn: Callable[[str], None]) -> None:
        """Remove unfinished checkpoints, set later and damaged ones aside; rank 0, before the first upload.

        Raises:
            UserError: the store holds another run; or it fails, and nothing is here.
        """
        if self._is_lost or not can_do_without(self._run_dir, lambda: self._clear_own(resumed_step, warn), warn):
            self.rewind(resumed_step)  # as soon as it answers
        elif committed_steps(self._run_dir):
            self.saved(self._run_dir)  # an earlier launch may have left without having uploaded all

    def _clear_own(self, resumed_step: int, warn: Callable[[str], None]) -> None:
        steps = [step for step in remote_steps(self._remote.sizes()) if step <= resumed_step]
        require_same_run(self._remote, self._run_dir, steps)
        self._clear(resumed_step, warn)

    def _clear(self, resumed_step: int, warn: Callable[[str], None]) -> None:
        sizes = self._remote.sizes()
        steps = remote_steps(sizes)
        for folder in sorted({name.partition("/")[0] for name in sizes}):
            step = step_of(folder)
            if step is None:
                continue
            if step not in steps:
                warn(f"{self._remote.url}/{folder}: an unfinished checkpoint; removed")
                self._remove(folder, sizes)
            elif step > resumed_step or (step == resumed_step and self._is_damaged(step)) or self._is_left(step):
                aside = f"{folder}.aside-{time.time_ns()}"
                reason = f"later than step {resumed_step}, damaged, or left when the run went back"
                warn(f"{self._remote.url}/{folder}: {reason}; renamed to {aside}")
                self._set_aside(folder, aside, sizes)
        left = self._remote.sizes()
        self._remote.remove([name for name in _LINKS if name in left and remote_link(self._remote, name, left) is None])

    def rewind(self, step: int) -> None:
        """See `NoMirror`."""
        with self._state:
            self._rewind_to, self._own_uploaded = step, None
            self._shared = {saved for saved in self._shared if saved <= step}
        self.saved(self._run_dir)  # at once, and not with the next checkpoint

    def saved(self, folder: Path) -> None:
        """See `NoMirror`: rank 0 calls it when the checkpoint is committed, the others when their part is written."""
        with self._state:
            self._wanted = folder
            if (step := step_of(folder.name)) is not None:
                self._shared.add(step)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()
            self._state.notify_all()

    def holds(self, folder: Path) -> bool:
        """See `NoMirror`."""
        return folder == self._busy

    def news(self) -> list[str]:
        """See `NoMirror`."""
        with self._state:
            warnings, self._warnings = self._warnings, []
        return warnings

    def wait(
        self,
        left_s: Callable[[], float] = lambda: math.inf,
        everybody: Callable[[bool, bool], bool] = lambda is_done, is_late: is_done or is_late,
        *,
        is_final: bool = False,
    ) -> None:
        """See `NoMirror`; what is not done in time is left to the next launch, with a warning."""
        began = time.monotonic()
        with self._state:
            self._wanted, self._is_last_try = self._wanted or (None if self._is_last_try else self._failed), True
            self._state.notify_all()
        until = began + (math.inf if is_final and self._wait_s else self._wait_s)
        tries_until = began + (min(self._wait_s, _LAST_TRIES_S) if is_final else 0.0)
        while True:
            until = min(until, time.monotonic() + _OF_GRACE * left_s())
            with self._state:
                round_s = min(max(until - time.monotonic(), 0), _ROUND_S)
                done = self._state.wait_for(lambda: self._is_idle(tries_until), round_s)
            if everybody(done, time.monotonic() >= until):
                break
        with self._state:
            if not done and self._wait_s:
                took_s = time.monotonic() - began
                self._warnings.append(
                    f"{self._remote.url}: an upload is not done after {took_s:.0f} s and is given up; "
                    f"everything is in {self._run_dir}, and the next launch uploads it"
                )
                self._wait_s = 0.0

    def hurry(self, wait_s: float = _HURRY_S) -> None:
        """See `NoMirror`."""
        self._wait_s, self._is_last_try = min(self._wait_s, wait_s), True

    def _is_idle(self, tries_until: float) -> bool:
        """Whether nothing is being uploaded, and what failed is not to be waited for."""
        will_try = self._failed is not None and time.monotonic() < tries_until
        return not (self._is_working or self._wanted or will_try)

    def _work(self) -> None:
        """What the thread does, until the process ends."""
        while True:
            with self._state:
                self._state.wait_for(lambda: self._wanted, self._retry_s)
                is_new, folder = self._wanted is not None, self._wanted or self._failed
                self._wanted, self._is_working = None, True
            assert folder is not None
            failure = None
            try:
                self._bring_up_to_date(folder)
            except Exception as error:  # of whatever kind: the run goes on without the store
                failure = str(error) if isinstance(error, LlmtrainError) else repr(error)
            with self._state:
                self._note(folder, failure, is_new)
                self._is_working, self._busy = False, None
                self._state.notify_all()

    def _note(self, folder: Path, failure: str | None, is_new: bool) -> None:
        """What became of an upload; that a further try without a newer checkpoint failed is no news."""
        if failure is None:
            if self._failed:
                self._warnings.append(f"{self._remote.url}: can be written again; all that is kept is there now")
            self._failed = self._retry_s = None
            return
        if is_new:
            self._warnings.append(
                f"{failure}; not uploaded; everything is in {self._run_dir}; tried again after a while, with the next "
                "checkpoint and by the next launch"
            )
        self._failed, self._retry_s = folder, min(2 * self._retry_s if self._retry_s else _RETRY_S, _MAX_RETRY_S)

    def _tell(self, text: str) -> None:
        with self._state:
            self._warnings.append(text)

    def _bring_up_to_date(self, folder: Path) -> None:
        if self._rank:
            self._upload_own(folder)
            return
        while (step := self._rewind_to) is not None:
            self._clear_own(step, self._tell)
            with self._state:
                if self._rewind_to == step:  # else the run has gone back once more meanwhile
                    self._rewind_to = None
        self._sync()

    def _upload_own(self, folder: Path) -> None:
        if folder == self._own_uploaded:
            return
        try:
            for file in sorted(folder.glob(f"rank{self._rank:05d}*.safetensors")):
                self._remote.upload(file, f"{folder.name}/{file.name}")
        except FileNotFoundError:
            return  # deleted meanwhile, because newer ones are there
        self._own_uploaded = folder

    def _sync(self) -> None:
        """Bring the store to what retention would keep of both places; the newest goes first."""
        sizes = self._remote.sizes()
        here, there = committed_steps(self._run_dir), remote_steps(sizes)
        linked = {step_of(folder.name) for name in _LINKS if (folder := pointed(self._run_dir, name))}
        keep = self._to_keep(sorted({*here, *there})) | linked
        for step in reversed(here):
            if step in keep and step not in there and not self._is_damaged_here(step):
                try:
                    self._upload(step)
                except FileNotFoundError:
                    continue  # deleted meanwhile, because newer ones are there
                except CorruptError:
                    if is_committed(step_folder(self._run_dir, step)):
                        raise
        self._link()
        self._retain()

    def _is_damaged_here(self, step: int) -> bool:
        """Whether files are missing or cut short; told once. One that is gone altogether is not damaged."""
        folder = step_folder(self._run_dir, step)
        if (problem := problem_of(folder)) is None or not is_committed(folder):
            return False
        if step not in self._damaged:
            self._tell(f"{problem}; this checkpoint is not uploaded")
        self._damaged.add(step)
        return True

    def _upload(self, step: int) -> None:
        began = time.monotonic()
        folder = self._busy = step_folder(self._run_dir, step)
        files = {file.path: file.bytes for file in fmt.CheckpointReader(folder).manifest.files}
        others = [name for name in files if name.endswith(".safetensors") and not name.startswith("rank00000")]
        mine = [name for name in files if step not in self._shared or name not in others]
        self._shared.discard(step)  # should this fail, the next try does everything
        in_parallel(lambda name: self._remote.upload(folder / name, f"{folder.name}/{name}"), mine)
        until = time.monotonic() + max(_PEERS_PATIENCE_S, 3 * (time.monotonic() - began))
        while (missing := self._missing(folder.name, files)) and set(missing) <= set(others):
            if time.monotonic() > until:
                break
            time.sleep(_POLL_S)
        in_parallel(lambda name: self._remote.upload(folder / name, f"{folder.name}/{name}"), missing)
        self._remote.upload(folder / fmt.MANIFEST, f"{folder.name}/{fmt.MANIFEST}")
        files[fmt.MANIFEST] = (folder / fmt.MANIFEST).stat().st_size
        if missing := self._missing(folder.name, files):
            raise CorruptError(f"{self._remote.url}/{folder.name}/{missing[0]}: has another size than was uploaded")
        if self._rewind_to is None:  # else the folder may be another than it was when this began
            self._remote.write(f"{folder.name}/{MARKER}", (folder / MARKER).read_bytes())

    def _missing(self, folder: str, files: dict[str, int]) -> list[str]:
        sizes = self._remote.sizes(folder)
        return [name for name, size in files.items() if sizes.get(f"{folder}/{name}") != size]

    def _link(self) -> None:
        sizes = self._remote.sizes()
        for name in _LINKS:
            folder = pointed(self._run_dir, name)
            step = folder and step_of(folder.name)
            if folder and step in remote_steps(sizes) and remote_link(self._remote, name, sizes) != step:
                self._remote.write(name, f"{folder.name}\n".encode())

    def _retain(self) -> None:
        """Delete what is neither recent, best, final, nor at a step to keep; the marker goes first."""
        sizes = self._remote.sizes()
        steps = remote_steps(sizes)
        keep = self._to_keep(steps) | {remote_link(self._remote, name, sizes) for name in _LINKS}
        for step in steps:
            if step not in keep:
                self._remove(step_name(step), sizes)

    def _to_keep(self, steps: list[int]) -> set[int | None]:
        every = self._config.keep_every
        return {*steps[-self._config.keep_last :], *(step for step in steps if every and step % every == 0)}

    def _is_left(self, step: int) -> bool:
        """Whether the run went back from it, and has saved the step anew."""
        return is_set_aside(self._remote, step, self._run_dir)

    def _is_damaged(self, step: int) -> bool:
        try:
            read_manifest(self._remote, step)
        except CorruptError:
            return True
        return False

    def _remove(self, folder: str, sizes: dict[str, int]) -> None:
        files = [name for name in sizes if name.startswith(f"{folder}/")]
        self._remote.remove(sorted(files, key=lambda name: name != f"{folder}/{MARKER}"))

    def _set_aside(self, folder: str, aside: str, sizes: dict[str, int]) -> None:
        """Objects cannot be renamed together, so the marker goes first."""
        marker = f"{folder}/{MARKER}"
        for name in sorted((name for name in sizes if name.startswith(f"{folder}/")), key=lambda name: name != marker):
            self._remote.move(name, f"{aside}/{name.removeprefix(f'{folder}/')}")


def make_mirror(config: RunConfig, rank: int) -> NoMirror:
    """What `checkpoint.remote` asks for.

    Where a run ends before it is done, what is not uploaded within half of `health.timeout_s` is left to the next
    launch: by an error one rank may wait alone, and must be back before the others take it for lost.
    """
    url = config.checkpoint.remote
    if url is None:
        return NoMirror()
    return Mirror(Remote(url), Path(config.run.dir), config.checkpoint, rank, config.health.timeout_s / 2)
