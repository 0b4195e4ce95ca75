"""What `prepare` takes of an input: nothing unasked, nothing left out unseen, and one line for what cannot be taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmtrain.prepare import main
from tests.conftest import Call, is_one_clear_line

PLAIN = ("--tokenizer", "byte", "--val-split", 0, "--json")


def refused(call: Call, *arguments: object, out: Path) -> str:
    """Prepare what is to be refused; return the one line."""
    code, said, err = call(main, *arguments, "--out", out)
    assert code == 2 and said == "" and is_one_clear_line(err), err
    assert not list(out.parent.glob(f"{out.name}*"))
    return err


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with a text and a file of ids whose names are not UTF-8."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    try:
        Path(os.fsdecode(bytes(folder) + b"/\xff.txt")).write_text("some text")
        Path(os.fsdecode(bytes(folder) + b"/\xfe.bin")).write_bytes(b"\1\0" * 50)
    except OSError:
        pytest.skip("this file system has no such names")
    return folder


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--input", "{}/\udcff.txt"], "foreign/\\xff.txt: not UTF-8"),
        (["--vocab-size", "9", "--input", "{}/\udcfe.bin"], "foreign/\\xfe.bin: not UTF-8"),
        (["--vocab-size", "9", "--input", "{}/*.bin"], "foreign/\\xfe.bin: not UTF-8"),
        (["--input", "{}/*.txt", "--text-field", "\udcff"], "--text-field \\xff: not UTF-8"),
        (["--input", "{}/*.txt", "--include", "\udcff*,*"], "--include \\xff*: not UTF-8"),
        (["--input", "{}/*.txt", "--tokenizer", "{}/\udcff.json"], "--tokenizer {}/\\xff.json: not UTF-8"),
    ],
)
def test_a_name_that_no_manifest_can_hold_is_one_clear_line(
    arguments: list[str], told: str, foreign: Path, tmp_path: Path, call: Call
) -> None:
    err = refused(call, *(argument.format(foreign) for argument in arguments), out=tmp_path / "out")
    assert told.format(foreign) in err


def test_a_file_of_any_name_is_read_of_its_folder(foreign: Path, tmp_path: Path, call: Call) -> None:
    code, _, err = call(main, "--input", f"{foreign}/*.txt", *PLAIN, "--out", tmp_path / "out")
    assert code == 0, err


@pytest.mark.parametrize("flag", ["--input", "--val-input", "--include", "--language"])
def test_a_shell_variable_that_is_not_set_is_no_input_and_no_choice(
    flag: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.txt").write_text("text that nobody named " * 20)
    monkeypatch.chdir(tmp_path)
    for empty in ("", " "):
        err = refused(call, "--tokenizer", "byte", flag, empty, out=tmp_path / "out")
        assert f"argument {flag}: names nothing (a shell variable that is not set?)" in err
