"""Which files and documents are taken: the same whoever does the work, and everything that is left out is counted."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import subprocess
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data import dedup
from llmtrain.data.corpus import ReadOptions, cut_into_chunks
from llmtrain.data.dedup import find_duplicates
from llmtrain.data.files import find
from llmtrain.data.filters import FILTERS, parse_filter
from llmtrain.data.flags import parser
from llmtrain.data.parts import prepare_part
from llmtrain.data.recipe import Options
from llmtrain.data.refine import Copies, Refinement
from llmtrain.data.select import LANGUAGES, Selection, patterns_of
from llmtrain.prepare import main, prepare
from tests.conftest import Call, is_one_clear_line
from tests.data.inputs import content
from tests.test_prepare import COMMAND, ROOT, documents_of


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout with sources of several languages, copies, generated files and data."""
    root = tmp_path / "project"
    for folder in ("src/deep", "web", ".git"):
        (root / folder).mkdir(parents=True)
    for number in range(30):
        (root / f"src/m{number:02}.py").write_text(f"def f{number}(x):\n    return x + {number}\n")
        (root / f"src/deep/m{number:02}.rs").write_text(f"fn f{number}(x: u32) -> u32 {{ x + {number} }}\n")
    (root / "src/copy.py").write_text("def f7(x):\n    return x + 7\n")
    (root / "web/app.min.js").write_text("var a=1;" * 2_000)
    (root / "web/numbers.py").write_text("0123456789\n" * 50)
    (root / "web/cafe.py").write_text("name = 'cafe\u0301'  # written in two code points\n")
    (root / "web/huge.py").write_text("# a comment that goes on and on\n" * 2_000)
    (root / "web/tiny.py").write_text("x\n")
    (root / "README.md").write_text("A project.\n")
    return root


FLAGS = ("--language", "python,rust", "--include", "*.js", "--max-file-bytes", "20000", "--min-chars", "5",
         "--normalize", "nfc", "--filter", "letters=0.1", "--filter", "line-length", "--filter", "repeated-lines",
         "--dedup", "--tokenizer", "byte")  # fmt: skip


def test_files_and_documents_are_taken_as_asked_and_the_rest_is_counted(
    project: Path, tmp_path: Path, call: Call
) -> None:
    code, out, err = call(main, "--input", project, *FLAGS, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["skipped"] == {
        "copies of earlier documents": 1,
        "documents by filter letters": 1,
        "documents by filter line-length": 1,
        "documents under --min-chars": 1,
        "files of other names": 1,
        "files over --max-file-bytes": 1,
        "hidden folders": 1,
    }
    assert summary["changed"] == {"normalized documents": 1}
    texts = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert len(texts) == len(set(texts)) == 61
    assert sum(text.startswith("fn ") for text in texts) == 30
    assert "caf\u00e9" in next(text for text in texts if text.startswith("name"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "tokenizer", "train-00000.bin", "train-00000.ends", "val-00000.bin", "val-00000.ends",
    ]  # fmt: skip


def test_documents_over_max_chars_are_left_out_and_counted(tmp_path: Path, call: Call) -> None:
    texts = ["a" * 20, "é" * 21, "b" * 22, "short", "c" * 500]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ("--max-chars", "21", "--tokenizer", "byte", "--val-split", "0")
    code, out, err = call(main, "--input", tmp_path / "in.jsonl", *flags, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out)["skipped"] == {"documents over --max-chars": 2}
    recipe = json.loads((tmp_path / "out/manifest.json").read_text())["recipe"]
    assert recipe["skipped"] == {"documents over --max-chars": 2} and recipe["request"]["max_chars"] == 21
    assert documents_of(tmp_path / "out", "train") == [texts[0], texts[1], texts[3]]


def test_a_filter_that_was_edited_is_another(tmp_path: Path, call: Call) -> None:
    for number in range(30):
        (tmp_path / f"in/{number:02}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / f"in/{number:02}.txt").write_text(f"text {number} " * 9)
    source = tmp_path / "mine.py"

    def prepared(word: str, *flags: str) -> tuple[int, str, str]:
        source.write_text(
            "from llmtrain.data.filters import quality_filter\n\n\n"
            "@quality_filter('mine', 1, 'has a word')\n"
            f"def mine(text, least):\n    return text.count({word!r}) >= least\n"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(FILTERS, "mine", None)
            runpy.run_path(str(source))
            flags = (*flags, "--tokenizer", "byte", "--val-split", "0", "--filter", "mine", "--json")
            return call(main, "--input", tmp_path / "in", *flags)

    out, parts = str(tmp_path / "out"), str(tmp_path / "parts")
    code, said, _ = prepared("text 1", "--out", out)
    assert code == 0 and json.loads(said)["splits"]["train"]["documents"] == 11
    assert json.loads(prepared("text 1", "--out", out)[1])["already_prepared"]
    code, _, err = prepared("text 2", "--out", out)
    assert code == 2 and is_one_clear_line(err) and "holds data prepared from other input or options" in err
    assert prepared("text 1", "--out", parts, "--part", "1/2")[0] == 0
    code, _, err = prepared("text 2", "--out", parts, "--part", "2/2")
    assert code == 2 and is_one_clear_line(err) and "the code of a filter was changed since" in err, err


@pytest.mark.slow
def test_neither_workers_nor_parts_nor_a_kill_change_a_byte(project: Path, tmp_path: Path, monkeypatch) -> None:
    (project / "zz.jsonl").write_text(
        "".join(
            json.dumps({"text": f"line {i % 1_500} of some text {'x' * (i % 1_500)}\n"}) + "\n" for i in range(6_000)
        )
    )
    options = Options(
        (str(project),), tmp_path / "one", "bbpe", 300, workers=1, dedup=True, shard_tokens=40_000,
        selection=Selection(("*.py", "*.rs", "*.jsonl")), refine=Refinement("nfkc", 5, None, (("letters", 0.1),)),
    )  # fmt: skip
    whole = prepare(options).manifest
    assert whole.recipe["skipped"]["copies of earlier documents"] == 4_500 + 1
    prepare(replace(options, out=tmp_path / "two", workers=2))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    # The same, part by part, the first of them killed on its way: in whatever it is doing then.
    command = [*COMMAND, "--input", str(project), "--include", "*.py,*.rs,*.jsonl", "--tokenizer", "bbpe"]
    command += ["--vocab-size", "300", "--dedup", "--shard-tokens", "40000", "--normalize", "nfkc", "--min-chars", "5"]
    command += ["--filter", "letters=0.1", "--out", str(tmp_path / "three")]
    process = subprocess.Popen([*command, "--part", "1/3"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not list((tmp_path).glob("three.parts/plan.partial-*/duplicates")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "three").exists() and not (tmp_path / "three.parts/plan").exists()
    for number in (3, 1, 2):
        prepare_part(replace(options, out=tmp_path / "three"), number, 3, say=lambda line: None)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    # The command line asks for the same.
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("already prepared")


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60),
    in_memory=st.integers(1, 70),
    chunk_bytes=st.integers(1, 200),
)
def test_of_equal_documents_the_first_stays_however_many_fit_into_memory(
    documents: list[str], in_memory: int, chunk_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("dedup")
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    files, reading = find([str(folder / "x.jsonl")]).files, ReadOptions()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "IN_MEMORY", in_memory)
        chunks = cut_into_chunks(files, reading, chunk_bytes)
        path = find_duplicates(chunks, reading, folder, workers=1, report=lambda done, note="": None)
    copies = Copies(path)
    first = {text: number for number, text in reversed(list(enumerate(documents)))}
    assert [number in copies for number in range(len(documents))] == [
        first[text] != number for number, text in enumerate(documents)
    ]
    assert sorted(entry.name for entry in folder.iterdir()) == ["duplicates", "x.jsonl"]


def naive(name: str, text: str, value: float) -> bool:
    """What the filters say they do, one character and line at a time."""
    if name == "letters":
        return sum(map(str.isalpha, text)) >= value * len(text)
    if name == "line-length":
        return len(text) / len(text.rstrip("\n").split("\n")) <= value
    lines = [line for line in text.splitlines() if line.strip()]
    seen, repeated = set[str](), 0
    for line in lines:
        repeated += line in seen
        seen.add(line)
    return not lines or repeated <= value * len(lines)


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.text("ab1 \n", min_size=1),
    name=st.sampled_from(sorted(FILTERS)),
    value=st.floats(0, 1) | st.floats(0, 20),
)
def test_filters_say_what_they_mean(text: str, name: str, value: float) -> None:
    assert FILTERS[name].keeps(text, value) == naive(name, text, value)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.sampled_from(["nfc", "nfkc"]))
def test_text_is_brought_into_a_form_once(text: str, form: str) -> None:
    counts = Counter[str]()
    refined = Refinement(form)(text, counts)
    assert refined == unicodedata.normalize(form.upper(), text)
    assert counts["normalized documents"] == (refined != text)
    assert Refinement(form)(refined, Counter()) == refined


def test_every_language_names_files_of_its_own() -> None:
    assert list(LANGUAGES) == sorted(LANGUAGES)
    for language in LANGUAGES:
        selection, left_out = Selection(patterns_of([language])), Counter[str]()
        for suffix in LANGUAGES[language].split():
            assert selection.takes(Path("a/b") / f"x{suffix}", True, 1, left_out)
            assert selection.takes(Path(f"x{suffix}.gz"), True, 1, left_out)
        assert not selection.takes(Path("x.unheard"), True, 1, left_out) and left_out.total() == 1


def test_paths_are_matched_below_the_input_wherever_that_lies(tmp_path: Path) -> None:
    project = tmp_path / "src" / "proj"
    for name in ("src/a.py", "tests/b.py", "c.py"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x = 1\n")
    for source in (project, project / "**" / "*.py"):
        found = find([str(source)], selection=Selection(("src/*.py",)))
        assert [file.path.name for file in found.files] == ["a.py"]


def test_what_is_not_chosen_is_not_in_the_request() -> None:
    """So that data from before there was a choice is that of the same command today."""
    chosen = {"include", "max_file_bytes", "normalize", "min_chars", "max_chars", "filter", "filter_digest", "dedup"}
    assert not chosen & Options().request([]).keys()
    every = Options(
        selection=Selection(("*.py",), 10), refine=Refinement("nfc", 1, 2, (("line-length", 1234567.0),)), dedup=True
    ).request([])
    assert chosen <= every.keys() and every["filter"] == ["line-length=1234567.0"]


def test_a_file_that_was_named_is_taken_whatever_it_is_called(project: Path) -> None:
    found = find([str(project / "README.md"), str(project)], None, Selection(("src/*.py",), 10_000))
    assert found.files[0].path.name == "README.md"
    assert {file.path.parent.name for file in found.files[1:]} == {"src"}
    assert found.left_out["files of other names"] == 36


def refusals() -> Iterator[tuple[list[str], str]]:
    yield ["--language", "pyhton"], "--language pyhton: did you mean 'python'?"
    yield ["--include", "*.cobol"], "none of its 67 files is taken (1 hidden folders, 67 files of other names)"
    yield ["--filter", "leters"], "--filter leters: no filter 'leters'; did you mean 'letters'?"
    yield ["--filter", "letters=many"], "--filter letters=many: 'many' is no number"
    yield ["--min-chars", "9", "--max-chars", "8"], "--min-chars 9 is over --max-chars 8"
    yield (
        ["--min-chars", "99999"],
        "no text in it (67 documents under --min-chars); name files of text, or leave less out",
    )
    yield ["--normalize", "nfd"], "argument --normalize: invalid choice: 'nfd'"
    yield ["--max-file-bytes", "0"], "argument --max-file-bytes: must be a whole number of at least 1"


@pytest.mark.parametrize(("flags", "message"), list(refusals()))
def test_what_cannot_be_is_one_clear_line(
    flags: list[str], message: str, project: Path, tmp_path: Path, call: Call
) -> None:
    code, out, err = call(main, "--input", project, *flags, "--out", tmp_path / "out")
    assert code == 2 and out == "" and is_one_clear_line(err) and message in err, err
    assert not list(tmp_path.glob("out*"))


def test_links_that_lead_in_circles_are_one_clear_line_or_followed_once(tmp_path: Path, call: Call) -> None:
    (tmp_path / "texts/inner").mkdir(parents=True)
    for number in range(5):
        (tmp_path / f"texts/inner/{number}.txt").write_text(f"text number {number} " * 20)
    (tmp_path / "texts/inner/up").symlink_to(tmp_path / "texts")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for source in ("a", "a/x.txt"):
        code, _, err = call(main, "--input", tmp_path / source, "--out", tmp_path / "out")
        assert code == 2 and is_one_clear_line(err) and "a link that leads in a circle" in err
    code, _, err = call(main, "--input", tmp_path / "texts", "--out", tmp_path / "a")
    assert code == 2 and is_one_clear_line(err) and f"{tmp_path / 'a'}: a link that leads in a circle" in err
    code, out, _ = call(
        main,
        "--input",
        tmp_path / "texts",
        "--tokenizer",
        "byte",
        "--val-split",
        0,
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert code == 0 and json.loads(out)["splits"]["train"]["documents"] == 5


def test_marks_of_copies_are_looked_up_beyond_their_end(tmp_path: Path) -> None:
    np.array([0, 1], np.uint8).tofile(tmp_path / "marks")
    (tmp_path / "none").touch()
    assert [n in Copies(tmp_path / "marks") for n in range(3)] == [False, True, False]
    assert 0 not in Copies(tmp_path / "none")


def test_the_guide_lists_every_filter_with_its_default() -> None:
    guide = (ROOT / "docs/data.md").read_text()
    for name, filter_ in FILTERS.items():
        about = filter_.about.removesuffix(".")
        assert f"| `{name}` | {filter_.default:g} | {about} |" in guide


def test_every_command_of_the_guide_is_understood() -> None:
    guide = (ROOT / "docs/data.md").read_text().replace("\\\n", " ")
    commands = [line for line in guide.splitlines() if line.startswith("llmtrain prepare")]
    assert len(commands) >= 5
    for command in commands:
        flags = vars(parser().parse_args(shlex.split(command)[2:]))
        if not flags["filter_module"]:  # of which the guide says what is in it: tests/data/test_filter_module.py
            assert len([parse_filter(text) for text in flags["filters"]]) == command.count("--filter")
        assert bool(patterns_of(flags["languages"])) == ("--language" in command)
