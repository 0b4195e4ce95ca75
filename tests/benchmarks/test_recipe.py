"""What learns faster is measured on real runs: a rate of nearly nothing learns less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.recipe import main


@pytest.mark.slow
def test_rates_and_variants_are_run_each(data: Path, tmp_path: Path) -> None:
    where = ["--data", str(data), "--tokens", "8000", "--seq-len", "16", "--out", str(tmp_path / "out.json")]
    small = ["--model", "dim=32", "layers=1", "heads=2", "--batch", "8", "--rates", "adamw=0.01"]
    main([*where, *small, "--variant", "", "optimizer.lr=1e-6 optimizer.eps=1e-7", "--", "training.precision=fp32"])
    shipped, still, about = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert shipped["variant"] == "" and shipped["steps"] == still["steps"] == 62
    assert float(shipped["val_loss"]) < float(still["val_loss"]) - 0.3
    assert about["overrides"] == ["training.precision=fp32"]


def test_a_run_that_fails_ends_it_with_the_reason(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit, match="heads"):
        main(["--data", str(data), "--tokens", "8000", "--out", str(out), "--model", "dim=32", "heads=7", "layers=1"])
    assert not out.exists()
