"""Reading a run folder: whole, growing, killed, damaged; the facts are those of the files."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.checkpoint.folders import FINAL
from llmtrain.checkpoint.lock import RunLock
from llmtrain.data.lock import FileLock, is_locked
from llmtrain.errors import UserError
from llmtrain.observe.run_facts import curves_of, facts_of
from llmtrain.observe.run_folder import read_run
from llmtrain.observe.run_words import rows_of
from tests.conftest import records

Facts = dict[str, Any]


@pytest.fixture
def run_dir(trained_run: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "copy", symlinks=True))


def facts(path: Path) -> Facts:
    return facts_of(read_run(path))


def launches(path: Path) -> list[Facts]:
    found: list[Facts] = json.loads((path / "run.json").read_text())["launches"]
    return found


def write_launches(path: Path, *entries: Facts) -> None:
    (path / "run.json").write_text(json.dumps({"launches": entries}))


@contextmanager
def another_process_holds(lock: Path) -> Iterator[None]:
    code = (
        "import sys, pathlib; from llmtrain.data.lock import FileLock;"
        "lock = FileLock(pathlib.Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin and holder.stdout
    assert holder.stdout.readline() == "held\n"
    yield
    holder.stdin.close()
    assert holder.wait(30) == 0


def test_the_facts_are_those_of_the_records(trained_run: Path) -> None:
    told, rows = facts(trained_run), records(trained_run)
    train = [row["train_loss"] for row in rows]
    val = {row["step"]: row["val_loss"] for row in rows if row["val_loss"] is not None}
    assert told["state"] == "done" and told["steps"] == {"done": 30, "total": 30}
    assert told["loss"]["train"]["initial"] == train[0] and told["loss"]["train"]["final"] == train[-1]
    assert told["loss"]["val"]["best"] == min(val.values()) == val[told["loss"]["val"]["best_step"]]
    assert told["loss"]["train"]["reduction"] == pytest.approx(train[0] - train[-1])
    for row in told["epochs"]:
        of_epoch = [entry["train_loss"] for entry in rows if entry["epoch"] == row["epoch"]]
        assert row["train_loss"] == pytest.approx(sum(of_epoch) / len(of_epoch))
    assert [row["epoch"] for row in told["epochs"]] == [0, 1]
    assert told["learning_rate"]["peak"] == max(row["learning_rate"] for row in rows)
    assert told["learning_rate"]["schedule"] == "cosine" and told["learning_rate"]["warmup_steps"] == 5
    assert told["tokens"] == rows[-1]["tokens"]
    assert told["tokens_per_sec"]["last"] == rows[-1]["tokens_per_sec"]
    assert told["memory_gb"] == max(row["memory_gb"] for row in rows)
    assert told["checkpoints"]["count"] == 3 and told["checkpoints"]["last_step"] == 30
    assert told["checkpoints"]["final_step"] == 30 and told["checkpoints"]["bytes"] > 10_000
    assert told["interruptions"] == 0 and told["skipped"]["steps"] == 0 and told["problems"] == []
    steps = [4, 8, 10, 12, 16, 20, 24, 28, 30]
    spent = sum(row["step_time_s"] * taken for row, taken in zip(rows, np.diff([0, *steps]), strict=True))
    assert told["seconds"]["training"] == pytest.approx(spent)
    assert told["seconds"]["whole"] >= spent and told["seconds"]["away"] == 0
    assert 0 < told["data_share"] < 1
    curves = curves_of(read_run(trained_run))
    assert curves["step"] == steps and curves["train_loss"] == train
    assert [value is not None for value in curves["val_loss"]] == [step in (10, 20, 30) for step in steps]
    json.dumps(told, allow_nan=False)


def test_a_launch_says_how_it_ended(trained_run: Path) -> None:
    (launch,) = launches(trained_run)
    assert launch["ended"]["how"] == "done" and launch["ended"]["why"] is None
    assert launch["launch"]["after_step"] == 0 and launch["launch"]["total_steps"] == 30
    assert abs(launch["ended"]["time"] - records(trained_run)[-1]["time"]) < 60


def test_a_run_that_holds_its_lock_is_running_and_looking_does_not_disturb_it(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])  # in the middle of a write
    (run_dir / FINAL).unlink()
    for step in (20, 30):
        shutil.rmtree(run_dir / f"step-{step:08d}")
    with another_process_holds(run_dir / ".lock"):
        told = facts(run_dir)
        assert told["state"] == "running" and told["steps"] == {"done": 16, "total": 30}
        assert is_locked(run_dir / ".lock") is True
    assert is_locked(run_dir / ".lock") is False
    lock = RunLock(run_dir)
    lock.acquire()
    assert facts(run_dir)["state"] == "running"
    lock.release()


def test_a_glance_at_a_lock_refuses_nobody(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.touch()
    looking = subprocess.Popen(
        [sys.executable, "-c", f"import pathlib, time; from llmtrain.data.lock import is_locked; print(flush=True)\n"
         f"while True: is_locked(pathlib.Path({str(path)!r})); time.sleep(0.0002)"], stdout=subprocess.PIPE,
    )  # fmt: skip
    assert looking.stdout
    looking.stdout.readline()
    try:
        for _ in range(200):
            lock = FileLock(path)
            assert lock.acquire() is None
            lock.release()
    finally:
        looking.kill()
        looking.wait()


def test_a_killed_run_is_told_from_one_that_cannot_be_seen(run_dir: Path) -> None:
    entry = launches(run_dir)[0]
    entry.pop("ended")
    write_launches(run_dir, entry)
    (run_dir / FINAL).unlink()
    assert facts(run_dir)["state"] == "killed"
    (run_dir / ".lock").write_text("process 1 on another-host\n")
    assert facts(run_dir)["state"] == "?"
    (run_dir / ".lock").unlink()
    assert facts(run_dir)["state"] == "?"


def test_a_run_from_before_launches_said_how_they_ended(run_dir: Path) -> None:
    entry = launches(run_dir)[0]
    entry.pop("ended")
    write_launches(run_dir, entry)
    assert facts(run_dir)["state"] == "done"


def test_interruptions_and_the_time_between_launches(run_dir: Path) -> None:
    rows = records(run_dir)
    first, second = launches(run_dir)[0], launches(run_dir)[0]
    middle = rows[4]["time"]
    first["ended"] = {"time": middle, "how": "stopped", "why": "stopped after step 16"}
    later = [{**row, "time": row["time"] + 3600} for row in rows[5:]]
    second["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(later[0]["time"] - 1))
    second["ended"]["time"] += 3600
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:5], *later]))
    write_launches(run_dir, first, second)
    told = facts(run_dir)
    assert told["interruptions"] == 1
    assert told["seconds"]["away"] == pytest.approx(3600, abs=3)
    assert told["seconds"]["whole"] > 3590 and told["seconds"]["other"] < 60
    first.pop("ended")  # killed: it ended with its last record
    write_launches(run_dir, first, second)
    assert facts(run_dir)["seconds"]["away"] == pytest.approx(3600, abs=3)


def test_only_launches_that_ended_before_the_run_was_done_were_interrupted(run_dir: Path) -> None:
    """A run that is done is launched again, or prolonged, by people."""

    def told_of(*ends: str | None) -> tuple[int, str | None]:
        entry = launches(run_dir)[-1]
        ended = [{**entry, "ended": {**(entry["ended"]), "how": how} if how else None} for how in ends]
        write_launches(run_dir, *ended, entry)
        told = facts(run_dir)
        return told["interruptions"], dict(rows_of(told)).get("interruptions")

    assert told_of() == (0, None)
    assert told_of("done", "done") == (0, None)
    assert told_of("done", "stopped", "done", None, "peer lost", None) == (4, "4 (1 stopped, 2 killed, 1 peer lost)")


def test_a_run_that_was_stopped_before_its_first_record_is_where_its_checkpoint_is(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "training_metrics.json", FINAL):
        (run_dir / name).unlink()
    for step in (20, 30):
        shutil.rmtree(run_dir / f"step-{step:08d}")
    entry = launches(run_dir)[0]
    entry["ended"] |= {"how": "stopped", "why": "stopped after step 10"}
    write_launches(run_dir, entry)
    told = facts(run_dir)
    assert told["records"] == 0 and told["steps"] == {"done": 10, "total": 30}
    assert dict(rows_of(told))["steps"] == "10 of 30 (33 %)"


def test_a_loss_that_fell_by_little_did_not_fall_by_nothing(run_dir: Path) -> None:
    rows = records(run_dir)
    for row, loss in zip(rows, np.linspace(4.0, 3.96016, len(rows)), strict=True):
        row["train_loss"] = float(loss)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert dict(rows_of(facts(run_dir)))["training loss"].startswith("4.000 → 3.960, -0.040 (-0.996 %)")


def test_steps_that_come_again_replace_the_first_ones(run_dir: Path) -> None:
    rows = records(run_dir)
    again = [{**row, "train_loss": row["train_loss"] + 1} for row in rows[3:5]]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again]))
    run = read_run(run_dir)
    assert run.columns["step"].tolist() == [4, 8, 10, 12, 16]
    assert run.columns["train_loss"][-1] == again[-1]["train_loss"]


@pytest.mark.parametrize("missing", ["config.yaml", "run.json", "training_metrics.json", "metrics.jsonl", "step-*"])
def test_a_missing_file_costs_only_what_it_holds(run_dir: Path, missing: str) -> None:
    for path in list(run_dir.glob(missing)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    told = facts(run_dir)
    assert told["steps"]["done"] == 30 and told["loss"]["val"]["values"] == 3
    assert (missing in ("config.yaml", "metrics.jsonl")) == any(missing in problem for problem in told["problems"])
    assert (told["checkpoints"]["count"] == 0) == (missing == "step-*")
    assert (told["learning_rate"]["schedule"] is None) == (missing == "config.yaml")
    assert told["state"] == "done" or missing == "step-*"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'{"launches": 3}', b'{"launches": [3]}'])
@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "skipped.jsonl"])
def test_damage_never_ends_it(run_dir: Path, name: str, damage: bytes) -> None:
    (run_dir / name).write_bytes(damage)
    told = facts(run_dir)
    assert told["steps"]["done"] == 30
    json.dumps(told, allow_nan=False)


def test_an_empty_run_has_no_numbers_and_no_diagnosis(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "training_metrics.json"):
        (run_dir / name).write_bytes(b"")
    told = facts(run_dir)
    assert told["records"] == 0 and told["loss"] == {"train": None, "val": None} and told["diagnosis"] == []


def test_skipped_steps_and_rollbacks_are_counted(run_dir: Path) -> None:
    entries = [
        {"step": 9, "rollbacks": 0, "reason": "loss nan", "loss": None, "grad_norm": None},
        {"step": 11, "rollbacks": 0, "reason": "loss 9, limit 3", "loss": 9.0, "grad_norm": 1.0},
        {"step": 12, "rollbacks": 0, "back_to": 10, "left_out": [3, 4]},
    ]
    (run_dir / "skipped.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    skipped = facts(run_dir)["skipped"]
    assert (skipped["steps"], skipped["not_finite"], skipped["rollbacks"]) == (2, 1, 1)
    assert {remark["name"] for remark in facts(run_dir)["diagnosis"]} >= {"NaN", "skipped steps"}


def test_a_checkpoint_and_a_folder_of_something_else_are_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a checkpoint; name the folder of its run"):
        read_run(run_dir / "step-00000030")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="neither a run nor prepared data"):
        read_run(tmp_path / "other")


def test_a_silent_run_is_named(run_dir: Path) -> None:
    with another_process_holds(run_dir / ".lock"):
        run = read_run(run_dir, now=lambda: time.time() + 7200)
        assert any("may hang" in problem for problem in facts_of(run)["problems"])
        assert facts(run_dir)["problems"] == []


def test_reading_changes_nothing(run_dir: Path) -> None:
    def everything() -> dict[str, tuple[int, float]]:
        found = [Path(folder) / name for folder, _, names in os.walk(run_dir) for name in names]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

    before = everything()
    facts(run_dir)
    assert everything() == before
    assert platform.node() in (run_dir / ".lock").read_text()
