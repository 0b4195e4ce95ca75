"""Which checkpoints of a run are kept: the last few, every so many steps, what a link leads to; within a budget.

One more is kept while steps that were skipped are remembered: the newest from before them, to go back to.

Nothing is deleted before a newer checkpoint is committed and its files are on disk as its manifest says. The marker
goes first: what is left of an interrupted deletion counts as no checkpoint, and the next launch clears it away.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import (
    BEST,
    FINAL,
    LATEST,
    MARKER,
    committed_steps,
    is_committed,
    listed,
    pointed,
    step_folder,
)
from llmtrain.config import CheckpointSection
from llmtrain.errors import CorruptError
from llmtrain.storage.again import again


class Retention:
    """Deletes after each commit what is not kept; what it cannot do costs a warning, once."""

    def __init__(self, run_dir: Path, config: CheckpointSection, is_needed: Callable[[Path], bool]):
        """What `is_needed` stays until it no longer is."""
        self._run_dir, self._config, self._is_needed = run_dir, config, is_needed
        self._told: set[str] = set()
        self._warnings: list[str] = []
        self._good: dict[int, bool] = {}  # of the steps that were looked at in this launch
        self._looked_at: set[int] = set()  # of these, since the last commit
        self._sizes: dict[Path, int] = {}

    def apply(self, needed_before: int | None = None) -> list[str]:
        """Delete; return what to warn of.

        Args:
            needed_before: the newest good checkpoint of an earlier step stays: the run may have to go back to it.
        """
        self._looked_at.clear()
        try:
            steps = committed_steps(self._run_dir)
            if steps and self._is_good(steps[-1]):
                for step in self._surplus(steps, needed_before):
                    self._warnings += _delete(step_folder(self._run_dir, step))
                self._warn_of_budget()
        except OSError as error:
            self._warnings.append(
                f"{self._run_dir}: looking for checkpoints that are no longer kept failed: {error.strerror or error}; "
                "tried again after the next save"
            )
        new = [warning for warning in dict.fromkeys(self._warnings) if warning not in self._told]
        self._told |= {*new}
        self._warnings = []
        return new

    def forget(self) -> None:
        """What was seen is no longer so: other checkpoints may come to have the same names."""
        self._good.clear()
        self._sizes.clear()

    def _is_good(self, step: int, *, is_memory_enough: bool = False) -> bool:
        """Look at a checkpoint, once for each commit; what stays for good is looked at once in a launch.

        Otherwise each save would read more than the one before.
        """
        if step not in self._looked_at and not (is_memory_enough and step in self._good):
            problem = problem_of(step_folder(self._run_dir, step))
            if problem:  # neither counted, lest a good one goes for it, nor deleted
                self._warnings.append(f"{problem}; this checkpoint no longer counts as one to keep")
            self._good[step] = problem is None
            self._looked_at.add(step)
        return self._good[step]

    def _surplus(self, steps: list[int], needed_before: int | None) -> list[int]:
        """The steps to delete; the oldest first."""
        good = filter(self._is_good, reversed(steps))
        recent = {*itertools.islice(good, self._config.keep_last)}
        free = self._free(steps, needed_before)
        surplus = [step for step in free if step not in recent]
        if self._config.max_bytes is not None:
            # Damaged and renamed ones do not count: no good one goes for their sake.
            sizes = {step: self._bytes_of(step_folder(self._run_dir, step)) for step in steps if self._counts(step)}
            excess = sum(sizes.values()) - self._config.max_bytes - sum(sizes[step] for step in surplus)
            for step in free:
                if excess > 0 and step not in surplus:
                    surplus.append(step)
                    excess -= sizes[step]
        return surplus

    def _free(self, steps: list[int], needed_before: int | None) -> list[int]:
        """The good ones that nothing but their number and the budget decides about."""
        linked = {pointed(self._run_dir, name) for name in (LATEST, BEST, FINAL)}
        every = self._config.keep_every
        older = (step for step in reversed(steps) if needed_before is not None and step < needed_before)
        back = next(filter(self._is_good, older), None)
        folders = {
            step: step_folder(self._run_dir, step)
            for step in steps[:-1]
            if step != back and not (every and step % every == 0)
        }
        return [
            step
            for step, folder in folders.items()
            if folder not in linked
            and not self._is_needed(folder)
            and self._is_good(step)
            # A folder that somebody moved elsewhere and linked is theirs to delete.
            and not folder.is_symlink()
        ]

    def _counts(self, step: int) -> bool:
        return self._is_good(step, is_memory_enough=True)

    def _bytes_of(self, folder: Path) -> int:
        if folder not in self._sizes:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if not is_committed(folder):  # what is left of a deletion; it may still shrink
                return size
            self._sizes[folder] = size
        return self._sizes[folder]

    def _warn_of_budget(self) -> None:
        """Say once that the budget is too small: the numbers change with every checkpoint, so not word by word."""
        limit = self._config.max_bytes
        if limit is None or "budget" in self._told:
            return
        used = sum(self._bytes_of(folder) for folder in listed(self._run_dir, "step-"))
        if used <= limit:
            return
        self._told.add("budget")
        self._warnings.append(
            f"{self._run_dir}: the checkpoints that stay (the newest, linked ones, those of keep_every, one to go back "
            f"to after skipped steps) and damaged or renamed ones take {used / 1e6:,.1f} MB, more than "
            f"checkpoint.max_bytes={int(limit)}; raise it or delete some by hand"
        )


def problem_of(folder: Path) -> str | None:
    """What is missing or cut short in a committed checkpoint; its hashes were made from what was written."""
    try:
        files = fmt.CheckpointReader(folder).manifest.files
    except CorruptError as error:
        return str(error)
    for file in files:
        try:
            size = again((folder / file.path).stat).st_size
        except OSError as error:
            return f"{folder / file.path}: cannot be read ({error.strerror})"
        if size != file.bytes:
            return f"{folder / file.path}: has {size} bytes where the manifest says {file.bytes}"
    return None


def _delete(folder: Path) -> list[str]:
    try:
        (folder / MARKER).unlink()
        shutil.rmtree(folder)
    except OSError as error:  # such as a file that another process has open, on some file systems
        return [f"{folder}: no longer kept, but cannot be deleted: {error.strerror or error}"]
    return []
