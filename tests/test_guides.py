"""All guides: their links lead somewhere, the index knows each of them, and the tutorial runs as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import environment, free_port

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("docker/*.md"), *ROOT.glob("benchmarks/*.md")])


def anchors(page: Path) -> set[str]:
    """Of its headings, as hosts of repositories make them: lower case, no punctuation, blanks as hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_knows_every_guide() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in DOCS.glob("*.md") if f"]({page.name})" not in index and page.name != "README.md"
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(r"(?:configs|launch)/[\w.-]+\.yaml", page.read_text(encoding="utf-8")):
        assert page.name == "LOG.md" or (ROOT / name).is_file(), name


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=lambda picture: picture.name)
def test_pictures_load_nothing(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    assert "<text" in text and not re.search(r"""url\(["']?(?!#)|@import|(?:href|src)=["'](?!#)|<script""", text)


@pytest.mark.slow
def test_the_tutorial_runs_as_written(tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```bash tutorial\n(.*?)^```", (DOCS / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 3
    for folder in ("configs", "launch"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    prefix = f'accelerate() {{ command accelerate launch --main_process_port {free_port()} "${{@:2}}"; }}\n'
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", prefix + "\n".join(blocks)],
        cwd=tmp_path, env=environment(PATH=path), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "going on from checkpoints/first" in result.stdout and "all-reduce" in result.stdout
    for run in ("first", "two"):
        assert (tmp_path / "checkpoints" / run / "final").exists()
    assert not (tmp_path / "checkpoints/larger").exists()
