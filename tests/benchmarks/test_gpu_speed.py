"""The benchmark of sizes on a GPU in its CPU form, and what it asks of a GPU."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_speed
from benchmarks.common import ROOT
from benchmarks.synthetic import write_random_data
from llmtrain.config import load_config
from llmtrain.model.peak import peak_of_run
from llmtrain.resolve import resolve


@pytest.mark.slow
def test_each_row_is_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu_speed", "--cpu", "--sizes", "124m", "7b", "--steps", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--out", str(out), "optimizer.name=muon"], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *rows, _ = json.loads(out.read_text())["rows"]
    ways = [("124m", "shipped"), ("124m", "eager"), ("7b", "shipped"), ("7b", "eager")]
    assert [(row["size"], row["way"]) for row in rows] == ways
    for row in rows:
        assert row["problem"] is None and row["peak GB"]["min"] > 0
        assert (row["ms/step"]["min"] < row["ms/step"]["max"]) == (row["way"] == "shipped")  # of two turns, and of one
        sequences = 8 if row["size"] == "124m" else 2
        assert row["tokens/s"]["max"] == pytest.approx(sequences * 64 * 1000 / row["ms/step"]["min"])
        assert ("training.compile=false" in row["settings"]) == (row["way"] == "eager")
        assert row["MFU %"] is row["predicted GB"] is row["goals"] is None  # of a CPU they are not known


@pytest.mark.slow
def test_a_last_checkpoint_that_cannot_be_written_and_a_time_that_is_over(tmp_path: Path) -> None:
    """The first comes after the last record; a turn that is too slow has none."""
    data = write_random_data(tmp_path / "data", 100_000, 259)
    settings = gpu_speed._settings("124m", 16, True, data, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # as if the disk were full
    try:
        found = gpu_speed.turn(settings, tmp_path / "run", 16, True, 300.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found["problem"] is None and found["tokens/s"] > 0
    assert not (tmp_path / "run" / "latest").exists()
    settings = gpu_speed._settings("124m", 1_000_000, True, data, tmp_path / "slow")
    assert gpu_speed.turn(settings, tmp_path / "slow", 1_000_000, True, 15.0)["problem"] == "not done after 15 s"


def test_goals_are_judged_by_medians() -> None:
    measured = {"settings": [], "problem": None, "ms/step": 1.0, "tokens/s": 1.0, "PaLM MFU %": 60.0}
    turns = [{**measured, "MFU %": mfu, "peak GB": 105.0, "predicted GB": 100.0} for mfu in (43.0, 46.0, 47.0)]
    near = {"peak within 10 %": True}
    assert gpu_speed.row("7b", "shipped", turns, False)["goals"] == near | {"MFU of 45 %": True}
    assert gpu_speed.row("1.3b", "shipped", turns, False)["goals"] == near | {"MFU of 50 %": False}
    assert gpu_speed.row("124m", "shipped", turns, False)["goals"] == near
    assert gpu_speed.row("1.3b", "eager", turns, False)["goals"] == near
    larger = [{**turn, "peak GB": 111.0} for turn in turns]
    assert gpu_speed.row("1.3b", "eager", larger, False)["goals"] == {"peak within 10 %": False}


@pytest.mark.slow
def test_a_row_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_speed", "--cpu", "--sizes", "124m", "--out", str(tmp_path / "o")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "model.heads=7"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "124m shipped, 124m eager: did not run to the end" in result.stderr
    assert "dim 128 is not divisible by heads 7" in result.stdout


@pytest.mark.parametrize("way", gpu_speed.WAYS)
@pytest.mark.parametrize("size", gpu_speed.LARGE)
def test_what_it_asks_of_a_gpu_fits_into_one(size: str, way: str, tmp_path: Path) -> None:
    """141 GB of an H200, a tenth of them left."""
    (tmp_path / "empty.yaml").write_text("{}")
    settings = [*gpu_speed._settings(size, 40, False, tmp_path, tmp_path), *gpu_speed.WAYS[way]]
    config = resolve(
        load_config(tmp_path / "empty.yaml", settings), vocab_size=gpu_speed.VOCAB_SIZE,
        world_size=1, bf16_native=True, compile_auto=True,
    )  # fmt: skip
    assert peak_of_run(config).bytes < 0.9 * 141e9
