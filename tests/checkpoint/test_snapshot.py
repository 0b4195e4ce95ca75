"""A snapshot is of its moment, and its memory serves the next one too."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain import train
from llmtrain.checkpoint.snapshot import Snapshot
from llmtrain.engine import Fragment


def test_the_first_copy_goes_to_memory_that_was_there_before() -> None:
    state, snapshot = torch.arange(5000.0), Snapshot()
    fragments = [Fragment("model/w", (5000,), 0, state)]
    snapshot.expect(fragments)
    getting = snapshot._getting
    snapshot.expect(fragments)
    assert getting is not None and snapshot._getting is getting
    getting.join()
    begin = snapshot._memory.data_ptr()
    (copy,) = snapshot.take(fragments)
    assert copy.values.data_ptr() == begin
    assert torch.equal(copy.values, state)


def test_a_run_gets_the_memory_of_its_saves_at_its_first_record(
    config_dict: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as its saves need, from a thread that began before the first of them."""
    got, taken = [], []
    get, take = Snapshot._get, Snapshot.take

    def noted(self: Snapshot, fragments: Iterable[Fragment]) -> list[Fragment]:
        copies = take(self, fragments)
        taken.append(self._memory)
        return copies

    monkeypatch.setattr(Snapshot, "_get", lambda self, size: (got.append((size, bool(taken))), get(self, size)))
    monkeypatch.setattr(Snapshot, "take", noted)
    config_dict |= {"logging": {"every": 2, "plots": False}, "checkpoint": {"save_every": 4}}
    config_dict["training"] |= {"max_steps": 8}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_dict))
    train.main(["--config", str(path)])
    assert got == [(taken[0].nbytes, False)]
    assert len({memory.data_ptr() for memory in taken}) == 1


def test_what_the_loop_changes_afterwards_is_not_in_it_and_the_memory_is_used_again() -> None:
    state = torch.arange(6.0)
    halves = [Fragment("model/w", (6,), start, state[start : start + 3]) for start in (0, 3)]
    snapshot = Snapshot()
    first = snapshot.take(halves)
    state += 10
    assert torch.cat([fragment.values for fragment in first]).tolist() == [0, 1, 2, 3, 4, 5]
    second = snapshot.take(halves)
    assert torch.cat([fragment.values for fragment in second]).tolist() == [10, 11, 12, 13, 14, 15]
    assert [f.values.data_ptr() for f in first] == [f.values.data_ptr() for f in second]
    (grown,) = snapshot.take([Fragment("model/w", (8,), 0, torch.ones(8))])  # an optimizer that got more state
    assert grown.values.tolist() == [1] * 8
