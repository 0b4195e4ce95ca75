"""kill -9 while a run goes back to an older checkpoint: the same command ends as the run that was not killed.

LLMTRAIN_LONG_TESTS=1 tries every deed of going back, and more random moments.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.folders import committed_steps
from llmtrain.health.guard import SKIPPED
from tests.faults.conftest import Config, Launcher, config_of, contents, copied, last_commit, numbers, two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LONG = bool(os.environ.get("LLMTRAIN_LONG_TESTS"))
DIED, LOST = -9, 5
# Steps 6 and 7: more than the run bears, so it goes back to step 4, past the checkpoint of step 6.
FAULTS = {40: "nan loss", 48: "nan gradient"}
BACK = {"step": 7, "rollbacks": 0, "back_to": 4, "left_out": [40, 56]}
LOAD = "llmtrain.checkpoint.format:CheckpointReader.load"
TAKES_EFFECT = "llmtrain.engine.accelerate:AccelerateEngine.publish"
VICTIMS: list[tuple[int, dict[str, Any]]] = [
    (1, {"phase": "going back", "nth": 1, "delay_s": 0.0}), (0, {"call": TAKES_EFFECT, "nth": 1, "delay_s": 0.0}),
]  # fmt: skip


def frail(config: Config) -> Config:
    return config | {"health": {**config.get("health", {}), "spike_window": 4, "max_skips": 2}}


@pytest.fixture(scope="module")
def gone_back(
    launcher: Launcher, data: Path, begun: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The folder of the run that went back and was not killed, and what it did to it while it did so."""
    folder = tmp_path_factory.mktemp("gone-back")
    run_dir = copied(begun, folder / "run")
    ended = launcher.train(frail(config_of(data, run_dir)), faults=FAULTS, events=str(folder / "events"))
    assert ended.code == 0 and "at step 7 going back to" in ended.err, ended.err
    assert skipped(run_dir)[-1] == BACK and len(skipped(run_dir)) == 3
    assert [record["step"] for record in numbers(run_dir)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(list(run_dir.glob("step-00000006.aside-*"))) == 1 and committed_steps(run_dir) == [8]
    return run_dir, json.loads((folder / "events").read_text())


def skipped(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / SKIPPED).read_text().splitlines()]


def of_going_back(events: list[str]) -> list[int]:
    """The numbers, from 1, of the deeds from the line that says so to the first record after it."""
    told = [number for number, event in enumerate(events, 1) if event.startswith("open") and SKIPPED in event]
    records = [number for number, event in enumerate(events, 1) if re.match(r"write .*/metrics\.jsonl$", event)]
    return list(range(told[-1], next(number for number in records if number > told[-1]) + 1))


def moments(events: list[str]) -> list[dict[str, Any]]:
    """For the launcher; of the deeds always the torn line, and the moment between it and what follows."""
    dice = random.Random(0)
    deeds = of_going_back(events)
    aside = next(n for n in deeds if re.match("os.rename .*/step-00000006$", events[n - 1]))
    if not LONG:
        deeds = sorted({deeds[1], aside, aside + 1, *dice.sample(deeds, 2)})
    calls = [{"call": call, "nth": 2, "delay_s": 0.0} for call in (LOAD, TAKES_EFFECT)]
    phases = [
        {"phase": "going back", "nth": 1, "delay_s": dice.random() * 0.02 * (number > 0)}
        for number in range(40 if LONG else 2)
    ]
    return [*({"event": number} for number in deeds), *calls, *phases]


def assert_as_not_killed(run_dir: Path, whole: Path) -> None:
    """The same files, numbers and skipped steps, bit for bit, and one checkpoint set aside."""
    ours, theirs = (
        {re.sub(r"aside-\d+", "aside", name): what for name, what in contents(one).items() if "stacks" not in name}
        for one in (run_dir, whole)
    )
    assert ours == theirs
    assert len(list(run_dir.glob("step-00000006.aside-*"))) == 1
    assert numbers(run_dir) == numbers(whole) and skipped(run_dir) == skipped(whole)
    for path in [*whole.glob("samples*.jsonl"), whole / "training_metrics.json"]:
        assert (run_dir / path.name).read_bytes() == path.read_bytes(), path.name


def test_killed_while_it_goes_back(
    launcher: Launcher, data: Path, tmp_path: Path, begun: Path, gone_back: tuple[Path, list[str]]
) -> None:
    whole, events = gone_back
    config = frail(config_of(data, tmp_path / "run"))
    met = 0
    for moment in moments(events):
        run_dir = copied(begun, tmp_path / "run")
        launch = launcher.train(config, faults=FAULTS, **moment)
        assert launch.code in ((DIED, 0) if moment.get("delay_s") else (DIED,)), (moment, launch)
        met += launch.code == DIED
        assert last_commit(run_dir) >= 4
        if launch.code == DIED:
            ended = launcher.train(config, faults=FAULTS)
            assert ended.code == 0 and "Traceback" not in ended.err, (moment, ended)
        assert_as_not_killed(run_dir, whole)
    assert met >= (40 if LONG else 6)


def test_one_rank_killed_while_both_go_back(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    """The other ends, and the same command goes on to the end of the run of which none was killed."""
    whole = tmp_path / "whole"
    ended = launcher.train_ranks(2, frail(two_ranks(data, whole)), faults=FAULTS)
    assert [one.code for one in ended] == [0, 0] and "going back to" in ended[0].err, ended
    for rank, moment in VICTIMS if LONG else VICTIMS[:1]:
        run_dir = tmp_path / f"run-{rank}"
        config = frail(two_ranks(data, run_dir))
        ended = launcher.train_ranks(2, config, faults=FAULTS, victim=rank, **moment)
        assert (ended[rank].code, ended[1 - rank].code) == (DIED, LOST), (moment, ended)
        ended = launcher.train_ranks(2, config, faults=FAULTS)
        assert [one.code for one in ended] == [0, 0], (moment, ended)
        assert_as_not_killed(run_dir, whole)
