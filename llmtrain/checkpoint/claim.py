"""Taking hold of a run folder before a launch writes into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.checkpoint.lock import RunLock
from llmtrain.checkpoint.progress import Progress
from llmtrain.checkpoint.store import clear_way
from llmtrain.data.staging import make_folder
from llmtrain.errors import NO_ANSWER, UserError, of_storage


def claim(run_dir: Path, lock: RunLock, progress: Progress, warn: Callable[[str], None]) -> None:
    """Make the folder, take its lock, and put it in order.

    Raises:
        UserError: another launch holds it, or it cannot be written.
    """
    with naming_what_cannot_be_written(run_dir):
        make_folder(run_dir)
        lock.acquire()
        if lock.warning:
            warn(lock.warning)
        clear_way(run_dir, progress.step, progress.best_step, warn)


@contextmanager
def naming_what_cannot_be_written(run_dir: Path) -> Iterator[None]:
    """Make an error of the file system one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ANSWER and (told := of_storage(error)):
            raise told from error  # in another folder the run would begin anew
        raise UserError(f"{run_dir}: cannot be written: {error.strerror or error}; choose another run.dir") from error
