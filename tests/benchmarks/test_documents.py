"""The benchmark of documents in its CPU form: what runs unattended on a GPU must not meet its first bug there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import ROOT


@pytest.mark.slow
def test_it_measures_and_writes(tmp_path: Path) -> None:
    small = ("--seq-len", "64", "--rows", "2", "--rounds", "1", "--documents", "500", "--mean", "20")
    command = [sys.executable, "-m", "benchmarks.documents", *small, "--out", str(tmp_path / "out.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    whats = [row["what"].split(",")[0] for row in rows[:-1]]
    assert whats == ["no mask", "reference", "packing", "packing"]
    assert all(row["median"] > 0 for row in rows[:-1])
