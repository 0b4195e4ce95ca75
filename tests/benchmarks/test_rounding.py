"""What rounding does to the loss is measured on real runs, and what it is measured by is at zero for the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rounding import main
from llmtrain.errors import UserError


@pytest.mark.slow
def test_the_same_run_again_differs_by_nothing_and_bf16_by_something(data: Path, tmp_path: Path) -> None:
    small = ["model.preset=null", "model.dim=32", "model.layers=1", "model.heads=2", "data.seq_len=16"]
    where = ["--data", str(data), "--steps", "20", "--out", str(tmp_path / "out.json"), "--cpu"]
    main([*where, *small, "--ways", "float32 again", "bf16"])
    first, again, bf16, facts = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert first["way"] == "float32" and first["largest"] == 0
    assert again["largest"] == 0 and again["val_loss"] == first["val_loss"]
    assert 0 < bf16["mean"] <= bf16["largest"] < 0.1
    assert [len(curve) for curve in facts["train_loss"].values()] == [4, 4, 4]


def test_a_run_that_fails_ends_it_with_the_reason(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"float32: did not run to the end: exit code 2: .*heads"):
        main(["--data", str(data), "--out", str(tmp_path / "out.json"), "--cpu", "model.preset=null", "model.heads=7"])
