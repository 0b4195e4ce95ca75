"""How a profile ends with the run; what it says is in tests/test_train.py."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.config import ProfileSection, make_config
from llmtrain.engine import make_engine
from llmtrain.errors import Stopped
from llmtrain.health.peers import Peers
from llmtrain.observe.profile import Profiler, profiled


@pytest.mark.parametrize("error", [Stopped("a signal"), KeyboardInterrupt()])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_profile_is_ended_where_the_interpreter_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, world_size: int
) -> None:
    """One of several processes leaves it on: to end it waits for the device, which may wait for a rank that is lost."""
    ended: list[bool] = []
    monkeypatch.setattr(Profiler, "discard", lambda _: ended.append(True))
    config = make_config({"run": {"dir": str(tmp_path)}, "training": {"profile": {"start": 100}}})
    engine = make_engine(60.0)
    with Peers(engine) as peers:
        monkeypatch.setattr(engine, "world_size", world_size)
        with pytest.raises(type(error)), profiled(config, engine, peers, print):
            assert peers.listener is not None
            raise error
        assert peers.listener is None
        monkeypatch.undo()
    engine.close()
    assert bool(ended) == (world_size == 1)


def test_a_profile_stops_only_when_what_was_asked_in_its_last_step_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo's threads write into the memory of a profile that is stopped while they exchange: the process crashed."""
    monkeypatch.setattr("llmtrain.observe.profile.time", SimpleNamespace(perf_counter=count().__next__))
    profiler = Profiler(ProfileSection(start=1, steps=2), tmp_path, torch.device("cpu"), 0, print)
    result = tmp_path / "profile" / "rank00000.json"
    for step in (1, 2):
        profiler.moved_on(step, "between steps")
        profiler.moved_on(step, "between steps")  # once the answer is taken
        profiler.moved_on(step, "data")
    profiler.moved_on(3, "between steps")
    assert not result.exists()
    profiler.moved_on(3, "between steps")
    assert json.loads(result.read_text()) == {
        "first_step": 1,
        "steps": 2,
        "ms_per_step": {"between steps": 2000, "data": 1000},
        "exchanges_ms_per_step": 0,
    }
