"""Every verb explains itself with an example, and is a module of its own."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.cli import VERBS
from llmtrain.errors import UserError
from tests.conftest import Call, Command


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"llmtrain.{verb}").main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert f"example:\n  llmtrain {verb} " in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--help", "--no-such-flag"])
@pytest.mark.parametrize("verb", VERBS)
def test_help_and_a_wrong_flag_do_not_wait_for_torch(verb: str, argument: str) -> None:
    code = (
        "import sys\nfrom llmtrain.cli import main\nfrom llmtrain.errors import UserError\n"
        f"try:\n    main([{verb!r}, {argument!r}])\n"
        "except (SystemExit, UserError) as end:\n    print(type(end).__name__)\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    end = "SystemExit" if argument == "--help" else "UserError"
    assert result.stdout.splitlines()[-2:] == [end, "False"]


def test_a_foreseen_error_is_one_line_whatever_it_quotes(call: Call) -> None:
    def fail(_argv: list[str]) -> None:
        raise UserError("x:\n  first\r\n\tsecond\u2028third, in 'two  blanks'")

    assert call(fail) == (2, "", "llmtrain: error: x: first second third, in 'two  blanks'\n")


def test_what_an_encoding_lacks_costs_only_that_character(data: Path, llmtrain: Command, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "Größe")
    narrow = {"PYTHONIOENCODING": "ascii"}
    result = llmtrain("verify", "Größe", env=narrow)
    assert (result.returncode, result.stdout[:12], result.stderr) == (0, "ok    Gr??e:", "")
    result = llmtrain("verify", "日本", env=narrow)
    assert (result.returncode, result.stderr) == (2, "llmtrain: error: ??: no such folder\n")


def test_a_verb_is_a_module_and_ends_with_its_exit_code() -> None:
    command = [sys.executable, "-m", "llmtrain.verify", "none"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "llmtrain: error: none: no such folder\n")
