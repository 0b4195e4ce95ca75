"""The benchmark of delivery, small: the real processes, what each delivers, and what is left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data
from benchmarks.common import ROOT
from benchmarks.peer_drivers.delivery import PEERS


@pytest.mark.slow
def test_all_deliver_side_by_side_and_what_is_missing_is_said(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.data", "--tokens", "300000", "--batches", "20", "--rounds", "1"]
    # The environment of the tests has datasets, and none of the others.
    command += ["--openings", "1", "--sizes", "1000000:400000", "--peers-python", sys.executable, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, facts = json.loads(out.read_text())["rows"]
    delivered = {row["delivery"]: row["delivers"] for row in rows if "delivers" in row}
    wide, three = ["int64 (8, 1024)"] * 2, ["int64 (8, 1024)"] * 3
    assert delivered == {
        "bare numpy gather": ["uint16 (8, 1025)"],
        "bare numpy gather, widened": wide,
        "torch DataLoader": wide,
        "torch DataLoader, batch-wise": wide,
        "nanoGPT's way": wide,
        "Hugging Face datasets": ["int64 (8, 1025)"],
        "llmtrain": wide,
        "llmtrain, as stored": ["uint16 (8, 1025)"],
        "llmtrain, mixture": wide,
        "llmtrain, mixture, documents": three,
        "llmtrain, best_fit, documents": three,
    }
    for row in rows[: len(delivered)]:
        assert row["Mtokens/s"]["median"] > 0 and row["first ms"]["median"] > 0
        assert (row["resume ms"] is not None) == row["delivery"].startswith("llmtrain")
    goals = facts["goals"]
    assert sum(goal.endswith(" / torch DataLoader, batch-wise") for goal in goals) == 5
    assert len(goals) == 5 + 5 + 2  # beside the fastest peer as written, the strongest, and floors beside ours
    own, loader = rows[len(delivered) :]
    assert (own["delivery"], own["files"], own["tokens"]) == ("llmtrain", 3, "1e+06")
    assert own["first ms"]["median"] > 0 and own["step 1e+07 ms"]["median"] > 0
    assert (loader["delivery"], loader["files"], loader["step 1e+06 ms"]) == ("torch DataLoader", 1, None)
    assert sorted(facts["left out"]) == ["litdata", "megatron-core", "megatron-core, documents", "mosaicml-streaming"]
    assert "No module named 'litdata'" in facts["left out"]["litdata"]


def test_both_forms_of_the_loader_deliver_the_windows_of_the_file(tmp_path: Path) -> None:
    ids = np.arange(20 * 16 + 1, dtype=np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    spec = {"tokens_file": str(tmp_path / "ids.bin"), "tokens": len(ids), "length": 16, "batch": 4}
    for name in ("torch DataLoader", "torch DataLoader, batch-wise"):
        epoch = list(islice(PEERS[name].open_at(spec, 0), 5))
        inputs, targets = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        order = inputs[:, 0].argsort()
        assert inputs[order].flatten().tolist() == ids[:-1].tolist(), name
        assert targets[order].flatten().tolist() == ids[1:].tolist(), name
        assert inputs[:, 0].tolist() != sorted(inputs[:, 0].tolist()), name


def test_a_python_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        data.main(["--peers-python", "nowhere"])
    assert stopped.value.code == 2
    assert "error: --peers-python nowhere: cannot be run" in capsys.readouterr().err
