"""Hugging Face datasets, streamed: the documents of a folder's files, whoever reads them; and no code of theirs."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import sys
from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from llmtrain.data import hub
from llmtrain.data.corpus import ReadOptions, cut_into_chunks
from llmtrain.data.files import find_files
from llmtrain.data.parts import prepare_part
from llmtrain.data.recipe import Options
from llmtrain.data.survey import survey
from llmtrain.errors import UserError
from llmtrain.prepare import main, prepare
from tests.conftest import Call, Command, is_one_clear_line
from tests.data.inputs import content


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub._open.cache_clear()


def write_dataset(folder: Path, kind: str, column: str = "text") -> tuple[Path, list[str]]:
    """A dataset of three files, and its documents in order."""
    folder.mkdir(parents=True)
    texts = [f"document {number} é " + "of some length " * (number % 7) for number in range(70)]
    for number, part in enumerate((texts[:30], texts[30:31], texts[31:])):
        if kind == "parquet":
            table = pa.table({"id": list(range(len(part))), column: part})
            parquet.write_table(table, folder / f"train-{number:05}.parquet", row_group_size=8)
        else:
            lines = "".join(json.dumps({"id": 1, column: text}) + "\n" for text in part).encode()
            (folder / f"train-{number:05}.jsonl.gz").write_bytes(gzip.compress(lines))
    return folder, texts


def read(source: str, chunk_bytes: int = 4 << 20, **options: Any) -> list[tuple[int, str]]:
    reading, skipped = ReadOptions(**options), Counter[str]()
    chunks = cut_into_chunks(find_files([source]), reading, chunk_bytes)
    return [entry for chunk in chunks for entry in chunk.read(reading, skipped)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_all_documents_come_in_order_however_they_are_cut_and_wherever_reading_begins(
    kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    folder, texts = write_dataset(tmp_path / "set", kind)
    source, reading = f"hf:{folder}", ReadOptions()
    assert read(source) == read(source, 100) == list(enumerate(texts))
    files = find_files([source])
    assert len(files) == 3
    chunks = list(cut_into_chunks(files, reading, 300))
    outlines = list(survey(files, reading, 1, 300))
    assert [(o.start, o.source_bytes) for o in outlines] == [(c.start, c.source_bytes) for c in chunks]
    for number in (1, len(chunks) // 2, len(chunks) - 1):
        assert list(cut_into_chunks(files, reading, 300, start=chunks[number].start)) == chunks[number:]


def test_an_empty_parquet_file_among_others_gives_nothing(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder, texts = write_dataset(tmp_path / "set", "parquet")
    empty = pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())})
    for number in (0, 2):  # the first of all, and one between others
        with parquet.ParquetWriter(folder / f"train-{number:05}-empty.parquet", empty.schema) as writer:
            writer.write_table(empty)
    files = find_files([f"hf:{folder}"])
    assert len(files) == 5 and read(f"hf:{folder}") == list(enumerate(texts))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_text_of_every_arrow_type_is_read_alike(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    texts = [None if number % 7 == 3 else f"one of {number % 5} é" for number in range(2500)]
    plain = pa.array(texts, pa.string())
    categories = [plain.dictionary_encode(), plain.cast(pa.large_binary()).dictionary_encode()]
    columns = [*map(plain.cast, (pa.string_view(), pa.binary_view(), pa.large_string())), *categories]
    for number, column in enumerate(columns):
        (folder := tmp_path / f"{number}").mkdir()
        table = pa.table({"text": column})
        if kind == "parquet":
            parquet.write_table(table, folder / "a.parquet", row_group_size=1500)
        else:
            with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        found = read(f"hf:{folder}")
        assert found == [(row, text) for row, text in enumerate(texts) if text], column.type
    (folder := tmp_path / "nothing").mkdir()
    parquet.write_table(pa.table({"text": pa.nulls(3)}), folder / "a.parquet")
    assert read(f"hf:{folder}") == read(str(folder)) == []


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_document_that_does_not_fit_into_memory_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("llmtrain.data.memory.LOOKED_AFTER", 100)
    texts = [*["short"] * 9, "x" * 999, "last"]
    if kind == "parquet":
        parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=8)
    else:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert read(f"hf:{tmp_path}") == list(enumerate(texts))
    monkeypatch.setattr("llmtrain.data.memory.free_host_memory", lambda: 5000)
    with pytest.raises(UserError, match=f"^hf:{tmp_path}#0: row 9: a document of 9.99e-07 GB or more does not fit"):
        read(f"hf:{tmp_path}")


def test_reading_of_parquet_begins_at_any_row_of_any_group(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    texts = [f"document {number}" for number in range(3500)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1500)
    files, reading = find_files([f"hf:{tmp_path}"]), ReadOptions()
    assert read(f"hf:{tmp_path}") == list(enumerate(texts))
    whole = list(cut_into_chunks(files, reading, 5000))
    assert len(whole) > 5 and any(chunk.start.place > 1000 and chunk.start.place % 1000 for chunk in whole)
    for chunk in whole:
        assert next(cut_into_chunks(files, reading, 5000, start=chunk.start)) == chunk


@pytest.mark.slow
def test_neither_workers_nor_parts_change_a_byte_and_a_changed_dataset_is_another(tmp_path: Path, call: Call) -> None:
    pytest.importorskip("datasets")
    folder, _ = write_dataset(tmp_path / "set", "parquet")
    options = Options((f"hf:{folder}",), tmp_path / "one", "bbpe", 300, shard_tokens=700, workers=1, dedup=True)
    prepare(options)
    prepare(replace(options, out=tmp_path / "two", workers=2))
    for number in (2, 3, 1):
        prepare_part(replace(options, out=tmp_path / "three", workers=1), number, 3, say=lambda line: None)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")
    parquet.write_table(pa.table({"text": ["other"]}), folder / "train-00001.parquet")
    hub._open.cache_clear()
    code, _, err = call(main, "--input", f"hf:{folder}", "--tokenizer", "byte", "--out", tmp_path / "one")
    assert code == 2 and is_one_clear_line(err) and "other input or options" in err


def test_what_cannot_be_read_is_one_clear_line(tmp_path: Path, call: Call) -> None:
    pytest.importorskip("datasets")
    folder, _ = write_dataset(tmp_path / "set", "parquet", column="body")
    scripted = tmp_path / "scripted"
    scripted.mkdir()
    (scripted / "scripted.py").write_text(f"open({str(tmp_path / 'EXPLODED')!r}, 'w')\n")
    names = ("numbers", "broken", "pictures", "wide", "twice")
    numbers, broken, pictures, wide, twice = (tmp_path / name for name in names)
    for made in (numbers, broken, pictures, wide, twice):
        made.mkdir()
    parquet.write_table(pa.table({f"key{number}": ["text"] for number in range(500)}), wide / "a.parquet")
    parquet.write_table(pa.table([["one"], ["two"]], names=["text", "text"]), twice / "a.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), numbers / "a.parquet")
    whole = (folder / "train-00000.parquet").read_bytes()
    (broken / "a.parquet").write_bytes(whole[: len(whole) // 2])
    shutil.copy(Path(__file__).parents[2] / "docs/curves.png", pictures / "a.png")
    cases = {
        f"hf:{folder}": "no column 'text' (it has: id, body; --text-field names another)",
        f"hf:{folder}:other": "cannot be opened (",
        f"hf:{folder}::val": "cannot be opened (",
        f"hf:{scripted}": "cannot be opened (",
        f"hf:{numbers}": "column 'text' holds int64, not text (it has: text; --text-field names another)",
        f"hf:{wide}": f"no column 'text' (it has: {', '.join(f'key{n}' for n in range(20))}, … and 480 more; --text-",
        f"hf:{twice}": "2 columns are called 'text' (it has: text, text); rename all but one, or name another by --",
        f"hf:{broken}": "cannot be",
        f"hf:{pictures}": "a dataset of kind imagefolder; only these are read: parquet, json",
        "hf:": "names no dataset",
    }
    for source, message in cases.items():
        code, out, err = call(main, "--input", source, "--tokenizer", "byte", "--out", tmp_path / "out")
        assert code == 2 and out == "" and is_one_clear_line(err), (source, err)
        assert f"{source}: {message}" in err, (source, err)
    assert not (tmp_path / "EXPLODED").exists() and not list(tmp_path.glob("out*"))
    assert next(text for _, text in read(f"hf:{folder}", text_field="body")).startswith("document 0")


def test_a_name_that_the_hub_does_not_give_is_told_once_with_what_it_was_taken_for(
    tmp_path: Path, llmtrain: Command
) -> None:
    pytest.importorskip("datasets")
    done = llmtrain("prepare", "--input", "hf:some/set", "--out", "out")
    assert done.returncode == 2 and is_one_clear_line(done.stderr), done.stderr
    assert "; some/set is no folder here, so taken for a dataset of the hub" in done.stderr
    # Without a network its attempts take half a minute, a warning each.
    folder, _ = write_dataset(tmp_path / "set", "jsonl")
    logging.getLogger("huggingface_hub").setLevel(logging.NOTSET)
    find_files([f"hf:{folder}"])
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.ERROR)


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = call(main, "--input", "hf:some/name", "--out", tmp_path / "out")
    assert code == 2 and is_one_clear_line(err) and "hf:some/name: Hugging Face datasets need the package" in err


def test_a_folder_of_the_package_s_name_is_not_the_package(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` puts the folder that it is started in before all packages."""
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version("no such package" if name == "datasets" else name))
    code, _, err = call(main, "--input", "hf:other/name", "--out", tmp_path / "out")
    assert code == 2 and is_one_clear_line(err) and "hf:other/name: Hugging Face datasets need the package" in err


@pytest.mark.parametrize("named", ["{outside}/secret.jsonl", "../secret.jsonl", "https://example.invalid/x.jsonl"])
def test_a_card_that_names_files_elsewhere_opens_none(named: str, tmp_path: Path, call: Call) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "secret.jsonl").write_text('{"text": "of this machine"}\n')
    folder, _ = write_dataset(tmp_path / "set", "jsonl")
    name = named.format(outside=tmp_path)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {name}\n---\n"
    (folder / "README.md").write_text(card)
    code, _, err = call(main, "--input", f"hf:{folder}", "--tokenizer", "byte", "--out", tmp_path / "out")
    assert code == 2 and is_one_clear_line(err) and not (tmp_path / "out").exists()
    if not name.startswith("https"):  # there it may be the network that fails first
        assert "which is not a file of the dataset" in err


def test_files_of_the_hub_must_be_of_the_commit_that_was_found() -> None:
    own = f"hf://datasets/some/set@{'a' * 40}/"
    hub._refuse_files_elsewhere("hf:some/set", "some/set", {"train": [f"{own}x.parquet", f"zip://y.jsonl::{own}y.zip"]})
    for file in ("/etc/passwd", f"{own}../../../x", "https://example.invalid/x", f"{own}x.zip::/etc/passwd"):
        with pytest.raises(UserError, match="not a file of the dataset"):
            hub._refuse_files_elsewhere("hf:some/set", "some/set", {"train": [f"{own}x.parquet"], "test": [file]})


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_a_packed_file_that_was_cut_off_is_an_error(packed: str, tmp_path: Path) -> None:
    whole = b"".join(json.dumps({"text": f"document {number}" * 9}).encode() + b"\n" for number in range(2000))
    data = {"gz": gzip.compress, "zst": zstandard.compress}[packed](whole)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / f"train.jsonl.{packed}").write_bytes(data)
    assert len(read(f"hf:{folder}")) == 2000
    hub._open.cache_clear()
    (folder / f"train.jsonl.{packed}").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="ended before the end-of-stream marker"):
        read(f"hf:{folder}")
