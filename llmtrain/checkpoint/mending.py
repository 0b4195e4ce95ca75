"""A checkpoint that is damaged here and whole on the store is fetched, before the run goes back to an older one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import step_folder
from llmtrain.checkpoint.lock import RunLock
from llmtrain.checkpoint.remote import fetch_step, is_set_aside, read_manifest, remote_steps, step_name, step_of
from llmtrain.checkpoint.store import OpenCheckpoint
from llmtrain.config import RunConfig
from llmtrain.errors import CorruptError, StuckError, UserError
from llmtrain.storage.remote import Remote


def mending(
    open_one: OpenCheckpoint,
    meanwhile: Callable[[Callable[[], None]], None],
    config: RunConfig,
    lock: RunLock | None,
    warn: Callable[[str], None],
) -> OpenCheckpoint:
    """`open_one`, with a second try from the store for a checkpoint of the run folder; rank 0.

    Args:
        open_one: opens a checkpoint.
        meanwhile: does what takes long while the other ranks wait.
        config: names the store.
        lock: of the run folder; None: nothing may be written there.
        warn: is told what was damaged, and what came of it.
    """
    run_dir, url = Path(config.run.dir), config.checkpoint.remote
    if url is None or lock is None:
        return open_one

    def open_or_fetch(folder: Path) -> fmt.CheckpointReader:
        try:
            return open_one(folder)
        except StuckError:
            raise  # comparing it with the store's would hang again
        except CorruptError as error:
            step = step_of(folder.name)
            if step is None or folder.resolve() != step_folder(run_dir, step).resolve():
                raise
            before = _inode(folder)
            try:
                meanwhile(lambda: _fetch(Remote(url), step, run_dir))
            except (CorruptError, UserError, OSError) as why:
                warn(f"{folder}: damaged, and not to be had from the store: {why}")
                raise error from None
            if _inode(folder) == before:
                raise  # nothing is wrong with the files here
            warn(f"{error}; fetched whole from {url}")
        return open_one(folder)

    return open_or_fetch


def _inode(folder: Path) -> int | None:
    return folder.stat().st_ino if folder.exists() else None


def _fetch(remote: Remote, step: int, run_dir: Path) -> None:
    place, folder = f"{remote.url}/{step_name(step)}", step_folder(run_dir, step)
    if step not in remote_steps(remote.sizes()):
        raise CorruptError(f"{place}: not there")
    if is_set_aside(remote, step, run_dir) or _is_sound(folder, read_manifest(remote, step)[2]):
        raise CorruptError(f"{place}: is another one than here")
    fetch_step(remote, step, run_dir)


def _is_sound(folder: Path, marker: bytes) -> bool:
    """Whether manifest and marker agree here, and the remote marker is another one."""
    try:
        return fmt.CheckpointReader(folder).digest.encode() != marker.strip()
    except CorruptError:
        return False
