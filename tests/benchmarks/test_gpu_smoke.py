"""The GPU benchmark in its CPU form: what runs unattended on a GPU must not meet its first bug there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_smoke

ROOT = Path(gpu_smoke.__file__).resolve().parents[1]


def smoke(
    out: Path, *arguments: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    command = [sys.executable, "-m", "benchmarks.gpu_smoke", "--cpu", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    return result, [row for row in rows if "engine" in row]


@pytest.mark.slow
def test_each_kind_of_engine_gives_the_losses_of_one_process(tmp_path: Path) -> None:
    result, rows = smoke(tmp_path / "out", "--engines", "single", "zero2", "zero3-offload", "--variants", "fp32")
    assert result.returncode == 0, result.stdout
    assert [row["class"] for row in rows] == ["accelerate", "deepspeed", "deepspeed"]
    for row in rows:
        assert row["losses"] == pytest.approx(rows[0]["losses"], rel=1e-5)
        assert row["losses"][-1] < row["losses"][0]
        assert row["tokens/s"] > 0 and row["peak GB"] > 0 and row["MFU %"] is row["waits/step"] is None


@pytest.mark.slow
def test_a_row_that_fails_says_why_and_fails_the_whole(tmp_path: Path) -> None:
    result, (row,) = smoke(tmp_path / "out", "--engines", "single", "--variants", "fp32", "--preset", "none")
    assert result.returncode == 1
    assert "model.preset" in row["problem"] and "none" in row["problem"], row["problem"]


def test_rows_without_time_left_are_not_run_and_said_to_be(tmp_path: Path) -> None:
    result, rows = smoke(tmp_path / "out", "--variants", "bf16", "--minutes", "0")
    assert result.returncode == 0
    assert [row["engine"] for row in rows] == gpu_smoke.ENGINES
    assert all(row["problem"].endswith("not run: out of time") for row in rows)


def test_losses_that_differ_or_are_no_numbers_fail() -> None:
    def difference(value: float) -> dict[str, Any]:
        single = {"engine": "single", "variant": "fp32", "losses": [5.0, 4.0]}
        other = {"engine": "zero3", "variant": "fp32", "losses": [5.0, value]}
        gpu_smoke.compare(other, [single, other])
        return other

    assert "failed" not in difference(4.00001)
    assert difference(4.001)["failed"]
    assert difference(float("nan"))["failed"]
