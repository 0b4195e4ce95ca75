"""A folder that appears whole or not at all, and that one process makes while others wait for it."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial as with_arguments
from pathlib import Path

from llmtrain.data.lock import FileLock, holder_name
from llmtrain.data.takeover import SlurmJob, sign
from llmtrain.errors import UserError

Say = Callable[[str], None]  # tells the user one line
Reached = Callable[[Path], int]
POLL_S = 0.2
JOURNAL = "journal.jsonl"
_KEPT = "kept"  # instead of the process; last in a name, as a host may be called `node` and another `node-7`


def _say_nothing(line: str) -> None:
    pass


@contextlib.contextmanager
def staged_folder(out: Path, *, alone: bool = False, say: Say = _say_nothing) -> Iterator[Path]:
    """Give a fresh folder beside `out` to write into; when the block ends well, it is synced and becomes `out`.

    When the block fails, the folder is removed. When the process is killed, it stays as `OUT.partial-HOST-PID` and
    the next call for the same `out` on this host removes it: nobody can see from here whether another host's process
    lives. `out` must not exist, or be empty.

    Args:
        out: the folder to make.
        alone: nobody else can be making it now, on whatever host: all that was left by others is removed.
        say: is told what was removed.

    Raises:
        UserError: something could not be written (no space, no permission); nothing is left.
    """
    target = out.resolve()  # so that "." has a name, and a link stays where it is
    partial = target.with_name(f"{target.name}.partial-{platform.node()}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target, alone, say)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _sync(partial)
        partial.rename(target)
        sync_path(target.parent)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def resumed_folder(out: Path, *, alone: bool, reached: Reached, say: Say) -> Iterator[Path]:
    """As `staged_folder`, but what a process of this host left unfinished is there again, if it kept a journal.

    The block is given a folder and may keep the file `JOURNAL` beside it. When the block fails or the process is
    killed, both stay as `OUT.partial-HOST-kept`, unless the journal is empty. Only one that is `alone` (see there) on
    its host finds what was left; any other begins with nothing, and leaves nothing. In a Slurm job, what a job that has
    ended left on another host counts as left on this one, where nothing was.

    Args:
        out: the folder to make.
        alone: nobody else can be making it on this host.
        reached: how far a journal has come; 0: it is none that can be gone on with.
        say: is told what was removed, kept or taken over.

    Raises:
        UserError: something could not be written.
    """
    target = out.resolve()
    partial = target.with_name(f"{target.name}.partial-{platform.node()}-{_KEPT if alone else os.getpid()}")
    folder, job = partial / "data", SlurmJob.current()
    try:
        if alone and not is_begun(partial):
            _take_over(target, partial, job, reached, say)
        if is_begun(partial):
            sign(partial, job)  # at once, so that no other takes it
        _remove_abandoned(target, alone, say)
        if not is_begun(partial):
            shutil.rmtree(partial, ignore_errors=True)
        make_folder(folder)
        sign(partial, job)
        yield folder
        _sync(folder)
        folder.rename(target)
        sync_path(target.parent)
    except BaseException as error:
        is_kept = alone and is_begun(partial)
        if is_kept:
            say(f"what was finished is kept in {partial}: the same command goes on from there")
        else:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            kept = "" if is_kept else "; nothing was kept"
            raise UserError(f"{out}: cannot be written ({error.strerror or error}){kept}") from error
        raise
    shutil.rmtree(partial, ignore_errors=True)


def _take_over(target: Path, partial: Path, job: SlurmJob | None, reached: Reached, say: Say) -> None:
    """Where nothing lies here: of what was left on other hosts by jobs that have ended, what has come farthest."""
    found = [(reached(other / JOURNAL), other) for other in target.parent.glob(f"{glob.escape(target.name)}.partial-*")]
    for far, other in sorted(found, reverse=True):
        if not far or not other.name.endswith(f"-{_KEPT}"):
            continue
        left_by = SlurmJob.of(other)
        if why := left_by.why_alive(job) if left_by else "no Slurm job has left it":
            say(
                f"{other}: finished shards of another host, not gone on with: {why}; where that process has ended, "
                f"rename it to {partial.name}"
            )
        elif SlurmJob.of(other) == left_by:  # and nobody has come to it while that was asked
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another job was faster
                other.rename(partial)
                say(f"{partial}: taken over from {other.name}, whose Slurm job has ended")
                return


def is_begun(partial: Path) -> bool:
    """Whether there is something to go on with; no longer when the folder has been renamed."""
    journal = partial / JOURNAL
    return (partial / "data").is_dir() and journal.is_file() and journal.stat().st_size > 0


def make_once(
    out: Path,
    make: Callable[[Path], None],
    *,
    is_made: Callable[[], bool],
    say: Say,
    task: str,
    reached: Reached | None = None,
) -> bool:
    """Make a folder unless it is made, through `staged_folder`; while another process is at it, wait.

    When that one dies, this one takes over. The lock, `OUT.lock`, only saves work: where it does not reach another
    machine, both make the folder, the first to rename it into place wins, and the other throws its own away.

    Args:
        out: the folder to make.
        make: fills the folder it is given.
        is_made: whether there is nothing (more) to do.
        say: is told whom we wait for.
        task: what is waited for, as in "… is fitting the tokenizer".
        reached: of `resumed_folder`, through which it is made where `make` keeps a journal.

    Returns:
        Whether this process made it.

    Raises:
        UserError: what `make` and `staged_folder` raise.
    """
    lock, waiting_for = FileLock(out.with_name(f"{out.name}.lock")), ""
    while not is_made():
        holder = _take(lock)
        if holder is not None:
            # Which waits for this process. 1 is the first of any container, and several may call their host the same.
            if (parent := os.getppid()) != 1 and holder == holder_name(parent):
                raise UserError(
                    f"{out}: the process that is {task} has started this one, which did not know and began the same; "
                    'put the call in your script under `if __name__ == "__main__":`, for workers import the script'
                )
            if holder != waiting_for:
                say(f"waiting: {holder} is {task} ({lock.path})")
            waiting_for = holder
            time.sleep(POLL_S)
            continue
        try:
            if is_made():  # by the one that held the lock until now
                break
            staged = with_arguments(resumed_folder, reached=reached) if reached else staged_folder
            with staged(out, alone=lock.is_exclusive, say=say) as folder:
                make(folder)
            return True
        except UserError:
            if not is_made():
                raise
            say(f"{out}: another process was faster; its result is used")
        finally:
            lock.release()
    return False


def _take(lock: FileLock) -> str | None:
    try:
        make_folder(lock.path.parent)
        return lock.acquire()
    except OSError as error:
        raise UserError(f"{lock.path}: cannot be written ({error.strerror or error})") from error


def _remove_abandoned(target: Path, alone: bool, say: Say) -> None:
    ours = f"{target.name}.partial-{platform.node()}-"
    for folder in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
        owner = folder.name.removeprefix(ours)
        # A lock may hold on one machine only, so what another one makes is left alone for a day.
        try:
            is_old = time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > 86_400
        except FileNotFoundError:  # somebody is at it
            continue
        is_dead = owner.isdecimal() and not _is_alive(int(owner))
        is_kept = owner.endswith(_KEPT) and is_begun(folder)  # on whatever host
        if is_dead or (alone and (owner.isdecimal() or (is_old and not is_kept))):
            shutil.rmtree(folder, ignore_errors=True)
            say(f"removed {folder}, which a killed process left unfinished")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True


def _sync(folder: Path) -> None:
    """Wait until everything in a folder is on the disk: a rename may otherwise outlive the data in a power cut."""
    for path in sorted(folder.rglob("*")):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and what is missing above it, so that a power cut takes none of them with what is then in it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_path(path.parent)


def appears(path: Path, within_s: float) -> bool:
    """Whether a file that another host has just made is there, or comes to be seen here in time.

    NFS may go on saying for half a minute that something is not there; where a folder is listed, it looks again.
    """
    until = time.monotonic() + within_s
    while not path.exists():
        if time.monotonic() > until:
            return False
        for folder in path.parents[:2]:
            with contextlib.suppress(OSError):
                list(folder.iterdir())
        time.sleep(POLL_S)
    return True
