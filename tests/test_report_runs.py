"""report RUN: what the terminal and JSON say of real runs, alone and beside each other."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.report import main
from tests.conftest import Call, Command, is_one_clear_line, records, small_config
from tests.test_train import merged, run


@pytest.fixture(scope="module")
def other_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `trained_run`, with another learning rate and seed, stopped after 12 of its steps and gone on with."""
    folder = tmp_path_factory.mktemp("other")
    config = merged(small_config(data, folder / "other"), optimizer={"lr": 1e-3}, run={"seed": 5})
    with pytest.raises(Exception, match="stop_after"):
        run(merged(config, training={"stop_after": 12}))
    return run(config)


def test_a_run_on_a_store_is_told_from_data(trained_run: Path, data: Path, call: Call) -> None:
    for place in (trained_run, trained_run / "step-00000010"):
        code, _, err = call(main, f"file://{place}")
        assert code == 2 and is_one_clear_line(err) and "a run's checkpoints; of a store report reads" in err
    assert call(main, f"file://{data}", "--json")[0] == 0
    code, _, err = call(main, f"file://{data}/nothing")
    assert code == 2 and is_one_clear_line(err) and "not prepared data" in err


def test_the_table_says_what_the_files_say_in_80_columns(trained_run: Path, call: Call) -> None:
    code, screen, err = call(main, trained_run)
    assert (code, err) == (0, "")
    assert max(map(len, screen.splitlines())) <= 80 and "\x1b" not in screen
    rows = records(trained_run)
    first, last = rows[0]["train_loss"], rows[-1]["train_loss"]
    for text in (
        "run · done", "30 of 30 (100 %) · epoch 2", f"{first:.3f} → {last:.3f}, {last - first:+.3f}", "cosine: ",
        f"{rows[-1]['tokens']:,}", "waiting for data", "3 (", "last of step 30", "diagnosis", "learning rate",
        "unknown: no peak is known", "GB at most", "1 process",
    ):  # fmt: skip
        assert text in screen, text
    assert "interruptions" not in screen and "skipped" not in screen
    assert any(chr(0x2801) <= character <= chr(0x28FF) for character in screen), "a curve of dots"


def test_several_runs_are_compared(trained_run: Path, other_run: Path, call: Call) -> None:
    code, screen, err = call(main, trained_run, other_run)
    assert (code, err) == (0, "")
    assert max(map(len, screen.splitlines())) <= 80
    assert "2 runs beside each other" in screen and "1 (1 stopped)" in screen
    differences = screen.split("where their configs differ")[1]
    assert "optimizer.lr" in differences and "run.seed" in differences
    assert "data.seq_len" not in differences and "run.dir" not in differences
    _, screen, _ = call(main, trained_run, trained_run)
    assert "nowhere: the same config" in screen


def test_json_holds_all_of_it(trained_run: Path, other_run: Path, call: Call) -> None:
    code, out, err = call(main, trained_run, other_run, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out, parse_constant=pytest.fail)["runs"]
    assert [of_run["run"] for of_run in told] == [str(trained_run), str(other_run)]
    for path, of_run in zip((trained_run, other_run), told, strict=True):
        assert of_run["curves"]["train_loss"] == [row["train_loss"] for row in records(path)]
    assert told[1]["interruptions"] == 1
    assert [launch["how"] for launch in told[1]["launches"]] == ["stopped", "done"]
    assert "training.stop_after=12" in told[1]["launches"][0]["why"]
    assert [launch["after_step"] for launch in told[1]["launches"]] == [0, 12]


def test_a_name_that_would_command_a_terminal_cannot(trained_run: Path, tmp_path: Path, call: Call) -> None:
    copy = Path(shutil.copytree(trained_run, tmp_path / "copy", symlinks=True))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["run"]["name"] = "[bold]\x1b[31mred\x1b[0m"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    _, screen, _ = call(main, copy, copy)
    assert "\x1b" not in screen and "[bold]" in screen


def test_runs_and_data_are_one_verb_but_not_one_report(
    trained_run: Path, data: Path, call: Call, tmp_path: Path
) -> None:
    for paths in ((trained_run, data), (data, trained_run)):
        code, out, err = call(main, *paths)
        assert (code, out) == (2, "") and is_one_clear_line(err) and "not both at once" in err
    code, out, err = call(main, data, "--html", tmp_path / "page.html")
    assert (code, out) == (2, "") and is_one_clear_line(err) and "--html" in err
    code, out, err = call(main, trained_run / "final")
    assert (code, out) == (2, "") and is_one_clear_line(err) and "name the folder of its run" in err
    code, out, err = call(main, trained_run, "--html", tmp_path / "nowhere" / "page.html")
    assert (code, out) == (2, "") and is_one_clear_line(err) and "nowhere" in err


@pytest.mark.slow
def test_a_run_that_goes_on_and_one_that_is_killed(data: Path, tmp_path: Path, llmtrain: Command) -> None:
    config = merged(
        small_config(data, tmp_path / "run"), training={"max_steps": 100_000}, checkpoint={"save_every": 50}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    training = subprocess.Popen(
        [sys.executable, "-m", "llmtrain", "train", "--config", tmp_path / "config.yaml"], stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run/latest").exists():
            assert time.monotonic() < until and training.poll() is None
            time.sleep(0.2)
        seen = json.loads(llmtrain("report", tmp_path / "run", "--json").stdout)["runs"][0]
        assert seen["state"] == "running" and 0 < seen["steps"]["done"] < 100_000 == seen["steps"]["total"]
        assert 0 <= seen["checkpoints"]["last_age_s"] < 120
        assert training.poll() is None, "it goes on while it is looked at"
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    done = llmtrain("report", tmp_path / "run")
    assert done.returncode == 0 and "killed, without a word" in done.stdout
    again: dict[str, Any] = json.loads(llmtrain("report", tmp_path / "run", "--json").stdout)["runs"][0]
    assert again["state"] == "killed" and again["steps"]["done"] >= seen["steps"]["done"]


def test_a_pipe_gets_no_colours_and_a_terminal_width_is_used(trained_run: Path, llmtrain: Command) -> None:
    wide = llmtrain("report", trained_run, env={"COLUMNS": "140"})
    assert wide.returncode == 0 and "\x1b" not in wide.stdout
    assert 80 < max(map(len, wide.stdout.splitlines())) <= 140
    ascii_only = llmtrain("report", trained_run, env={"PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0 and "training loss" in ascii_only.stdout
