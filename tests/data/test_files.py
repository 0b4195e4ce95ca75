"""What `prepare` takes of an input: nothing unasked, nothing left out unseen, and one line for what cannot be taken."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from llmtrain.prepare import main
from tests.conftest import Call, is_one_clear_line

PLAIN = ("--tokenizer", "byte", "--val-split", 0, "--json")


def refused(call: Call, *arguments: object, out: Path) -> str:
    """Prepare what is to be refused; return the one line."""
    code, said, err = call(main, *arguments, "--out", out)
    assert code == 2 and said == "" and is_one_clear_line(err), err
    assert not list(out.parent.glob(f"{out.name}*"))
    return err


def prepared(call: Call, *arguments: object, out: Path) -> dict[str, Any]:
    """Prepare what is to be taken; return the summary."""
    code, said, err = call(main, *arguments, *PLAIN, "--out", out)
    assert code == 0, err
    return cast(dict[str, Any], json.loads(said))


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
    splits = prepared(call, "--input", f"{foreign}/*.txt", out=tmp_path / "out")["splits"]
    assert splits["train"]["documents"] == 1


@pytest.mark.parametrize("flag", ["--input", "--val-input", "--include", "--language"])
def test_a_shell_variable_that_is_not_set_is_no_input_and_no_choice(
    flag: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.txt").write_text("text that nobody named " * 20)
    monkeypatch.chdir(tmp_path)
    for empty in ("", " "):
        err = refused(call, "--tokenizer", "byte", flag, empty, out=tmp_path / "out")
        assert f"argument {flag}: names nothing (a shell variable that is not set?)" in err


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with two texts, one of them deeper."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("some text " * 20)
    (folder / "deep/b.md").write_text("other text " * 20)
    return folder


def test_whatever_a_walk_leaves_out_is_counted(texts: Path, tmp_path: Path, call: Call) -> None:
    (texts / ".git").mkdir()
    (texts / ".git/config").write_text("hidden")
    for name in (".one", "deep/.two"):
        (texts / name).write_text("hidden")
    os.mkfifo(texts / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(texts / "deep/socket"))
        skipped = prepared(call, "--input", texts, out=tmp_path / "out")["skipped"]
    assert skipped == {"hidden files": 2, "hidden folders": 1, "special files": 2}
    recipe = json.loads((tmp_path / "out/manifest.json").read_text())["recipe"]
    assert recipe["skipped"] == skipped
    assert prepared(call, "--input", f"{texts}/*", out=tmp_path / "glob")["skipped"] == {"special files": 1}


@pytest.mark.parametrize("target", ["nowhere", "../texts/gone.txt"])
def test_a_link_that_leads_nowhere_is_refused_or_counted(target: str, texts: Path, tmp_path: Path, call: Call) -> None:
    """As among token files: what is not there any more would be missed, and nobody would see it."""
    link = texts / "gone.txt"
    link.symlink_to(target)
    nowhere = "a link that leads in a circle" if "gone" in target else "a link to nowhere, which is not there"
    for source in (texts, f"{texts}/*.txt"):
        err = refused(call, "--input", source, *PLAIN, out=tmp_path / "out")
        assert f"{link}: {nowhere}; remove it, mend it, or leave such links out with --skip-bad" in err
    assert f"{link}: {nowhere}" in refused(call, "--input", link, *PLAIN, out=tmp_path / "out")
    skipped = prepared(call, "--input", texts, "--skip-bad", out=tmp_path / "skipped")["skipped"]
    assert skipped == {"links that lead nowhere": 1}
    # One that would not be read is not missed.
    skipped = prepared(call, "--input", texts, "--include", "*.md", out=tmp_path / "others")["skipped"]
    assert skipped == {"files of other names": 2}


def test_what_a_glob_meets_again_around_a_circle_is_counted_once(texts: Path, tmp_path: Path, call: Call) -> None:
    (texts / "deep/up").symlink_to(texts)
    (texts / "gone").symlink_to("nowhere")
    os.mkfifo(texts / "deep/pipe")
    summary = prepared(call, "--input", f"{texts}/**/*", "--skip-bad", out=tmp_path / "out")
    assert summary["splits"]["train"]["documents"] == 2
    assert summary["skipped"] == {"links that lead nowhere": 1, "special files": 1}


def test_a_folder_of_which_nothing_can_be_taken_says_what_was_left_out(tmp_path: Path, call: Call) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/.hidden").write_text("text")
    err = refused(call, "--input", tmp_path / "in", *PLAIN, out=tmp_path / "out")
    assert "a folder without files (left out: 1 hidden files)" in err


def test_prepared_data_below_an_input_is_no_input(texts: Path, tmp_path: Path, call: Call) -> None:
    """A manifest and a tokenizer are text; that of an earlier run was trained on, and made the same command another."""
    first = texts / "data/first"
    whole = prepared(call, "--input", texts, out=first)
    again = prepared(call, "--input", texts, out=first)
    assert again["already_prepared"] and again["fingerprint"] == whole["fingerprint"] and whole["skipped"] == {}
    for number, source in enumerate((texts, f"{texts}/**/*")):
        other = prepared(call, "--input", source, out=texts / f"data/more/{number}")
        assert other["fingerprint"] == whole["fingerprint"]
        assert other["skipped"] == {"folders of prepared data": 1 + number}
    for source in (first, f"{first}/**/*.json"):
        err = refused(call, "--input", source, *PLAIN, out=tmp_path / "out")
        assert f"{source}: holds data that was prepared, not text; llmtrain train takes it as data.path" in err
    (texts / "web").mkdir()
    (texts / "web/manifest.json").write_text('{"name": "an app"}')
    assert prepared(call, "--input", texts, out=tmp_path / "out")["splits"]["train"]["documents"] == 3


def test_unfinished_data_below_an_input_is_no_input(texts: Path, tmp_path: Path, call: Call) -> None:
    flags = ("--input", texts, *PLAIN, "--out", texts / "data/first")
    assert call(main, *flags, "--part", "2/2")[0] == 0
    assert (texts / "data/first.parts/plan/plan.json").is_file()
    other = prepared(call, "--input", texts, out=tmp_path / "other")
    assert other["skipped"] == {"folders of prepared data": 1}
    code, out, err = call(main, *flags, "--part", "1/2")
    assert code == 0, err
    assert json.loads(out)["fingerprint"] == other["fingerprint"] and json.loads(out)["skipped"] == {}


def test_a_file_that_two_inputs_reach_is_refused(texts: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "alias").symlink_to(texts)
    os.link(texts / "a.txt", tmp_path / "hard.txt")
    for first, second, taken in (
        (f"{texts}/*.txt", texts, texts / "a.txt"),
        (texts, texts / "deep", texts / "deep/b.md"),
        (texts / "a.txt", texts / "a.txt", texts / "a.txt"),
        (texts, tmp_path / "alias/deep", tmp_path / "alias/deep/b.md"),
        (texts, tmp_path / "hard.txt", tmp_path / "hard.txt"),
    ):
        err = refused(call, "--input", first, "--input", second, *PLAIN, out=tmp_path / "out")
        assert (
            f"{taken}: is taken by --input {first}" in err and f" and by --input {second}; name each file once" in err
        )
    # What is not taken is not taken twice, nor are files of the same text the same.
    (tmp_path / "copy.txt").write_bytes((texts / "a.txt").read_bytes())
    inputs = ("--input", texts, "--input", texts / "a.txt", "--input", tmp_path / "copy.txt")
    assert prepared(call, *inputs, "--include", "*.md", out=tmp_path / "out")["splits"]["train"]["documents"] == 3


RECORDS = "".join(json.dumps({"text": f"document {number}", "id": number}) + "\n" for number in range(9)).encode()


@pytest.mark.parametrize("name", ["x.ndjson", "U.JSONL", "x.NdJson.gz", "U.JSONL.GZ", "x.jsonl.ZST", "x.ndjson.zst"])
def test_what_a_name_says_does_not_depend_on_its_case(name: str, tmp_path: Path, call: Call) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(name.lower()[name.rindex(".") :], bytes)
    (tmp_path / name).write_bytes(pack(RECORDS))
    assert prepared(call, "--input", tmp_path / name, out=tmp_path / "out")["splits"]["train"]["documents"] == 9


def test_a_table_and_a_packed_text_of_capital_letters_are_read(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "U.TXT.GZ").write_bytes(gzip.compress(b"some text"))
    parquet.write_table(pa.table({"text": ["one", "two"]}), folder / "T.PARQUET")
    summary = prepared(call, "--input", folder, "--include", "*.TXT,*.PARQUET", out=tmp_path / "out")
    assert summary["splits"]["train"]["documents"] == 3 and summary["skipped"] == {}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (RECORDS, "its lines are JSON records"),
        (
            b"\xef\xbb\xbf\n" + RECORDS.replace(b"text", b"body").replace(b"\n", b"\r\n\r\n"),
            "its lines are JSON records",
        ),
        (b'{"text": "one"}', "its first line is a record with a field 'text'"),
        (b'[\n {\n  "id": 1,\n  "text": "one"\n },\n', "a list of records with a field 'text'"),
    ],
)
def test_records_in_a_json_file_are_not_trained_on_with_their_brackets(
    content: bytes, told: str, texts: Path, tmp_path: Path, call: Call
) -> None:
    plain, packed = texts / "c4.json", texts / "deep/c4.json.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for source, first in ((plain, plain), (packed, packed), (texts, plain), (f"{texts}/**/*.json.gz", packed)):
        err = refused(call, "--input", source, *PLAIN, out=tmp_path / "out")
        assert f"{first}: {told}, and a .json file is read as plain text" in err
    for part in ("1/2", "2/2"):
        code, _, err = call(main, "--input", texts, *PLAIN, "--part", part, "--out", tmp_path / "parts")
        assert code == 2 and is_one_clear_line(err) and f"{plain}: {told}" in err
    # Whoever asks for it has it, and without a word.
    for number, flags in enumerate((("--include", "*"), ("--language", "json,markdown"))):
        code, out, err = call(main, "--input", texts, *flags, *PLAIN, "--out", tmp_path / f"out{number}")
        assert (code, err) == (0, "") and json.loads(out)["splits"]["train"]["documents"] == 4 - number


def test_json_files_of_a_checkout_are_text_and_that_is_said_once(texts: Path, tmp_path: Path, call: Call) -> None:
    source = {"package.json": '{\n "name": "x"\n}\n', "one-line.json": '{"strict": true}', "list.json": '[{"a": 1}]',
              "broken.json": "[" * 100_000, "empty.json": ""}  # fmt: skip
    for number, (name, text) in enumerate(source.items()):
        folder = texts if number else texts / "deep"
        (folder / name).write_text(text)
    code, out, err = call(main, "--input", texts, *PLAIN, "--part", "1/2", "--out", tmp_path / "out")
    assert code == 0 and is_one_line(err) and "llmtrain: 5 .json files are read as plain text" in err
    code, out, err = call(main, "--input", texts, *PLAIN, "--part", "2/2", "--out", tmp_path / "out")
    assert (code, err) == (0, "") and json.loads(out)["splits"]["train"]["documents"] == 6
    for name, text in source.items():
        if text:
            (path,) = texts.rglob(name)
            assert prepared(call, "--input", path, out=tmp_path / name)["splits"]["train"]["documents"] == 1


def is_one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1
