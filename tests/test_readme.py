"""The README tells the truth: its tour runs as written, and what it points to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_tour_runs_as_written(tmp_path: Path) -> None:
    tours = re.findall(r"^```bash tour\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert len(tours) == 1
    for folder in ("configs", "launch"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", tours[0]],
        cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "going on from" in result.stdout
    assert (tmp_path / "checkpoints/mine/training_curve.png").stat().st_size > 1000
    assert (tmp_path / "checkpoints/launched/final").exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_shipped_files_that_are_named_exist() -> None:
    for name in re.findall(r"(?:configs|launch)/[\w.-]+\.yaml", README):
        assert (ROOT / name).is_file(), name
