"""Documents come out of every kind of source, in a fixed order, and what is wrong with a source is named."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llmtrain.data.corpus import BEGINNING, Position, ReadOptions, cut_into_chunks
from llmtrain.data.files import find_files
from llmtrain.data.json_lines import parse_line
from llmtrain.data.memory import free_host_memory
from llmtrain.data.survey import survey
from llmtrain.errors import UserError


def read(*inputs: object, chunk_bytes: int = 4 << 20, max_files: int | None = None, **options: object) -> list[str]:
    return [text for _, text in numbered(*inputs, chunk_bytes=chunk_bytes, max_files=max_files, **options)[0]]


def numbered(*inputs, chunk_bytes=4 << 20, max_files=None, **options):
    reading, skipped = ReadOptions(**options), Counter()
    files = find_files([str(path) for path in inputs], max_files)
    found = [entry for chunk in cut_into_chunks(files, reading, chunk_bytes) for entry in chunk.read(reading, skipped)]
    return found, skipped


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, texts: list[str | None], column: str = "text", rows_per_group: int = 2) -> Path:
    parquet.write_table(
        pa.table({column: texts, "other": list(range(len(texts)))}), path, row_group_size=rows_per_group
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {"z.txt": "last", "b/x.md": "middle", "a.txt": "first", ".git/h": "hidden", ".i": "too"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_folder_is_read_recursively_in_sorted_order_without_hidden_files(folder):
    assert read(folder) == ["first", "middle", "last"]


def test_linked_folders_are_read_too_but_every_folder_once(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "e.txt").write_text("linked")
    (elsewhere / "back").symlink_to(folder)  # a circle
    (folder / "0link").symlink_to(elsewhere)
    (folder / "1same").symlink_to(elsewhere)
    (folder / "2own").symlink_to(folder / "b")
    assert [file.path for file in find_files([str(folder)])] == [
        folder / name for name in ("0link/e.txt", "a.txt", "b/x.md", "z.txt")
    ]
    assert read(folder) == ["linked", "first", "middle", "last"]


def test_a_glob_takes_each_file_once_by_its_shortest_path(folder):
    (folder / "b/up").symlink_to(folder)  # a circle
    (folder / "0same.txt").symlink_to(folder / "z.txt")
    for pattern, names in {
        "**/*.txt": ["0same.txt", "a.txt"],
        "**/*.md": ["b/x.md"],
        "b/**/*": ["b/up/0same.txt", "b/up/a.txt", "b/x.md"],
    }.items():
        assert [file.path for file in find_files([f"{folder}/{pattern}"])] == [folder / name for name in names]
    assert read(f"{folder}/**/*.txt") == ["last", "first"]


def test_glob_and_several_inputs_keep_the_order_of_the_inputs(folder):
    assert read(folder / "*.txt", folder / "b") == ["first", "last", "middle"]
    assert read(f"{folder}/**/*.md") == ["middle"]
    assert read(folder, max_files=2) == ["first", "middle"]


def test_text_is_kept_exactly_but_for_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff a\r\n\tb\u2028é\n".encode())
    assert read(tmp_path / "a.txt") == [" a\r\n\tb\u2028é\n"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk_bytes", [1, 50, 4 << 20])
def test_compressed_and_plain_files_give_the_same_documents(tmp_path, suffix, chunk_bytes):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack("one\ntwo é".encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack(jsonl(["three", "vier\n", "fünf"])))
    assert read(tmp_path, chunk_bytes=chunk_bytes) == ["one\ntwo é", "three", "vier\n", "fünf"]


@pytest.mark.parametrize("texts", [["one"], ["one", "two", "three"], ["one", "too"]])
def test_lines_of_a_file_that_was_changed_meanwhile_are_refused(tmp_path, texts):
    path, other = tmp_path / "a.jsonl", tmp_path / "b"
    path.write_bytes(jsonl(["one", "two"]))
    chunk = next(cut_into_chunks(find_files([str(path)]), ReadOptions()))
    other.write_bytes(jsonl(texts))
    other.replace(path)
    with pytest.raises(UserError, match=r"a\.jsonl: was changed while it was read"):
        list(chunk.read(ReadOptions(), Counter()))


def test_zst_of_several_frames_is_read_to_its_end(tmp_path):
    frames = [zstandard.ZstdCompressor().compress(jsonl([text])) for text in ("one", "two")]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path) == ["one", "two"]


def test_parquet_streams_the_text_column_by_row_group(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a", "b", None, "é", ""], column="body")
    found, skipped = numbered(path, text_field="body")
    assert found == [(0, "a"), (1, "b"), (3, "é")]
    assert skipped == {"empty documents": 2}
    with pytest.raises(UserError, match=r"no column 'text' .it has: body, other"):
        read(path)
    with pytest.raises(
        UserError, match=r"column 'other' holds int64, not text .it has: body, other; --text-field names"
    ):
        read(path, text_field="other")


def test_columns_of_one_name_are_refused_and_the_one_that_is_named_is_read_among_others_like_it(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"text": ["one"], "body": ["two"], "meta": [{"text": "no"}], "meta.text": ["three"]}
    table = pa.table([*columns.values(), ["again"]], names=[*columns, "text"])
    parquet.write_table(table, path)
    said = (
        r"2 columns are called 'text' .it has: text, body, meta, meta\.text, text.; rename all but one, or name another"
    )
    with pytest.raises(UserError, match=rf"a\.parquet: {said} by --text-field"):
        read(path)
    assert read(path, text_field="body") == ["two"]
    assert read(path, text_field="meta.text") == ["three"]


@pytest.mark.parametrize("chunk_bytes", [10, 4 << 20])
def test_text_of_every_arrow_type_is_read_alike(tmp_path, chunk_bytes):
    texts = [None if number % 7 == 3 else f"one of {number % 5} é" for number in range(5000)]
    plain = write_parquet(tmp_path / "plain.parquet", texts, rows_per_group=3000)
    kinds = [pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view(), pa.binary_view()]
    columns = [pa.array(texts, pa.string()).cast(kind) for kind in kinds]
    columns += [pa.array(texts, pa.string()).cast(kind).dictionary_encode() for kind in (pa.string(), *kinds[:2])]
    for number, column in enumerate(columns):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pa.table({"text": column}), path, row_group_size=3000)
        assert str(parquet.read_schema(path).field("text").type).split("<")[0] == str(column.type).split("<")[0]
        assert numbered(path, chunk_bytes=chunk_bytes) == numbered(plain, chunk_bytes=chunk_bytes)


def test_a_document_that_does_not_fit_into_memory_is_named_and_those_that_do_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("llmtrain.data.memory.LOOKED_AFTER", 100)
    long = "x" * 999
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(long.encode()))
    (tmp_path / "c.jsonl").write_bytes(jsonl(["short", long, "last"]))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(jsonl(["one", "two", long])))
    write_parquet(tmp_path / "e.parquet", ["one", long], rows_per_group=1)
    many = [*["short"] * 9, long, "last"]
    for name, column in {
        "f": pa.array(many),
        "g": pa.array(many).dictionary_encode(),
        "h": pa.array(many).cast(pa.string_view()),
    }.items():
        parquet.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
    found = [long, long, "short", long, "last", "one", "two", long, "one", long, *many * 3]
    assert read(tmp_path, chunk_bytes=30) == read(tmp_path) == found
    monkeypatch.setattr("llmtrain.data.memory.free_host_memory", lambda: 5000)
    for name, said in {
        "a.txt": "a.txt: a document of 9.99e-07 GB or more does not fit into memory .*--max-file-bytes",
        "b.txt.gz": "b.txt.gz: a document of",
        "c.jsonl": "c.jsonl: line 2: a document of",
        "d.jsonl.gz": "d.jsonl.gz: line 3: a document of",
        "e.parquet": "e.parquet: row 1: a document of",
        "f.parquet": "f.parquet: row 9: a document of 9.99e-07 GB",
        "g.parquet": "g.parquet: row 9: a document of 9.99e-07 GB",
        "h.parquet": "h.parquet: row 9: a document of 9.99e-07 GB",
    }.items():
        with pytest.raises(UserError, match=said):
            read(tmp_path / name, chunk_bytes=30)
    # Where rows are too long on average, none is even read.
    monkeypatch.setattr("llmtrain.data.memory.free_host_memory", lambda: 500)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(UserError, match=r"f\.parquet: one of the rows 0 to 10: a document of .* or more does not fit"):
        read(tmp_path / "f.parquet")


IN_LITTLE_MEMORY = """
import resource, sys
from collections import Counter
from pathlib import Path
from llmtrain.data.corpus import ReadOptions, cut_into_chunks
from llmtrain.data.files import find_files
def read(source):
    for chunk in cut_into_chunks(find_files([source]), ReadOptions()):
        for _ in chunk.read(ReadOptions(), Counter()):
            pass
read(sys.argv[1])
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (40 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
read(sys.argv[2])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is Linux")
@pytest.mark.parametrize("kind", ["text", "lines", "rows", "dataset"])
def test_memory_that_ends_while_an_input_is_read_is_one_clear_line(tmp_path, kind):
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, text in ((small, "x"), (large, "x" * (60 << 20))):
        folder.mkdir()
        if kind == "text":
            (folder / "a.txt.zst").write_bytes(zstandard.compress(text.encode()))
        elif kind == "lines":
            (folder / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl([text])))
        else:
            write_parquet(folder / "a.parquet", [text])
    if kind == "dataset":
        pytest.importorskip("datasets")
    sources = [f"{'hf:' if kind == 'dataset' else ''}{folder}" for folder in (small, large)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert re.search(r"UserError: .*large.*: to read it takes more memory than there is .*; split its", done.stderr)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_an_empty_file_among_others_gives_nothing(tmp_path, suffix):
    full, empty = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    if suffix == ".parquet":
        write_parquet(full, ["text"])
        parquet.write_table(pa.table({"text": pa.array([], pa.string())}), empty)
    else:
        full.write_bytes(jsonl(["text"]) if suffix == ".jsonl" else b"text")
        empty.touch()
    assert read(tmp_path) == ["text"]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=30), data=st.data())
def test_documents_and_ordinals_do_not_depend_on_where_chunks_are_cut(texts, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_bytes(jsonl(texts))
    write_parquet(folder / "b.parquet", [*texts, "x"])
    for i, text in enumerate(texts[:5]):
        (folder / f"c{i}.txt").write_bytes(text.replace("\0", "").encode())
    whole = numbered(folder)
    assert numbered(folder, chunk_bytes=data.draw(st.integers(1, 200))) == whole
    ordinals = [ordinal for ordinal, _ in whole[0]]
    assert ordinals == sorted(set(ordinals))
    assert [text for _, text in whole[0]][: len([t for t in texts if t])] == [t for t in texts if t]


@pytest.mark.slow
def test_stdlib_is_sorted_python_source_without_tests():
    files = find_files(["stdlib"])
    assert len(files) > 300
    assert [file.path for file in files] == sorted(file.path for file in files)
    assert not any({"test", "tests", "site-packages"} & set(file.path.parts) for file in files)
    assert any(file.path.name == "argparse.py" for file in files)
    reading = ReadOptions()
    assert sum(1 for chunk in cut_into_chunks(files[:50], reading) for _ in chunk.read(reading, Counter())) > 40


def test_binary_files_in_a_folder_are_skipped_and_counted_but_refused_by_name(folder):
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\0\0")
    found, skipped = numbered(folder)
    assert len(found) == 3
    assert skipped == {"binary files": 1}
    with pytest.raises(UserError, match=r"image.png: a binary file .NUL byte at offset 6."):
        read(folder / "image.png")


def test_text_that_is_not_utf8_is_named_with_its_offset_or_skipped_on_request(folder):
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt: not UTF-8 .byte 0xef at offset 2.*--skip-bad"):
        read(folder)
    found, skipped = numbered(folder, skip_bad=True)
    assert len(found) == 3
    assert skipped == {"bad files": 1}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "x"', "not JSON .Expecting ',' delimiter at character 14 of the line"),
        (b"[1]", "not a JSON object"),
        (b'{"body": "x"}', "no field 'text' .it has: body"),
        (b'{"text": 7}', "field 'text' is no text .it has: text; --text-field names another"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (rb'{"text": "ab\ud800"}', "half of a surrogate pair at character 2"),
        (b"[" * 100_000, "not JSON"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 4 << 20])
def test_a_broken_jsonl_line_is_named_with_its_number_or_counted(tmp_path, line, problem, chunk_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["one"]) + b"\n" + line + b"\n" + jsonl(["four"]).rstrip())
    with pytest.raises(UserError, match=f"a.jsonl: line 3: {problem}"):
        read(path, chunk_bytes=chunk_bytes)
    found, skipped = numbered(path, chunk_bytes=chunk_bytes, skip_bad=True)
    assert found == [(0, "one"), (3, "four")]
    assert skipped == {"bad lines": 1}


def test_of_a_record_with_very_many_names_some_are_told(tmp_path):
    record = {f"key {number} " + "x" * (200 if number < 2 else 0): "text" for number in range(100_000)}
    path, parquet_path = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    path.write_text(json.dumps(record))
    names = list(record)[:3000]
    parquet.write_table(pa.table({name: ["text"] for name in names}), parquet_path)
    struct = pa.struct([pa.field(name, pa.string()) for name in names])
    parquet.write_table(pa.table({"text": pa.array([{names[0]: "text"}], struct)}), tmp_path / "b.parquet")
    for file, more in ((path, "and 99,980 more"), (parquet_path, "and 2,980 more")):
        with pytest.raises(UserError, match=f"it has: key 0 x{{73}}…, key 1 .*, key 19 , … {more}; --text") as error:
            read(file)
        assert len(str(error.value)) < 1000
    with pytest.raises(
        UserError, match=r"column 'text' holds struct<key 0 x+…, not text .it has: text; --text-field names"
    ) as error:
        read(tmp_path / "b.parquet")
    assert len(str(error.value)) < 500


JSON_TEXT = st.text(st.sampled_from('ab"\\\n\x01\x7f\u2028é😀\ufeff'), max_size=6)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | JSON_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXT, inner, max_size=3),
    max_leaves=5,
)
JSON_PIECES = st.sampled_from([
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"text", b"\\u0061", b"\\ud83d\\ude00", b"\\ud800", b"\\x", b" ", b"\t",
    b"01", b"-", b"1.", b"1e999", b"NaN", b"-Infinity", b"9" * 30, b"\xef\xbb\xbf", b"\xff", b"\xc3\xa9", b"\x00",
    b"true",
])  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(JSON_TEXT | st.just("text"), JSON_VALUES, max_size=3),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 60), JSON_PIECES), max_size=2),
)
def test_a_line_has_the_text_that_json_of_python_gives_it(record, is_ascii, spoiled):
    line = json.dumps(record, ensure_ascii=is_ascii).encode()
    for at, piece in spoiled:
        line = line[:at] + piece + line[at:]
    try:
        expected = json.loads(line.decode())["text"]
        expected.encode()
    except Exception:
        expected = None
    try:
        found = parse_line(line, "text")
    except ValueError:
        found = None
    assert found == expected


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("missing.txt", "no such file or folder"),
        ("missing/*.txt", "matches no file"),
        ("empty_folder", "a folder without files"),
        ("empty.txt", "the file is empty"),
        ("cut.jsonl.gz", "damaged or truncated .gz file"),
        ("none.txt.zst", "damaged or truncated .zst file .*Unknown frame"),
        ("fake.parquet", "not a Parquet file"),
    ],
)
def test_an_input_that_gives_nothing_is_refused_with_the_reason(tmp_path, monkeypatch, source, problem):
    monkeypatch.chdir(tmp_path)
    Path("empty_folder").mkdir()
    Path("empty.txt").touch()
    Path("cut.jsonl.gz").write_bytes(gzip.compress(jsonl(["x" * 1000]))[:-12])
    Path("none.txt.zst").write_bytes(b"no frame at all")
    Path("fake.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=problem):
        read(source)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Text in runs of files, JSONL plain and compressed (one empty, one without a last newline), groups of rows."""
    lines = b"".join(json.dumps({"text": f"line {i} " + "x" * (i % 50)}).encode() + b"\n" for i in range(200))
    for name in ("a1.txt", "a2.txt", "a3.txt", "c.txt", "h.txt"):
        (tmp_path / name).write_text(f"text of {name} " * 9)
    (tmp_path / "b.jsonl").write_bytes(lines)
    (tmp_path / "d.jsonl").write_bytes(b"")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines) + gzip.compress(lines[:-1]))
    (tmp_path / "f.jsonl.zst").write_bytes(zstandard.compress(lines))
    write_parquet(tmp_path / "g.parquet", [f"row {i}" for i in range(95)], rows_per_group=10)
    write_parquet(tmp_path / "i.parquet", [f"row {i} " * 10 for i in range(95)], rows_per_group=40)
    return tmp_path


@pytest.mark.parametrize("chunk_bytes", [1, 300, 2000, 1 << 20])
def test_cutting_goes_on_from_any_chunk_as_if_it_had_never_stopped(mixed, chunk_bytes):
    files, reading = find_files([str(mixed)]), ReadOptions()

    def cut(start: Position) -> list[tuple[Position, list[tuple[int, str]]]]:
        chunks = cut_into_chunks(files, reading, chunk_bytes, start=start)
        return [(chunk.start, list(chunk.read(reading, Counter()))) for chunk in chunks]

    whole = cut(BEGINNING)
    ordinals = [ordinal for _, documents in whole for ordinal, _ in documents]
    assert ordinals == list(range(5 + 4 * 200 + 2 * 95))
    in_a_group = [start for start, _ in whole if start.file == len(files) - 1 and start.record % 40]
    assert bool(in_a_group) == (chunk_bytes <= 300)
    for start in in_a_group[:: len(in_a_group) // 10 + 1]:
        assert cut(start) == [chunk for chunk in whole if chunk[0].ordinal >= start.ordinal]
    for index in range(0, len(whole), max(1, len(whole) // 40)):
        assert cut(whole[index][0]) == whole[index:]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_survey_tells_where_every_chunk_begins(mixed, workers):
    (mixed / "j.jsonl").write_bytes(b'{"text": "a line of a file of several chunks"}\n' * 250_000)
    files, reading = find_files([str(mixed)]), ReadOptions()
    chunks = list(cut_into_chunks(files, reading))
    assert sum(chunk.start.file == len(files) - 1 for chunk in chunks) == 3
    outlines = list(survey(files, reading, workers))
    assert [(o.start, o.source_bytes) for o in outlines] == [(c.start, c.source_bytes) for c in chunks]


def test_pages_of_files_are_free_memory_in_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr("llmtrain.data.memory._CGROUP", tmp_path)
    for name, text in {
        "memory.max": "32000\n", "memory.current": "31900\n",
        "memory.stat": "anon 900\nfile 31000\ninactive_file 20000\nactive_file 9000\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    assert free_host_memory() == 32000 - 31900 + 20000 + 9000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_memory() > 32000
