"""The benchmark of what a part has one process for, small: each format has its row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import dealing
from benchmarks.common import ROOT


@pytest.mark.slow
def test_each_format_has_a_row(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.dealing", "--megabytes", "12", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, facts = json.loads(out.read_text())["rows"]
    assert [row["input"] for row in rows] == list(dealing.WRITERS)
    assert all(isinstance(row[rate], float) for row in rows for rate in ("survey, MB/s", "deal, MB/s"))
    assert facts == {"megabytes": 12, "repeats": 1}


def test_pieces_are_all_texts_in_order_each_of_that_size_or_just_more() -> None:
    a, b, c, d = "a" * 10, "é" * 10, "b" * 30, "c"
    assert dealing.pieces_of([a, b, "", c, d], 30) == [[a, b], ["", c], [d]]
