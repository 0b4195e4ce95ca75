"""The step folders of a run, and the pointers to them. Imports nothing heavy: who only lists them need not wait."""

from __future__ import annotations

import os
from pathlib import Path

from llmtrain.data.staging import sync_path

MARKER = "COMMITTED"
LATEST, BEST, FINAL = "latest", "best", "final"


def is_committed(folder: Path) -> bool:
    """Whether the folder is a finished checkpoint."""
    return (folder / MARKER).is_file()


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run_dir / f"step-{step:08d}"


def committed_steps(run_dir: Path) -> list[int]:
    """Steps with a finished checkpoint, ascending."""
    folders = [path for path in run_dir.glob("step-*") if path.name[5:].isdigit() and is_committed(path)]
    return sorted(int(path.name[5:]) for path in folders)


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
    if path.is_symlink():
        target = str(path.readlink())
    elif path.is_file():
        target = path.read_text(encoding="utf-8").strip()
    else:
        return None
    folder = run_dir / Path(target).name  # never outside the run folder
    return folder if is_committed(folder) else None
