"""The benchmark against other trainers, at the tiny size with few steps: the real processes, and what is left out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.common import ROOT
from benchmarks.contenders import SIZES, write_data
from llmtrain.data.shards import TokenDataset

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.slow
def test_trainers_and_bare_loops_run_side_by_side_and_what_is_missing_is_said(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--size", "tiny", "--steps", "40"]
    # The environment of the tests has transformers, and no litgpt.
    command += ["--repeats", "1", "--peers-python", sys.executable, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, facts = json.loads(out.read_text())["rows"]
    assert [(row["precision"], row["trainer"]) for row in rows] == [
        ("fp32", "llmtrain"), ("fp32", "transformers Trainer"), ("fp32", "llmtrain, Llama"),
        ("as-shipped", "llmtrain"), ("as-shipped", "transformers Trainer"),
    ]  # fmt: skip
    for row in rows:
        assert row["parameters"] == pytest.approx(0.07e6, rel=0.1)
        assert row["ms/step"]["median"] > 0
        tokens_per_step = SIZES["tiny"].batch * SIZES["tiny"].seq_len
        assert row["tokens/s"]["median"] == pytest.approx(1000 * tokens_per_step / row["ms/step"]["median"])
        if row["precision"] == "fp32":
            fixed = row["ms/step"]["median"] - row["bare ms/step"]["median"]
            assert row["bare ms/step"]["median"] > 0 and row["fixed ms/step"]["median"] == pytest.approx(fixed)
        else:
            assert row["bare ms/step"] is row["fixed ms/step"] is None
        # A process has to start python and torch; steps are counted from then on.
        assert row["launch to first step s"]["median"] > row["ms/step"]["median"] / 1000
    assert facts["left out"] == {"nanoGPT": "no --nanogpt", "litgpt": "ModuleNotFoundError: No module named 'litgpt'"}
    for name, why in facts["left out"].items():
        assert f"{name}: left out: {why}\n" in done.stdout


def test_all_trainers_get_the_same_tokens(tmp_path: Path) -> None:
    prepared = TokenDataset(write_data(tmp_path, SIZES["tiny"]) / "prepared").split("train")
    raw = np.fromfile(tmp_path / "train.bin", dtype=np.uint16)
    assert len(raw) == len(prepared) == 2_000_000
    starts = np.array([0, 1_234_567, 2_000_000 - 64])
    assert (prepared.gather(starts, 64) == np.stack([raw[start : start + 64] for start in starts])).all()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nanogpt", "nowhere"], "--nanogpt nowhere: there is no train.py"),
        (["--peers-python", "nowhere"], "--peers-python nowhere: cannot be run"),
        (["--size", "10m", "--steps", "10"], "--steps 10: too few at 10m"),
        pytest.param(["--device", "cuda"], "--device cuda: torch finds no GPU", marks=needs_no_gpu),
        (["--repeats", "0"], "0: must be a whole number above 0"),
        (["--size", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        peers.main(arguments)
    assert stopped.value.code == 2
    assert re.search(f"^python -m benchmarks.peers: error: .*{re.escape(problem)}", capsys.readouterr().err, re.M)
