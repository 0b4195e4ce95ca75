"""Benchmarks that need only this machine run to their end, as a user types them, in a form that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import prose

ROOT = Path(__file__).parents[2]
SHORT = ("training.max_steps=20", "training.eval_every=20", "schedule.warmup_steps=2", "checkpoint.save_every=null")
FORMS = {
    "loop": ("--size", "tiny", "--steps", "2", "--rounds", "2"),
    "loss": ("--tokens", "256", "--dim", "16", "--vocab", "300", "--rounds", "1"),
    "muon": ("--rounds", "1"),
    "recompute": ("--preset", "1m", "--seq-len", "32", "--micro-batch", "2", "--rounds", "1"),
    "learning": ("--text", "{text}", *SHORT),
}


def numbers(of: Any) -> Iterator[float]:
    """All numbers of a JSON value that measure something."""
    if isinstance(of, dict):
        for name, value in of.items():
            if name != "arguments":
                yield from numbers(value)
    elif isinstance(of, list):
        for value in of:
            yield from numbers(value)
    elif isinstance(of, int | float):
        yield of


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_it_runs_to_its_end_and_says_what_it_measured(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose(2_000, seed=1))
    arguments = [one.format(text=text) for one in FORMS[name]]
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(tmp_path / "out.json"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"machine", "versions", "commit"} <= set(result)
    assert len(result["rows"]) >= 2 and all(any(numbers(row)) for row in result["rows"][:-1])
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.slow
def test_a_turn_on_a_cpu_takes_real_steps() -> None:
    asked = {"size": "tiny", "precision": "fp32", "threads": 1, "compiled": False, "steps": 6}
    command = [sys.executable, "-m", "benchmarks.cpu", "--one", json.dumps(asked)]
    measured = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    assert measured["first s"] > 0 < measured["ms/step"]
