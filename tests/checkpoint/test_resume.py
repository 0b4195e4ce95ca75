"""What a launch that goes on from a checkpoint knows of it, and what it holds on to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import FINAL, pointed, step_folder
from llmtrain.checkpoint.store import open_verified
from llmtrain.train import main
from tests.conftest import small_config


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
