"""Completion of the shell knows verbs, options and keys; bash itself is asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llmtrain.cli import VERBS
from llmtrain.completion import config_keys, main
from llmtrain.config import load_config
from llmtrain.errors import UserError
from tests.conftest import Call

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=(); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
compopt() { :; }
_llmtrain
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "llmtrain.bash"
    with path.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        main(["bash"])
    return path


@pytest.mark.parametrize(("words", "expected"), [
    ([""], set(VERBS)), (["doc"], {"doctor"}), (["train", "--dry"], {"--dry-run"}),
    (["train", "--config", "x", "optimizer.l"], {"optimizer.lr="}), (["prepare", "--digits", ""], {"join", "split"}),
    (["completion", ""], {"bash", "zsh", "fish"}), (["verify", "dat"], {"data"}),
    (["train", "--config", "c"], {"c.yaml"}),
])  # fmt: skip
def test_bash_offers_what_fits(script: Path, tmp_path: Path, words: list[str], expected: set[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "c.yaml").touch()
    command = ["bash", "-c", ASK, "ask", str(script), "llmtrain", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert {line for line in done.stdout.splitlines() if line} == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_script_names_all_verbs_and_is_one_for_its_shell(shell: str, call: Call, tmp_path: Path) -> None:
    code, out, err = call(main, shell)
    assert (code, err) == (0, "") and all(verb in out for verb in VERBS)
    if shutil.which(shell):
        (tmp_path / "script").write_text(out)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_every_offered_key_is_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").touch()
    assert len(config_keys()) > 70
    for key in config_keys():
        try:
            load_config(tmp_path / "c.yaml", [f"{key}null"])
        except UserError as error:
            assert "unknown" not in str(error), key
