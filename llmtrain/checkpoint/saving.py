"""What happens when a save fails: once, the run goes on and tries again; twice in a row, it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from llmtrain.checkpoint.store import CheckpointStore, Failure
from llmtrain.engine import Engine
from llmtrain.errors import LlmtrainError, UserError

Mark = Callable[[Literal["writing a checkpoint", "waiting for what other ranks write"]], None]


class Saving:
    """Counts failures in a row, alike on all ranks, which call each method at the same step.

    Args:
        store: what writes.
        engine: whose state is saved.
        mark: notes what the loop waits for, so that a rank whose storage hangs can be told from those that wait for it.
        not_saved: told the step of a save that failed.
    """

    def __init__(
        self, store: CheckpointStore, engine: Engine, mark: Mark, not_saved: Callable[[int], None] = lambda _: None
    ):
        self._store, self._engine, self._mark, self._not_saved = store, engine, mark, not_saved
        self._failures = 0

    def settle(self, warn: Callable[[str], None], forgiven: int = 1) -> bool:
        """Wait for the save under way, if there is one; return whether all is well.

        Args:
            warn: tells the user.
            forgiven: so many failures in a row cost only a warning.

        Raises:
            UserError: one more save in a row failed.
            Exception: that was a bug in saving, on the rank that has it; LlmtrainError on the others.
        """
        if not self._store.is_under_way:
            return True
        self._mark("writing a checkpoint")
        step = self._store.saved_step
        failure = self._store.settle(self._engine, lambda: self._mark("waiting for what other ranks write"))
        if failure is None:
            self._failures = 0
            return True
        self._failures += 1
        if step is not None and self._store.saved_step != step:  # else it failed once it was committed
            self._not_saved(step)
        if self._failures > forgiven:
            raise failure.bug or self._ended_by(failure)
        warn(f"{failure}; earlier checkpoints are intact; the run tries again at the next save")
        return False

    def _ended_by(self, failure: Failure) -> LlmtrainError:
        told = f"{failure}; the second save in a row that failed; earlier checkpoints are intact"
        if failure.is_bug:
            return LlmtrainError(told)
        error = UserError(f"{told}: mend it, and the same command goes on from the last of them")
        error.is_everywhere = True
        return error

    def until_saved(self, save: Callable[[], None], warn: Callable[[str], None]) -> None:
        """Save and wait until it is on disk; where that fails, try once more.

        Raises:
            UserError: that failed too; see `settle` for a bug.
        """
        self.settle(warn, forgiven=2)  # whatever became of the one before, this one has its two tries
        self._failures = 0
        for _ in range(2):
            save()
            if self.settle(warn):
                return
