"""The guide docs/export.md tells the truth: its commands and its program run as written, its table is what is done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmtrain.cli import main
from llmtrain.hf_config import FOLDER_KEYS, READABLE
from tests.conftest import Call, prose, records

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
OPTIONS = ("--dtype", "--shard-bytes", "--json")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_its_commands_and_its_program_run_as_written(
    trained_run: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("checkpoints").mkdir()
    Path("checkpoints/mine").symlink_to(trained_run)
    Path("my_texts").mkdir()
    Path("my_texts/one.txt").write_text(prose(20_000, seed=4))
    first, second = blocks("bash guide")
    (program,) = blocks("python guide")

    def run(script: str) -> None:
        for line in script.splitlines():
            command, *arguments = shlex.split(line)
            assert command == "llmtrain"
            code, _, err = call(main, *arguments)
            assert code == 0, f"{line}: {err}"

    run(first)
    shown: list[str] = []
    exec(compile(program, "docs/export.md", "exec"), {"print": shown.append})
    assert len(shown) == 1 and shown[0].startswith("def ")
    run(second)
    assert records(Path("checkpoints/again"))[-1]["step"] == 200


def test_it_names_all_that_can_be_read_and_all_that_a_folder_decides() -> None:
    for name in (*FOLDER_KEYS, *OPTIONS, *(architecture.removesuffix("ForCausalLM") for architecture in READABLE)):
        assert name in GUIDE, name
