"""The benchmark of sizes on a GPU in its CPU form, and what it asks of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_speed
from llmtrain.config import load_config
from llmtrain.resolve import resolve


@pytest.mark.slow
def test_each_row_is_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu_speed", "--cpu", "--sizes", "124m", "7b", "--steps", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--out", str(out), "optimizer.name=muon"], cwd=gpu_speed.ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *rows, _ = json.loads(out.read_text())["rows"]
    assert [row["size"] for row in rows] == ["124m", "7b"]
    for row in rows:
        assert row["problem"] is None and row["tokens/s"] > 0 and row["peak GB"] > 0
        assert row["tokens/s"] == pytest.approx(2 * 64 * 1000 / row["ms/step"], rel=1e-2)
        assert row["MFU %"] is None and row["predicted GB"] is None  # of a CPU neither is known


@pytest.mark.slow
def test_a_row_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_speed", "--cpu", "--sizes", "124m", "--out", str(tmp_path / "o")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "model.heads=7"], cwd=gpu_speed.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "124m: did not run to the end" in result.stderr
    assert "dim 128 is not divisible by heads 7" in result.stdout


@pytest.mark.parametrize("size", gpu_speed.LARGE)
def test_what_it_asks_of_a_gpu_fits_into_one(size: str, tmp_path: Path) -> None:
    """141 GB of an H200, a tenth of them left."""
    (tmp_path / "empty.yaml").write_text("{}")
    settings = gpu_speed._settings(size, 40, False, tmp_path, tmp_path)
    config = resolve(
        load_config(tmp_path / "empty.yaml", settings), vocab_size=gpu_speed.VOCAB_SIZE,
        world_size=1, bf16_native=True, compile_auto=True,
    )  # fmt: skip
    assert gpu_speed._predicted(config) < 0.9 * 141e9
