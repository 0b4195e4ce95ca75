"""The step folders of a run, and the pointers to them. Imports nothing heavy: who only lists them need not wait."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from pathlib import Path

from llmtrain.data.staging import sync_path
from llmtrain.observe.files import LAUNCHES
from llmtrain.storage.again import again

MARKER = "COMMITTED"
LATEST, BEST, FINAL = "latest", "best", "final"
_FEW = 3  # runs that are named for an example


def is_committed(folder: Path) -> bool:
    """Whether the folder is a finished checkpoint.

    Raises:
        OSError: storage that does not answer is no answer: an unfinished one is removed.
    """
    try:
        return stat.S_ISREG(again((folder / MARKER).stat).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run_dir / f"step-{step:08d}"


def listed(folder: Path, prefix: str) -> list[Path]:
    """What is in a folder under names that begin so, by name; nothing where there is no folder.

    Raises:
        OSError: it cannot be listed. `Path.glob` calls that empty, from Python 3.12 on.
    """
    try:
        names = again(lambda: os.listdir(folder))  # noqa: PTH208 -- as `Path.iterdir`, but at once
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names) if name.startswith(prefix)]


def committed_steps(run_dir: Path) -> list[int]:
    """Steps with a finished checkpoint, ascending.

    Raises:
        OSError: storage that does not answer is no answer: a run would begin anew.
    """
    folders = [path for path in listed(run_dir, "step-") if path.name[5:].isdigit() and is_committed(path)]
    return sorted(int(path.name[5:]) for path in folders)


def folder_of_runs(path: Path) -> str | None:
    """What a folder is called that is no run and holds some, with the command that shows the first; None: no such one.

    It is easily named for a run: `checkpoints`, where every run has a folder of its own.
    """
    runs = [folder for folder in sorted(path.iterdir()) if (folder / LAUNCHES).is_file() or committed_steps(folder)]
    first = " ".join(shlex.quote(str(run)) for run in runs[:_FEW])
    return f"a folder of runs, as llmtrain report {first} shows" if runs else None


def point(run_dir: Path, name: str, target: str) -> None:
    """Make `run_dir/name` lead to the step folder `target`, in one step: a link, or a small file where links fail."""
    temporary = run_dir / f".{name}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
    except OSError:  # a file system without links
        temporary.write_text(target + "\n", encoding="utf-8")
        sync_path(temporary)
    temporary.replace(run_dir / name)


def pointed(run_dir: Path, name: str) -> Path | None:
    """The committed step folder that `run_dir/name` leads to, if there is one."""
    path = run_dir / name
    try:
        target = str(again(path.readlink))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        if error.errno != errno.EINVAL:  # which says: no link, but a file, or what is none of ours
            raise
        if not path.is_file():
            return None
        target = again(lambda: path.read_text(encoding="utf-8", errors="replace"))  # a damaged one leads nowhere
    folder = run_dir / Path(target.strip()).name  # never outside the run folder
    return folder if is_committed(folder) else None
