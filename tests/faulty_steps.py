"""Steps that go wrong on purpose, at given places in the data, on one rank; and runs in which they are left out.

As a script it is `llmtrain.train` with the faults that the environment names: FAULTS={"96": "nan gradient", ...}.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

import llmtrain.train
from llmtrain.data.batches import Batch
from llmtrain.engine import Engine, Outcome, Verdict
from llmtrain.errors import run_main
from llmtrain.health.guard import Guard
from llmtrain.observe.loss_sums import LossSums

Accumulate = Callable[[Engine, Batch, int], LossSums]
Faults = Mapping[int, str]  # where the batch begins → what goes wrong
_FACTORS = {"nan gradient": math.nan, "large gradient": 1e8}
_plain: Accumulate = llmtrain.train.accumulate


def faulty(faults: Faults, rank: int = 0) -> Accumulate:
    """`accumulate` as in the loop, but wrong on one rank for the batches that begin at these positions."""

    def accumulate(engine: Engine, batch: Batch, rows: int) -> LossSums:
        kind = faults.get(batch.begin)
        if kind is None or (engine.rank != rank and kind != "left out"):
            return _plain(engine, batch, rows)
        if kind == "kill":
            raise KeyboardInterrupt
        if kind == "left out":
            _without_update(engine)
        handle = None
        if kind in _FACTORS:
            with engine.evaluating() as model:
                weight = model.blocks[0].attention_norm.weight
            handle = weight.register_hook(lambda gradient: gradient * _FACTORS[kind])
        loss = _plain(engine, batch, rows)
        if handle:
            handle.remove()
        loss.total.mul_({"large loss": 1e4, "nan loss": math.nan}.get(kind, 1.0))
        return loss

    return accumulate


def _without_update(engine: Any) -> None:
    """The next step of an Accelerate engine does not happen, by other means than the engine's own."""

    def step(*_: object) -> Outcome:
        del engine.step
        engine._optimizer.zero_grad(set_to_none=True)
        return Outcome(torch.zeros(()), Verdict(0.0, 0.0, is_refused=True))

    engine.step = step


def leaving_out(*stretches: tuple[int, int]) -> Callable[[Guard, Mapping[str, Any]], None]:
    """`Guard.load_state` of a run that leaves these stretches of data out from its beginning."""
    plain = Guard.load_state

    def load_state(guard: Guard, state: Mapping[str, Any]) -> None:
        plain(guard, state)
        for begin, end in stretches:
            guard.policy.leave_out(begin, end, 0)

    return load_state


if __name__ == "__main__":
    wrong = {int(begin): kind for begin, kind in json.loads(os.environ["FAULTS"]).items()}
    llmtrain.train.accumulate = faulty(wrong, rank=1)  # type: ignore[assignment]
    sys.exit(run_main(llmtrain.train.main))
