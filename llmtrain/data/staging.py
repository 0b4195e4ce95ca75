"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmtrain.errors import UserError


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Give a fresh folder beside `out` to write into; when the block ends well, it is synced and becomes `out`.

    When the block fails, the folder is removed. When the process is killed, it stays as `OUT.partial-HOST-PID` and
    the next call for the same `out` on this host removes it: nobody can see from here whether another host's process
    lives. `out` must not exist, or be empty.

    Raises:
        UserError: something could not be written (no space, no permission); nothing is left.
    """
    target = out.resolve()  # so that "." has a name, and a link stays where it is
    ours = f"{target.name}.partial-{platform.node()}-"
    partial = target.with_name(f"{ours}{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent, ours)
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


def _remove_abandoned(parent: Path, ours: str) -> None:
    for folder in parent.glob(f"{glob.escape(ours)}*"):
        owner = folder.name.removeprefix(ours)
        if owner.isdecimal() and not _is_alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


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
