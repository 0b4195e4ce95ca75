"""The benchmark of `prepare`, small: each contender has its row, and what was asked for its ratio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import prepare
from benchmarks.common import ROOT


@pytest.mark.slow
def test_each_contender_has_a_row_and_what_was_asked_for_a_ratio(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.prepare", "--scale", "0.005", "--repeats", "1"]
    command += ["--kinds", "byte,bbpe", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, facts = json.loads(out.read_text())["rows"]
    alone, two, libraries = prepare.ALONE, prepare.TWO, ("tokenizers", prepare.FASTEST, "gigatoken")
    assert [(row["kind"], row["what"]) for row in rows] == [
        *(("byte", what) for what in (alone, two)),
        *(("bbpe", what) for what in (alone, two, *libraries, f"{alone}, JSONL", f"{two}, JSONL")),
    ]
    speed = {(row["kind"], row["what"]): row["median"] for row in rows}
    ratios = {(goal["kind"], goal["what"]): goal["ratio"] for goal in facts["goals"]}
    assert ratios["byte", f"{two} / {alone}"] == speed["byte", two] / speed["byte", alone] > 0
    fastest = prepare.FASTEST
    assert ratios["bbpe", f"{alone} / {fastest}"] == speed["bbpe", alone] / speed["bbpe", fastest] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--megatron", "."], "--megatron and --peers-python go together"),
        (["--megatron", ".", "--peers-python", "python"], "--megatron .: no checkout of Megatron-LM"),
        (["--kinds", "byte,bites"], "--kinds bites: not among char, byte"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        prepare.main(arguments)
    assert stopped.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err
