"""What a run does with steps that go wrong: leaves them out, goes back, gives up; and interrupted runs do the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.checkpoint.folders import committed_steps
from llmtrain.engine.processes import Processes
from llmtrain.errors import DivergedError, Stopped
from llmtrain.health.guard import SKIPPED, Guard
from llmtrain.train import main
from tests.conftest import records
from tests.faulty_steps import Faults, faulty, leaving_out
from tests.test_train import Config, merged, numbers, weights

# Steps 13, 14 and 16: more than the run bears, so it goes back to step 10 and leaves samples 96 to 128 out.
BAD: Faults = {96: "nan loss", 104: "large loss", 120: "nan gradient"}
STRETCH = (96, 128)


@pytest.fixture
def config(config_dict: Config) -> Config:
    health = {"spike_window": 8, "max_skips": 3, "max_rollbacks": 2}
    return merged(config_dict, health=health, logging={"sample_ledger": True})


def train(monkeypatch: pytest.MonkeyPatch, config: Config, name: str, faults: Faults, *overrides: str) -> Path:
    monkeypatch.setattr("llmtrain.train.accumulate", faulty(faults))
    config = copy.deepcopy(config)
    folder = Path(config["run"]["dir"]).with_name(name)
    config["run"]["dir"] = str(folder)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    main(["--config", str(path), *overrides])
    return folder


def without_the_stretch(monkeypatch: pytest.MonkeyPatch, config: Config) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "load_state", leaving_out(STRETCH))
        return train(patch, config, "reference", {})


def skipped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SKIPPED).read_text().splitlines()]


def same_weights(folder: Path, other: Path, step: int = 30) -> bool:
    ours, theirs = weights(folder, step), weights(other, step)
    return ours.keys() == theirs.keys() and all(bool((ours[key] == theirs[key]).all()) for key in ours)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_skipped_step_leaves_the_run_as_if_its_update_had_been_left_out(
    monkeypatch: pytest.MonkeyPatch, config: Config, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    config = merged(config, optimizer={"name": optimizer})
    faults = {0: "nan gradient", 8 * 10: "large loss", 8 * 21: "large gradient"}
    reference = train(monkeypatch, config, "reference", dict.fromkeys(faults, "left out"))
    capsys.readouterr()
    folder = train(monkeypatch, config, "run", faults)
    said = capsys.readouterr().err
    assert numbers(folder) == numbers(reference) and same_weights(folder, reference)
    assert [record["skipped"] for record in records(folder)] == [1, 0, 0, 1, 0, 0, 1, 0, 0]
    entries = skipped(folder)
    assert [(entry["step"], entry["positions"]) for entry in entries] == [(1, [0, 8]), (11, [80, 88]), (22, [168, 176])]
    ledger = {line["step"]: line["ids"] for line in map(json.loads, (folder / "samples-rank00000.jsonl").open())}
    assert all(entry["ids"] == ledger[entry["step"]] for entry in entries)
    assert "gradient norm nan" in entries[0]["reason"] and "limit" in entries[1]["reason"]
    assert entries[2]["reason"].startswith("gradient norm") and entries[2]["grad_norm"] > 1e4
    assert said.count("not applied") == 3 and f"samples are in {folder / SKIPPED}" in said


def test_too_many_roll_the_run_back_and_their_data_is_left_out(
    monkeypatch: pytest.MonkeyPatch, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = without_the_stretch(monkeypatch, config)
    capsys.readouterr()
    folder = train(monkeypatch, config, "run", BAD)
    said = capsys.readouterr().err
    assert f"at step 16 going back to {folder / 'step-00000010'}, to leave out samples 96 to 128" in said
    assert numbers(folder) == numbers(reference) and same_weights(folder, reference)
    ledgers = [(one / "samples-rank00000.jsonl").read_text() for one in (folder, reference)]
    assert ledgers[0] == ledgers[1]
    *steps, back = skipped(folder)
    assert [entry["step"] for entry in steps] == [13, 14, 16]
    assert back == {"step": 16, "rollbacks": 0, "back_to": 10, "left_out": list(STRETCH)}


@pytest.mark.parametrize("stops", [(14, 17), (15, 15, 24), (11, 13, 16)])
def test_an_interrupted_run_skips_and_goes_back_as_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch, config: Config, stops: tuple[int, ...]
) -> None:
    """Stopped between two skipped steps, after going back, and again and again."""
    config = merged(config, logging={"every": 5})
    whole = train(monkeypatch, config, "whole", BAD)
    for step in stops:
        with pytest.raises(Stopped):
            train(monkeypatch, config, "run", BAD, f"training.stop_after={step}")
    folder = train(monkeypatch, config, "run", BAD)
    assert numbers(folder) == numbers(whole) and same_weights(folder, whole)
    assert [entry["step"] for entry in skipped(folder)] == [entry["step"] for entry in skipped(whole)]


def test_a_run_that_is_killed_after_going_back_still_leaves_that_data_out(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    """It has saved nothing since, and the faults do not come again: only what it wrote down can tell."""
    reference = without_the_stretch(monkeypatch, config)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, config, "run", BAD | {128: "kill"})
    assert committed_steps(Path(config["run"]["dir"]))[-1] == 10
    folder = train(monkeypatch, config, "run", {})
    assert numbers(folder) == numbers(reference) and same_weights(folder, reference)


def test_a_run_that_went_back_twice_to_one_checkpoint_before_it_was_killed_leaves_both_out(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    """Its file of skipped steps has a damaged line, too, which keeps no launch from starting."""
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "load_state", leaving_out((96, 120), (120, 144)))
        reference = train(patch, config, "reference", {})
    bad = dict.fromkeys(range(96, 144, 8), "nan gradient")
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, config, "run", bad | {144: "kill"})
    path = Path(config["run"]["dir"]) / SKIPPED
    assert [entry["left_out"] for entry in skipped(path.parent) if "back_to" in entry] == [[96, 120], [120, 144]]
    path.write_text(path.read_text().replace('"rollbacks"', '"rollbaczs"', 1))
    folder = train(monkeypatch, config, "run", {})
    assert numbers(folder) == numbers(reference) and same_weights(folder, reference)
    assert [entry["left_out"] for entry in skipped(folder) if "back_to" in entry] == [[96, 120], [120, 144]]


@pytest.mark.parametrize("every", [1, 4, 100])
def test_what_is_judged_late_as_on_a_gpu_comes_to_the_same(
    monkeypatch: pytest.MonkeyPatch, config: Config, every: int
) -> None:
    """A GPU shows what a step was at the next record only. Stopped with and without steps that nobody has seen."""
    faults = dict.fromkeys(BAD, "nan loss")  # what is refused without limits, which are of steps that were seen
    reference = without_the_stretch(monkeypatch, merged(config, logging={"every": every}))
    monkeypatch.setattr(Processes, "host_sees_all", False)
    config = merged(
        config, logging={"every": every}, training={"eval_every": None}, checkpoint={"save_every": 10, "keep_last": 9}
    )
    whole = train(monkeypatch, config, "whole", faults)
    assert same_weights(whole, reference)
    assert [entry["step"] for entry in skipped(whole) if "left_out" not in entry] == [13, 14, 16]
    for step in (14, 17, 17):
        with pytest.raises(Stopped):
            train(monkeypatch, config, "run", faults, f"training.stop_after={step}")
    folder = train(monkeypatch, config, "run", faults)
    assert same_weights(folder, reference) and numbers(folder) == numbers(whole)


def test_after_the_last_going_back_the_run_gives_up_with_a_diagnosis(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    always = dict.fromkeys(range(96, 8 * 60, 8), "nan gradient")
    with pytest.raises(DivergedError) as error:
        train(monkeypatch, config, "run", always)
    folder = Path(config["run"]["dir"])
    said = str(error.value)
    assert error.value.exit_code == 3 and "\n" not in said
    assert "at step 15: 3 of the last 8 steps had to be skipped since step 13" in said
    assert "gradient norm nan at lr 0.00" in said and "after 2 times going back (health.max_rollbacks)" in said
    assert str(folder / SKIPPED) in said and "lower optimizer.lr" in said
    assert [entry["back_to"] for entry in skipped(folder) if "back_to" in entry] == [10, 10]
    left_out = [entry["left_out"] for entry in skipped(folder) if "left_out" in entry]
    assert left_out == [[96, 120], [120, 144]]
    assert committed_steps(folder) == [10]


def test_without_a_checkpoint_from_before_the_run_gives_up_at_once(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    with pytest.raises(DivergedError, match="there is no checkpoint from before step 2"):
        train(monkeypatch, config, "run", dict.fromkeys((8, 16, 24), "nan loss"))
