"""Every verb explains itself with an example, and is a module of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from llmtrain.cli import VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"llmtrain.{verb}").main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert f"example:\n  llmtrain {verb} " in capsys.readouterr().out


def test_a_verb_is_a_module_and_ends_with_its_exit_code() -> None:
    command = [sys.executable, "-m", "llmtrain.verify", "none"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "llmtrain: error: none: no such folder\n")
