"""The benchmark of attention kernels in its CPU form: what runs on a GPU must not meet its first bug there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.attention import TORCH, fastest
from benchmarks.common import ROOT


@pytest.mark.slow
def test_it_measures_each_kernel_that_is_there_and_names_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.attention", "--cpu", "--rounds", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out.json")], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *rows, _ = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["size"], row["way"]) for row in rows] == [
        (size, way) for size in ("124m", "1.3b", "7b") for way in ("torch's choice", "flash", "plain")
    ]
    kernels = {row["way"]: row["kernel"] for row in rows}
    assert kernels["torch's choice"] == kernels["flash"] != kernels["plain"]  # a switch that did nothing would show
    assert all(row["ms min"] > 0 and float(row["difference"]) < 1e-5 for row in rows)
    assert "cuDNN: left out" in done.stdout


def test_the_fastest_is_named_and_within_the_spread_that_is_torchs_choice() -> None:
    def row(size: str, way: str, least: float, most: float) -> dict[str, object]:
        return {"size": size, "way": way, "ms min": least, "ms median": (least + most) / 2, "ms max": most}

    rows = [row("7b", TORCH, 10, 12), row("7b", "cuDNN", 7, 8), row("7b", "flash", 8, 9)]
    assert fastest([*rows, row("1.3b", TORCH, 10, 12), row("1.3b", "flash", 9, 11)]) == {"7b": "cuDNN", "1.3b": TORCH}
