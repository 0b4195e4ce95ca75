"""What is said of a run's curves: of real runs with one thing wrong, and of made curves at the limits of each rule."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.batches import Windows
from llmtrain.errors import DivergedError
from llmtrain.health import diagnosis
from llmtrain.health.diagnosis import Curves, Remark, diagnose
from llmtrain.health.pace_diagnosis import PaceCurves, diagnose_pace
from llmtrain.observe.run_facts import facts_of
from llmtrain.observe.run_folder import read_run
from tests.conftest import prose, small_config, write_data
from tests.test_train import merged, run

Floats = np.ndarray[Any, np.dtype[np.float64]]
ABOUT_LOSS = {*diagnosis.RULES, *diagnosis.WITHOUT_SHAPE}  # a busy machine may well be slow

# Real runs -----------------------------------------------------------------------------------------------------------


def said_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What the report says of a run's losses, by name."""
    said = facts_of(read_run(folder))["diagnosis"]
    return {remark["name"]: remark for remark in said if remark["name"] in ABOUT_LOSS}


def trained(data: Path, folder: Path, /, **sections: dict[str, Any]) -> Path:
    config = merged(
        small_config(data, folder / "run"), training={"max_steps": 160, "eval_every": 10},
        logging={"every": 2, "csv": False}, checkpoint={"save_every": None}, schedule={"min_lr": 0.0},
    )  # fmt: skip
    return run(merged(config, **sections))


@pytest.mark.slow
def test_a_healthy_run_is_told_nothing(data: Path, tmp_path: Path) -> None:
    assert said_of(trained(data, tmp_path, optimizer={"lr": 1e-2})) == {}


@pytest.mark.slow
def test_a_rate_that_is_far_too_high_diverges(data: Path, tmp_path: Path) -> None:
    said = said_of(trained(data, tmp_path, optimizer={"lr": 3.0}, schedule={"name": "constant"}))
    assert said["diverging"]["level"] == "problem" and "lower optimizer.lr" in said["diverging"]["advice"]


@pytest.mark.slow
def test_a_rate_that_is_far_too_low_does_not_learn(data: Path, tmp_path: Path) -> None:
    said = said_of(trained(data, tmp_path, optimizer={"lr": 1e-6}))
    assert set(said) == {"not decreasing"} and "raise optimizer.lr" in said["not decreasing"]["advice"]


@pytest.mark.slow
def test_little_text_many_times_overfits(data: Path, tmp_path: Path) -> None:
    little = write_data(tmp_path / "little", {"train": prose(700), "val": prose(1500, seed=1)}, like=data)
    said = said_of(trained(little, tmp_path, optimizer={"lr": 5e-3}))
    assert set(said) == {"overfitting"} and said["overfitting"]["level"] == "problem"
    assert "times through the data" in said["overfitting"]["detail"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sections"), [
    ("oscillating", {
        "optimizer": {"lr": 0.05}, "data": {"seq_len": 16},
        "training": {"micro_batch_size": 1, "global_batch_size": 1, "max_steps": 240, "eval_every": None},
    }),
    ("plateau", {"optimizer": {"lr": 0.03}, "training": {"max_steps": 450}}),
    ("underfitting", {"optimizer": {"lr": 3e-4}, "training": {"max_steps": 80}}),
])  # fmt: skip
def test_batches_of_one_swing_a_constant_rate_stays_and_few_steps_are_too_few(
    data: Path, tmp_path: Path, name: str, sections: dict[str, dict[str, Any]]
) -> None:
    """With five other seeds of the swinging run and three of the others the same is said.

    Of the plateau with AVX2 and with AVX512, which take other ways.
    """
    small = {"dim": 16, "layers": 1, "heads": 1}
    run_dir = trained(data, tmp_path, model=small, schedule={"name": "constant"}, logging={"every": 1}, **sections)
    assert set(said_of(run_dir)) == {name}


def test_a_run_of_nan_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        trained(data, tmp_path, optimizer={"lr": 1e6, "name": "sgd", "clip_norm": None}, schedule={"warmup_steps": 0})
    facts = facts_of(read_run(tmp_path / "run"))
    assert facts["state"] == "diverged" and "lower optimizer.lr" in facts["why"]
    assert "NaN" in said_of(tmp_path / "run")


# Made curves ---------------------------------------------------------------------------------------------------------


def power_law(count: int, noise: float, seed: int, floor: float = 1.5, gain: float = 6.0) -> Floats:
    """Losses as those of a healthy run: a power of the step over a floor, and noise."""
    steps = np.arange(1, count + 1) * 10.0
    return floor + gain * (1 + steps / 100) ** -0.4 + np.random.default_rng(seed).normal(0, noise, count)


def cosine(count: int) -> Floats:
    return 1e-3 * (0.55 + 0.45 * np.cos(np.linspace(0, np.pi, count)))


def curves(losses: Floats, **fields: Any) -> Curves:
    plausible = {"step": np.arange(1, len(losses) + 1) * 10.0, "learning_rate": cosine(len(losses)), "warmup_steps": 20}
    return Curves(train_loss=losses, **(plausible | fields))


def names(remarks: list[Remark]) -> list[str]:
    return [remark.name for remark in remarks]


@settings(max_examples=60)
@given(
    count=st.integers(150, 600), noise=st.floats(0, 0.05), seed=st.integers(0, 2**16), floor=st.floats(0.5, 3),
    gain=st.floats(3, 9),
)  # fmt: skip
def test_healthy_curves_of_any_length_and_noise_are_told_nothing(
    count: int, noise: float, seed: int, floor: float, gain: float
) -> None:
    losses = power_law(count, noise, seed, floor, gain)
    every = np.arange(9, count, 10)
    val = losses[every] + 0.03
    healthy = curves(losses, val_step=(every + 1) * 10.0, val_loss=val, is_over=True, chance=float(losses[0]))
    assert diagnose(healthy) == []
    assert diagnose(curves(losses[: count // 2], chance=float(losses[0]))) == [], "while it still goes on"


def test_too_few_records_say_nothing() -> None:
    assert diagnose(curves(np.full(11, 3.0))) == []
    assert diagnose(curves(np.empty(0))) == []


def test_nan_is_named_however_few_records_there_are() -> None:
    (remark,) = diagnose(curves(np.array([3.0, np.nan, 2.0])))
    assert remark.name == "NaN" and "by step 20" in remark.detail
    assert names(diagnose(curves(power_law(100, 0.01, 0), skipped=3, not_finite=3))) == ["NaN"]


@pytest.mark.parametrize(("skipped", "rollbacks", "level"), [(1, 0, "hint"), (40, 0, "problem"), (5, 1, "problem")])
def test_spikes_that_were_skipped(skipped: int, rollbacks: int, level: str) -> None:
    (remark,) = diagnose(curves(power_law(100, 0.01, 0), skipped=skipped, rollbacks=rollbacks))
    assert (remark.name, remark.level) == ("skipped steps", level)


@pytest.mark.parametrize(("rise", "is_told"), [(0.1, False), (3.0, True)])
def test_a_loss_that_rises_again_diverges(rise: float, is_told: bool) -> None:
    losses = power_law(200, 0.02, 1)
    losses[120:] += np.linspace(0, rise, 80)
    assert ("diverging" in names(diagnose(curves(losses)))) == is_told


def test_a_run_that_gave_up_is_diverging_whatever_its_curve() -> None:
    assert names(diagnose(curves(power_law(50, 0.01, 1), ended="diverged"))) == ["diverging"]


def test_not_decreasing_is_not_said_too_early_or_of_what_was_learnt_before() -> None:
    flat = np.full(40, 6.9) + np.random.default_rng(0).normal(0, 0.01, 40)
    assert names(diagnose(curves(flat, chance=7.0))) == ["not decreasing"]
    assert names(diagnose(curves(flat, chance=7.0, warmup_steps=380))) == []
    going_on = diagnose(curves(flat - 4.0, chance=7.0))
    assert "not decreasing" not in names(going_on), "a checkpoint's weights started it"


@pytest.mark.parametrize(("swing", "is_told"), [(0.05, False), (0.8, True)])
def test_a_loss_that_swings_oscillates(swing: float, is_told: bool) -> None:
    losses = power_law(200, 0.01, 2)
    losses[60:] += swing * np.sin(np.arange(140) * 1.7)
    assert ("oscillating" in names(diagnose(curves(losses)))) == is_told


def test_an_early_jump_asks_for_warm_up_and_a_late_one_does_not() -> None:
    losses = power_law(200, 0.01, 3)
    early, late = losses.copy(), losses.copy()
    early[8:11] += 2.0
    late[150:153] += 2.0
    (remark,) = diagnose(curves(early))
    assert remark.name == "warm-up too short" and "to 80" in remark.advice
    assert names(diagnose(curves(late))) == []


def test_a_plateau_at_a_high_rate_is_told_and_one_at_the_end_of_the_schedule_is_not() -> None:
    losses = power_law(300, 0.01, 4)
    flat = np.minimum.accumulate(np.where(np.arange(300) < 100, losses, losses[100]))
    flat += np.random.default_rng(1).normal(0, 0.01, 300)
    assert names(diagnose(curves(flat, learning_rate=np.full(300, 1e-3)))) == ["plateau"]
    falling = np.where(np.arange(300) < 90, 1e-3, 1e-5)
    assert names(diagnose(curves(flat, learning_rate=falling))) == []


@pytest.mark.parametrize(("rise", "is_told"), [(0.01, False), (0.4, True)])
def test_validation_that_rises_while_training_falls_overfits(rise: float, is_told: bool) -> None:
    losses = power_law(200, 0.01, 5)
    every = np.arange(9, 200, 10)
    val = losses[every] + 0.05
    val[10:] = val[10] + np.linspace(0, rise, 10)
    said = diagnose(curves(losses, val_step=(every + 1) * 10.0, val_loss=val, epochs=8.0))
    assert names(said) == (["overfitting"] if is_told else [])
    rising_both = losses.copy()
    rising_both[100:] = rising_both[99]
    said = diagnose(curves(rising_both, val_step=(every + 1) * 10.0, val_loss=val))
    assert "overfitting" not in names(said), "training does not fall, so the text is not learnt by heart"


def test_a_wide_gap_is_a_hint() -> None:
    losses = power_law(200, 0.01, 6)
    val = losses[9::10] + 0.8
    (remark,) = diagnose(curves(losses, val_step=np.arange(10, 201, 10) * 10.0, val_loss=val))
    assert (remark.name, remark.level) == ("overfitting", "hint")


def test_a_run_that_ends_while_it_falls_is_underfitting() -> None:
    falling = np.linspace(7, 4, 100) + np.random.default_rng(2).normal(0, 0.01, 100)
    assert names(diagnose(curves(falling, is_over=True))) == ["underfitting"]
    assert names(diagnose(curves(falling))) == [], "it goes on"


def pace(count: int = 100, **fields: Any) -> PaceCurves:
    speeds = 1000.0 + np.random.default_rng(0).normal(0, 30, count)
    nothing = np.full(count, np.nan)
    plausible = {
        "tokens_per_sec": speeds, "step_time_s": np.full(count, 0.5), "data_time_s": np.full(count, 0.01),
        "spread_s": nothing, "slowest_rank": nothing, "mfu": nothing, "training_s": 3600.0, "other_s": 300.0,
    }  # fmt: skip
    return PaceCurves(**(plausible | fields))


def test_a_steady_pace_is_told_nothing() -> None:
    assert list(diagnose_pace(pace())) == []
    assert list(diagnose_pace(pace(mfu=np.full(100, 0.4), spread_s=np.full(100, 0.02)))) == []
    assert list(diagnose_pace(pace(count=5, data_time_s=np.full(5, 0.4), step_time_s=np.full(5, 0.5)))) == []


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("too slow", {"tokens_per_sec": np.r_[np.full(85, 1000.0), np.full(15, 600.0)]}, "60 % of its usual"),
        ("too slow", {"tokens_per_sec": np.tile([1000.0, 1000.0, 1000.0, 300.0], 25)}, "under half"),
        ("too slow", {"mfu": np.full(100, 0.12)}, "12 % of the device's peak"),
        ("too slow", {"other_s": 3000.0}, "45 % of the time"),
        ("data-bound", {"data_time_s": np.full(100, 0.2)}, "40 % of the time of a step"),
        ("straggler", {"spread_s": np.full(100, 0.1), "slowest_rank": np.full(100, 3.0)}, "rank 3 is the slowest"),
    ],
)
def test_each_way_to_be_slow_is_named(name: str, fields: dict[str, Any], words: str) -> None:
    (remark,) = diagnose_pace(pace(**fields))
    assert remark.name == name and words in remark.detail


def test_waiting_for_data_is_measured(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that takes 30 ms for each micro-batch, in a real run."""
    gather = Windows.gather

    def slowly(self: Windows, ids: Any) -> Any:
        time.sleep(0.03)
        return gather(self, ids)

    monkeypatch.setattr(Windows, "gather", slowly)
    folder = trained(data, tmp_path, training={"max_steps": 15, "eval_every": None}, logging={"every": 1})
    waited = read_run(folder).columns["data_time_s"]
    assert len(waited) == 15 and (waited >= 0.06).all(), "two micro-batches a step"
    assert (waited <= read_run(folder).columns["step_time_s"]).all()
