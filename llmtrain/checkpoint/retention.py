"""Which checkpoints of a run are kept: the last few, every so many steps, what a link leads to; within a budget.

Nothing is deleted before a newer checkpoint is committed and its files are on disk as its manifest says. The marker
goes first: what is left of an interrupted deletion counts as no checkpoint, and the next launch clears it away.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import BEST, FINAL, LATEST, committed_steps, pointed, step_folder
from llmtrain.config import CheckpointSection
from llmtrain.errors import CorruptError


class Retention:
    """Deletes after each commit what is not kept; what it cannot do costs a warning, once."""

    def __init__(self, run_dir: Path, config: CheckpointSection, is_needed: Callable[[Path], bool]):
        """What `is_needed` stays until it no longer is."""
        self._run_dir, self._config, self._is_needed = run_dir, config, is_needed
        self._told: set[str] = set()

    def apply(self) -> list[str]:
        """Delete; return what to warn of."""
        warnings: list[str] = []
        steps = []
        for step in committed_steps(self._run_dir):
            problem = _problem(step_folder(self._run_dir, step))
            if problem:  # neither counted, lest a good one goes for it, nor deleted
                warnings.append(f"{problem}; this checkpoint no longer counts as one to keep")
            else:
                steps.append(step)
        newest = max(committed_steps(self._run_dir), default=None)
        if steps and steps[-1] == newest:
            for step in self._surplus(steps):
                warnings += _delete(step_folder(self._run_dir, step))
            warnings += self._over_budget()
        return self._new(warnings)

    def _new(self, warnings: list[str]) -> list[str]:
        new = [warning for warning in dict.fromkeys(warnings) if warning not in self._told]
        self._told |= {*new}
        return new

    def _surplus(self, steps: list[int]) -> list[int]:
        """The steps to delete; the oldest first."""
        by_number = steps[: -self._config.keep_last]
        linked = {pointed(self._run_dir, name) for name in (LATEST, BEST, FINAL)}
        every = self._config.keep_every
        folders = {step: step_folder(self._run_dir, step) for step in steps[:-1] if not (every and step % every == 0)}
        free = [s for s, folder in folders.items() if folder not in linked and not self._is_needed(folder)]
        surplus = [step for step in free if step in by_number]
        if self._config.max_bytes is not None:
            sizes = {step: _bytes_of(step_folder(self._run_dir, step)) for step in free}
            excess = self._bytes() - self._config.max_bytes - sum(sizes[step] for step in surplus)
            for step in free:
                if excess > 0 and step not in surplus:
                    surplus.append(step)
                    excess -= sizes[step]
        return surplus

    def _bytes(self) -> int:
        return sum(_bytes_of(folder) for folder in self._run_dir.glob("step-*"))

    def _over_budget(self) -> list[str]:
        """Say once that the budget is too small: the numbers change with every checkpoint, so not word by word."""
        limit = self._config.max_bytes
        if limit is None or "budget" in self._told or (used := self._bytes()) <= limit:
            return []
        self._told.add("budget")
        return [
            f"{self._run_dir}: the checkpoints that stay (the newest, linked ones, those of keep_every, renamed ones) "
            f"take {used / 1e6:,.1f} MB, more than checkpoint.max_bytes={int(limit)}; raise it or delete some by hand"
        ]


def _problem(folder: Path) -> str | None:
    """What is missing or cut short in a committed checkpoint; its hashes were made from what was written."""
    try:
        files = fmt.CheckpointReader(folder).manifest.files
    except CorruptError as error:
        return str(error)
    for file in files:
        try:
            size = (folder / file.path).stat().st_size
        except OSError as error:
            return f"{folder / file.path}: cannot be read ({error.strerror})"
        if size != file.bytes:
            return f"{folder / file.path}: has {size} bytes where the manifest says {file.bytes}"
    return None


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _delete(folder: Path) -> list[str]:
    try:
        (folder / fmt.MARKER).unlink()
        shutil.rmtree(folder)
    except OSError as error:  # such as a file that another process has open, on some file systems
        return [f"{folder}: no longer kept, but cannot be deleted: {error.strerror or error}"]
    return []
