"""Between the loop and the divergence policy: hands limits to each step, takes in what it showed, writes it down.

Where the host knows at once what a step showed (a CPU, DeepSpeed), the policy sees it at once. On a GPU it stays there
until a step that waits for the device anyway, and limits are of what was known then. What the policy has not seen is
part of the state, so that a run that was interrupted in between goes on with the limits of one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.config import RunConfig
from llmtrain.data.batches import Batch
from llmtrain.engine import Limits, Outcome, Verdict
from llmtrain.health.divergence import DivergencePolicy, Seen, Stretch
from llmtrain.observe.files import SKIPPED, LineAppender, read_steps, replacing
from llmtrain.observe.observer import NullObserver
from llmtrain.observe.record import finite

_Facts = tuple[int, int, int, float, Limits]  # step, begin, end, learning rate


class Guard:
    """Judges the steps of one run. All ranks come to the same verdicts; rank 0 writes `skipped.jsonl`.

    A line of that file is a refused step (its reason, numbers, positions in the data and sample ids, of all ranks), or
    a going back. `rollbacks` says how often the run had gone back before: after that, steps come again.
    """

    def __init__(self, config: RunConfig, run_dir: Path, rank: int):
        self._config, self._path, self._rank = config, run_dir / SKIPPED, rank
        self.policy = DivergencePolicy(config.health)
        self._facts: list[_Facts] = []  # of the steps that the policy has not seen
        self._pending: list[Verdict | torch.Tensor] = []  # and what they showed
        self._limits = Limits()
        self._last: Seen | None = None  # refused

    def limits(self, batch: Batch) -> Limits:
        """For the step on this batch."""
        full = self._config.training.global_batch_size * self._config.data.seq_len
        self._limits = self.policy.limits(batch.target_count / full)
        return self._limits

    def add(self, step: int, batch: Batch, lr: float, outcome: Outcome) -> bool:
        """Take in a step; return whether it can be judged without waiting for a device."""
        self._facts.append((step, batch.begin, batch.end, lr, self._limits))
        self._pending.append(outcome.seen)
        return isinstance(outcome.seen, Verdict)

    def judge(self, batch: Batch, observer: NullObserver) -> Stretch | None:
        """Let the policy see what it has not seen; name refused steps, and the stretch where there are too many.

        What comes after too many were found is not looked at: those steps come again.
        """
        stretch = None
        for facts, verdict in zip(self._facts, self._verdicts(), strict=True):
            seen = Seen(*facts, *verdict)
            reason = self.policy.observe(seen)
            if reason:
                self._last = seen
                observer.warn(f"step {seen.step:,}: not applied: {reason}; its samples are in {self._path}")
                self._write(self._entry(seen, reason, batch))
            if stretch := self.policy.stretch():
                break
        self._facts, self._pending = [], []
        return stretch

    def _verdicts(self) -> list[Verdict]:
        """Of all steps that the policy has not seen; waits for the device once."""
        on_device = [seen for seen in self._pending if isinstance(seen, torch.Tensor)]
        read = iter(torch.stack(on_device).cpu() if on_device else ())
        return [seen if isinstance(seen, Verdict) else Verdict.read(next(read)) for seen in self._pending]

    def _entry(self, seen: Seen, reason: str, batch: Batch) -> dict[str, Any]:
        ids = batch.order(np.arange(seen.begin, seen.end, dtype=np.int64))
        return {
            "step": seen.step,
            "epoch": seen.begin // batch.layout.windows,
            "rollbacks": self.policy.rollbacks,
            "reason": reason,
            "loss": finite(seen.loss),
            "grad_norm": finite(seen.grad_norm),
            "learning_rate": seen.lr,
            "positions": [seen.begin, seen.end],
            "ids": ids.tolist(),
        }

    def _write(self, entry: dict[str, Any]) -> None:
        if self._rank == 0:
            file = LineAppender(self._path)
            file.append(json.dumps(entry, allow_nan=False))
            file.sync()
            file.close()

    def go_back(self, stretch: Stretch, step: int, state: Mapping[str, Any], from_step: int) -> None:
        """The run is rolled back from `from_step` to the checkpoint of `step`, whose state of the guard is `state`.

        The line is written before anything else: a run that is killed before its next save finds it (`find_rollbacks`).
        """
        rollbacks, left_out = self.policy.rollbacks, self.policy.left_out
        positions = [stretch.begin, stretch.end]
        self._write({"step": from_step, "rollbacks": rollbacks, "back_to": step, "left_out": positions})
        self.load_state(state)
        self.policy.left_out = left_out
        self.policy.leave_out(stretch.begin, stretch.end, rollbacks + 1)

    def find_rollbacks(self, step: int) -> list[tuple[int, int]]:
        """The data that a run which is now at `step` again had gone back to leave out, and did not live to save.

        There may be several: it may have gone back to the same step again.
        """
        found: list[tuple[int, int]] = []
        for entry in self._entries():
            if entry.get("back_to") == step and entry["rollbacks"] == self.policy.rollbacks + len(found):
                begin, end = entry["left_out"]
                found.append((begin, end))
        return found

    def _entries(self) -> Iterator[dict[str, Any]]:
        """The whole lines of the file: a damaged one must not keep a run from starting."""
        if not self._path.exists():
            return
        for entry in read_steps(self._path):
            stretch = entry.get("left_out", [0, 0])
            is_stretch = isinstance(stretch, list) and [type(end) for end in stretch] == [int, int]
            if type(entry.get("rollbacks")) is int and is_stretch:
                yield entry

    def rewind(self, step: int) -> None:
        """On rank 0, at the start of a launch: drop the lines about steps that will come again."""
        if not self._path.exists():
            return
        now = self.policy.rollbacks
        kept = [e for e in self._entries() if e["rollbacks"] < now or (e["rollbacks"] == now and e["step"] <= step)]
        with replacing(self._path, durable=True) as file:
            file.write("".join(f"{json.dumps(entry)}\n" for entry in kept).encode())

    def diagnosis(self, why_no_return: str) -> str:
        """What a person is told where the run gives up."""
        config, seen = self._config.health, self._last
        stretch = self.policy.stretch()
        what = "training diverged"
        if stretch and seen:
            numbers = f"loss {seen.loss:.4g}, gradient norm {seen.grad_norm:.4g}"
            what += (
                f" at step {seen.step:,}: {config.max_skips} of the last {config.spike_window} steps had to be skipped "
                f"since step {stretch.step:,}, at last with {numbers} at lr {seen.lr:g}"
            )
        return (
            f"{what}; {why_no_return}; the steps and their samples are in {self._path}: lower optimizer.lr or raise "
            "schedule.warmup_steps, or look at that data; the checkpoints hold no skipped step"
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-ready, so numbers that may not be finite are written as text."""
        pending = [
            [*map(repr, (*facts, limits.loss, limits.grad_norm, loss, norm, float(is_refused)))]
            for (*facts, limits), (loss, norm, is_refused) in zip(self._facts, self._verdicts(), strict=True)
        ]
        return {**self.policy.state(), "pending": pending}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`."""
        self.policy.load_state(state)
        self._facts, self._pending = [], []
        for step, begin, end, *numbers in state.get("pending", ()):
            lr, loss_limit, norm_limit, loss, norm, refused = map(float, numbers)
            self._facts.append((int(step), int(begin), int(end), lr, Limits(loss_limit, norm_limit)))
            self._pending.append(Verdict(loss, norm, bool(refused)))


def first_skip(state: Mapping[str, Any]) -> int | None:
    """The first refused step that a guard's `state()` remembers: the run may have to go back to before it."""
    pending = [int(step) for step, *_, refused in state["pending"] if float(refused)]
    return min([step for step, *_ in state["skips"]] + pending, default=None)
