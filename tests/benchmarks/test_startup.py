"""How long a start takes is measured on real launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.startup import seconds_of, seconds_to_first_step


@pytest.mark.slow
def test_a_launch_makes_one_step_and_its_time_counts_from_the_launch(data: Path, tmp_path: Path) -> None:
    seconds = seconds_to_first_step(data, tmp_path / "run", "data.seq_len=16")
    [record] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert record["step"] == 1
    assert seconds > seconds_of("--version") > 0
