"""docs/report.md tells the truth: its table is that of the rules, its pictures are there, its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import report_pictures
from llmtrain.health import diagnosis, pace_diagnosis

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/report.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_rules() -> None:
    assert report_pictures.with_table(GUIDE) == GUIDE, "run: python docs/report_pictures.py"
    for name in (*diagnosis.RULES, *diagnosis.WITHOUT_SHAPE, *pace_diagnosis.RULES):
        assert f"| {name} |" in GUIDE


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", GUIDE))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / "docs" / target).exists()


@pytest.mark.slow
def test_the_commands_run_as_written(trained_run: Path, tmp_path: Path) -> None:
    (commands,) = re.findall(r"^```bash guide\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "checkpoints").mkdir()
    for name in ("mine", "other"):
        (tmp_path / "checkpoints" / name).symlink_to(trained_run)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env={**os.environ, "PATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").stat().st_size > 20_000 and (tmp_path / "report.json").stat().st_size > 2_000
