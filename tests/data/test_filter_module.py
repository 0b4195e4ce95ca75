"""Filters in a file of one's own: used by every process alike, told apart once edited, and refused in one line."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.data import filter_module
from llmtrain.data.filter_module import FilterModule
from llmtrain.data.filters import FILTERS
from llmtrain.data.refine import Refinement
from llmtrain.errors import UserError
from llmtrain.prepare import main
from tests.conftest import Call, is_one_clear_line
from tests.data.inputs import content

GUIDE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"^```python filter\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)
(COMMAND,) = re.findall(r"^llmtrain prepare (.* --filter-module .*)$", GUIDE, flags=re.MULTILINE)
PLAIN = ("--tokenizer", "byte", "--val-split", "0", "--json")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with texts of short words and of long ones; what a test registers is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(filter_module, "_loaded", {})
    (tmp_path / "my_texts").mkdir()
    texts = [f"{'some short words and ' * 9}{i}" if i % 3 else f"{'extraordinarily' * 3} {i}" for i in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "my_texts/a.jsonl").write_text("\n".join(lines[:30]))
    (tmp_path / "my_texts/b.jsonl").write_text("\n".join(lines[30:]))
    before = dict(FILTERS)
    yield tmp_path
    FILTERS.clear()
    FILTERS.update(before)


def written(text: str) -> Path:
    path = Path("my_filters.py")
    path.write_text(text)
    return path


def test_the_example_of_the_guide_runs_as_it_stands(call: Call) -> None:
    written(EXAMPLE)
    code, out, err = call(main, *shlex.split(COMMAND), *PLAIN)
    assert code == 0, err
    assert json.loads(out)["splits"]["train"]["documents"] == 40
    assert json.loads(out)["skipped"] == {"documents by filter word-length": 20}


@pytest.mark.slow
def test_neither_workers_nor_parts_change_a_byte(call: Call) -> None:
    written(EXAMPLE)
    flags = ("--input", "my_texts", "--filter-module", "my_filters.py", "--filter", "word-length", "--dedup", *PLAIN)
    for out, more in (("one", ["--workers", 1]), ("two", ["--workers", 2])):
        assert call(main, *flags, *more, "--out", out)[0] == 0
    for part in ("2/3", "1/3", "3/3"):
        code, _, err = call(main, *flags, "--workers", 2, "--part", part, "--out", "three")
        assert code == 0, err
    assert content(Path("one")) == content(Path("two")) == content(Path("three"))


def test_a_file_that_was_edited_is_another_wherever_it_lies(call: Call) -> None:
    path = written(EXAMPLE)
    flags = ("--input", "my_texts", "--filter", "word-length", "--filter", "letters", *PLAIN)
    assert call(main, *flags, "--filter-module", path, "--out", "out")[0] == 0
    assert call(main, *flags, "--filter-module", path, "--out", "parts", "--part", "1/2")[0] == 0
    elsewhere = Path("zz/other.py")
    elsewhere.parent.mkdir()
    elsewhere.write_text(EXAMPLE)
    assert json.loads(call(main, *flags, "--filter-module", elsewhere, "--out", "out")[1])["already_prepared"]
    path.write_text(EXAMPLE.replace("<=", "<"))
    code, _, err = call(main, *flags, "--filter-module", path, "--out", "out")
    assert code == 2 and is_one_clear_line(err) and "holds data prepared from other input or options" in err
    code, _, err = call(main, *flags, "--filter-module", path, "--out", "parts", "--part", "2/2")
    assert code == 2 and is_one_clear_line(err) and "the code of a filter was changed since" in err


def test_a_file_that_is_edited_meanwhile_judges_no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(EXAMPLE)
    refine = Refinement(filters=(("word-length", 12.0),), module=FilterModule.of(path))
    path.write_text(EXAMPLE.replace("<=", ">"))
    assert refine("short words", Counter()) == "short words"
    monkeypatch.setattr(filter_module, "_loaded", {})  # as in a worker that is started now
    with pytest.raises(UserError, match=r"my_filters\.py: was changed while it was used"):
        refine("short words", Counter())


USES = "from llmtrain.data.filters import quality_filter\n"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (None, "my_filters.py: cannot be read (No such file or directory)"),
        ("def f(:\n", "my_filters.py, line 1: SyntaxError: "),
        ("x = 1\nx = nothing\n", "my_filters.py, line 2: NameError: name 'nothing' is not defined"),
        ("import sys\nsys.exit('no')\n", "my_filters.py, line 2: SystemExit: no"),
        ("\0", "my_filters.py"),
        ("import beside\n", "my_filters.py, line 1: ModuleNotFoundError: No module named 'beside'"),
        ("x = 1\n", "my_filters.py: registers no filter; put @quality_filter(NAME, DEFAULT, ABOUT)"),
        (
            f"{USES}quality_filter('letters', 1, 'mine')(len)\n",
            "there is a filter 'letters' already; call it otherwise",
        ),
        (f"{USES}quality_filter('mine', 1, 'mine')(len)\n", "none of its filters is used; --filter mine uses one"),
    ],
)
def test_a_file_that_gives_no_filter_is_one_clear_line(code: str | None, told: str, call: Call) -> None:
    before = dict(FILTERS)
    Path("beside.py").touch()
    if code is not None:
        written(code)
    flags = ("--input", "my_texts", "--filter-module", "my_filters.py", "--filter", "letters")
    status, out, err = call(main, *flags, *PLAIN, "--out", "out")
    assert status == 2 and out == "" and is_one_clear_line(err) and told in err, err
    assert "--filter-module " in err and not list(Path().glob("out*"))
    assert "mine" in told or before == FILTERS


def test_a_filter_that_fails_on_a_document_is_named_with_its_line(call: Call) -> None:
    written(f"{USES}\n\n@quality_filter('mine', 0, 'mine')\ndef mine(text, value):\n    return len(text) / value > 1\n")
    flags = ("--input", "my_texts", "--filter-module", "my_filters.py", "--filter", "mine", *PLAIN)
    code, _, err = call(main, *flags, "--out", "out")
    assert code == 2 and is_one_clear_line(err), err
    assert "--filter mine: fails on a document (" in err and "my_filters.py, line 6: ZeroDivisionError: " in err


def test_token_files_have_no_documents_to_filter(call: Call) -> None:
    written(EXAMPLE)
    Path("ids.bin").write_bytes(b"\1\0" * 50)
    flags = ("--filter-module", "my_filters.py", "--filter", "word-length", "--vocab-size", "9", "--out", "out")
    code, _, err = call(main, "--input", "ids.bin", *flags)
    assert code == 2 and is_one_clear_line(err) and "--filter-module" in err and "for text only" in err
