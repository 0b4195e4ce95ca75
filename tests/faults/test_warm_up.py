"""A stop signal before the first step is done: both ranks end with 75, and the same command begins, or goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import committed_steps
from tests.faults.conftest import STEPS, Launcher, config_of, numbers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NOTHING = "before the first step: nothing to save"
SAVED = "stopped after step 1 by"


@pytest.mark.parametrize(("moment", "ranks", "says", "steps"), [
    ({"call": "llmtrain.assemble:open_data"}, 2, NOTHING, []),
    ({"call": "llmtrain.engine.accelerate:AccelerateEngine.build"}, 1, NOTHING, []),
    ({"call": "llmtrain.run:Run._open"}, 1, NOTHING, []),
    ({"phase": "data"}, 1, SAVED, [1]),
    ({"phase": "backward"}, 2, SAVED, [1]),
    ({"phase": "update"}, 1, SAVED, [1]),
])  # fmt: skip
def test_a_signal_in_warm_up(
    launcher: Launcher, data: Path, tmp_path: Path, moment: dict[str, str], ranks: int, says: str, steps: list[int]
) -> None:
    """Where there are two ranks, only the second gets it."""
    config = config_of(data, tmp_path / "run")
    config["training"] |= {"micro_batch_size": 4}
    strike = {**moment, "nth": 1, "delay_s": 0.0, "number": signal.SIGTERM, "victim": ranks - 1}
    ended = launcher.train_ranks(ranks, config, **strike)
    assert [one.code for one in ended] == [75] * ranks, ended
    said = "".join(one.err for one in ended)
    assert said.count(says) == 1 and "Traceback" not in said, said
    assert committed_steps(tmp_path / "run") == steps
    whole = launcher.train_ranks(ranks, config)
    assert [one.code for one in whole] == [0] * ranks, whole
    assert [record["step"] for record in numbers(tmp_path / "run")] == [*range(1, STEPS + 1)]
