"""What a launch that goes on from a checkpoint knows of it, and what it holds on to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llmtrain.train
from llmtrain.checkpoint.folders import FINAL, pointed, step_folder
from llmtrain.run import Run
from llmtrain.train import main
from tests.conftest import small_config
from tests.faulty_steps import faulty
from tests.verified import open_verified


@pytest.fixture
def run_dir(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, whose last checkpoint is that of step 30."""
    return Path(shutil.copytree(trained_run, tmp_path / "run", symlinks=True))


def train(data: Path, run_dir: Path, *arguments: str) -> None:
    config = run_dir.with_suffix(".yaml")
    config.write_text(json.dumps(small_config(data, run_dir)))
    main(["--config", str(config), *arguments])


def test_a_run_that_has_nothing_left_to_do_links_its_last_checkpoint_and_a_branch_writes_its_own(
    data: Path, run_dir: Path, tmp_path: Path
) -> None:
    record = step_folder(run_dir, 30) / "rank00000.json"
    before = record.stat().st_ino
    (run_dir / FINAL).unlink()
    train(data, run_dir)
    assert record.stat().st_ino == before and pointed(run_dir, FINAL) == step_folder(run_dir, 30)
    train(data, tmp_path / "branch", "--resume", str(run_dir))
    assert pointed(tmp_path / "branch", FINAL) == step_folder(tmp_path / "branch", 30)
    assert open_verified(step_folder(tmp_path / "branch", 30)).manifest.step == 30


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what is mapped on Linux only")
def test_once_it_has_begun_a_run_holds_no_file_of_a_checkpoint(
    data: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the one it goes on from nor of the one it goes back to: deleting them must free their room."""
    seen: list[tuple[int, bool]] = []
    conclude = llmtrain.train.conclude

    def concluded(run: Run, *rest: Any) -> None:
        seen.append((run.progress.step, str(run_dir) in Path("/proc/self/maps").read_text()))
        conclude(run, *rest)

    monkeypatch.setattr("llmtrain.train.conclude", concluded)
    monkeypatch.setattr("llmtrain.train.accumulate", faulty(dict.fromkeys((235, 243, 251), "nan loss")))
    train(data, run_dir, "training.max_steps=40", "health.max_skips=3", "health.spike_window=8")
    assert [step for step, _ in seen] == [31, 32, *range(31, 41)]
    assert not any(is_mapped for _, is_mapped in seen)
