"""The benchmark of checkpoints in its small form: every contender saves and gets back the same state."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import ROOT

needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")


@pytest.mark.slow
@needs_deepspeed
def test_all_contenders_save_and_load_the_same_state(tmp_path: Path) -> None:
    """That what was loaded is what was saved is checked by the benchmark itself, in each turn."""
    out = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "benchmarks.checkpoint", "--preset", "1m", "--rounds", "1", "--folder", str(tmp_path),
        "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, facts = json.loads(out.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["llmtrain", "llmtrain, async", "accelerate", "DeepSpeed", "DCP"]
    for row in rows:
        assert 0 < row["save s"] <= row["durable s"]
        if row["contender"] == "llmtrain, async":
            assert 0 < row["stall s"] + row["stall after others s"] < row["save s"] and row["load s"] is None
        else:
            assert row["load s"] > 0 and row["stall s"] is None
    assert 0 < rows[0]["open s"] + rows[0]["read s"] <= rows[0]["load s"]
    assert facts["state GB"] == pytest.approx(12 * 6.45e6 * 1e-9, rel=0.5)
    assert all(len(turns) == 2 for turns in facts["turns, the first not counted"].values())
    assert list(tmp_path.iterdir()) == [out], "what was written is deleted"


@pytest.mark.slow
@needs_deepspeed
def test_two_processes_save_and_load_their_parts(tmp_path: Path) -> None:
    """Under DDP and ZeRO-3, beside what their users do; each load is checked as above."""
    out = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "benchmarks.checkpoint_ranks", "--preset", "1m", "--rounds", "1", "--quiet",
        "--folder", str(tmp_path), "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, _ = json.loads(out.read_text())["rows"]
    assert [(row["launch"], row["contender"]) for row in rows] == [
        ("cpu-ddp", "llmtrain"), ("cpu-ddp", "llmtrain, async"), ("cpu-ddp", "accelerate"), ("cpu-ddp", "DCP"),
        ("cpu-zero3", "llmtrain"), ("cpu-zero3", "llmtrain, async"), ("cpu-zero3", "DeepSpeed"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["save s"] <= row["durable s"]
        if row["contender"] == "llmtrain, async":
            assert 0 < row["stall s"] < row["save s"] and row["load s"] is None
        else:
            assert row["load s"] > 0 and row["stall s"] is None
        parts = row["GB of each process"]
        assert sum(parts) == pytest.approx(12 * 6.45e6 * 1e-9, rel=0.5)
        assert min(parts) > 0.3 * sum(parts)  # half, but for the one large tensor of a small model
    assert list(tmp_path.iterdir()) == [out], "what was written is deleted"


@pytest.mark.slow
def test_a_resume_is_measured_beside_a_fresh_launch(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "benchmarks.resume", "--preset", "1m", "--rounds", "1", "--folder", str(tmp_path),
        "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, facts = json.loads(out.read_text())["rows"]
    seconds = {row["what"]: row["median"] for row in rows}
    assert 0 < seconds["read s"] < seconds["resume s"] and seconds["fresh s"] > 0
    assert facts["checkpoint MB"] == pytest.approx(12 * 6.45, rel=0.5)
    assert list(tmp_path.iterdir()) == [out], "what was written is deleted"
