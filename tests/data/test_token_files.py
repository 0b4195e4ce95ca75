"""Existing token files are used where they lie: every format comes back as it is, and damage is one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.fetch import local_data, upload_data
from llmtrain.data.outside import BLOCK_BYTES
from llmtrain.data.shards import MANIFEST, TokenDataset
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import CorruptError, UserError
from llmtrain.evaluate import main as evaluate
from llmtrain.generate import main as generate
from llmtrain.prepare import main as prepare
from llmtrain.storage.remote import Remote
from llmtrain.train import main as train
from llmtrain.verify import main as verify
from tests.conftest import Call, is_one_clear_line, small_config

VOCAB = 1000


def ids_of(count: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, vocab, count)


def raw(path: Path, ids: Sequence[int] | np.ndarray, dtype: str = "<u2") -> Path:
    """As nanoGPT writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(ids).astype(dtype).tofile(path)
    return path


def llmc(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """As llm.c's `write_datafile` writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + ids.astype("<u4" if magic == 20240801 else "<u2").tobytes())
    return path


def megatron(path: Path, documents: list[list[list[int]]], code: int = 8, **changes: Any) -> Path:
    """As Megatron-LM's `IndexedDatasetBuilder` writes it: documents of sequences; `changes` do damage."""
    dtype = np.dtype({8: "<u2", 4: "<i4", 5: "<i8"}[code])
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = np.concatenate(([0], np.cumsum(lengths[:-1], dtype=np.int64) * dtype.itemsize)).astype("<i8")
    marks = np.cumsum([0, *map(len, documents)]).astype("<i8")
    values = {"magic": b"MMIDIDX\0\0", "version": 1, "lengths": lengths, "pointers": pointers, "marks": marks}
    values |= {name: change(values[name]) if callable(change) else change for name, change in changes.items()}
    head = struct.pack("<9sQBQQ", values["magic"], values["version"], code, len(lengths), len(marks))
    path.parent.mkdir(parents=True, exist_ok=True)
    body = b"".join(values[name].tobytes() for name in ("lengths", "pointers", "marks"))
    path.with_suffix(".idx").write_bytes(head + body)
    path.write_bytes(np.concatenate([np.array(s, dtype) for s in sequences]).tobytes())
    return path


def stream(folder: Path, split: str = "train") -> list[int]:
    tokens = TokenDataset(folder).split(split)
    return tokens.gather(np.array([0]), len(tokens))[0].tolist()


def ends(folder: Path, split: str = "train") -> list[list[int]]:
    shards = TokenDataset(folder).manifest.splits[split].shards
    return [np.fromfile(folder / shard.ends.path, "<i8").tolist() for shard in shards]


def prepared(call: Call, *arguments: object) -> dict[str, Any]:
    code, out, err = call(prepare, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(call: Call, *arguments: object) -> str:
    code, out, err = call(prepare, *arguments)
    assert code == 2 and out == "" and is_one_clear_line(err), (code, out, err)
    return err


def test_a_nanogpt_folder_is_used_in_place_and_its_pickle_is_not_opened(tmp_path: Path, call: Call) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "EXPLODED",)

    ids, val = ids_of(50_000), ids_of(3_000, 1)
    source = raw(tmp_path / "owt/train.bin", ids).parent
    raw(source / "val.bin", val)
    (source / "meta.pkl").write_bytes(pickle.dumps(Bomb()))
    (source / "prepare.py").write_text("import os")
    out = tmp_path / "out"
    summary = prepared(call, "--input", source, "--vocab-size", VOCAB, "--out", out)
    assert summary["splits"]["val"] == {"tokens": 3000, "documents": 1, "text_bytes": 0, "bytes_per_token": None}
    assert stream(out) == ids.tolist() and stream(out, "val") == val.tolist()
    assert not (tmp_path / "EXPLODED").exists()
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 5_000, "nothing is copied"
    assert call(prepare, "--input", source, "--vocab-size", VOCAB, "--out", out)[1].startswith("already prepared")
    assert call(verify, out)[0] == 0
    train_shard = TokenDataset(out).manifest.splits["train"].shards[0]
    assert train_shard.ids.sha256 == hashlib.sha256((source / "train.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "uint16"), (20240801, 7, "uint32")])
def test_llmc_shards_are_one_stream_and_val_goes_by_its_name(
    magic: int, version: int, dtype: str, tmp_path: Path, call: Call
) -> None:
    vocab = 200_000 if dtype == "uint32" else VOCAB
    parts = [ids_of(5_000, seed, vocab) for seed in range(3)]
    for number, part in enumerate(parts[:2], 1):
        llmc(tmp_path / f"web/fineweb_train_{number:06}.bin", part, magic, version)
    llmc(tmp_path / "web/fineweb_val_000000.bin", parts[2], magic, version)
    for source in ("web", "web/*.bin"):
        out = tmp_path / f"out-{len(source)}"
        summary = prepared(call, "--input", tmp_path / source, "--vocab-size", vocab, "--out", out)
        assert summary["dtype"] == dtype
        assert stream(out) == np.concatenate(parts[:2]).tolist()
        assert stream(out, "val") == parts[2].tolist()
        assert call(verify, out)[0] == 0


@pytest.mark.parametrize("code", [8, 4])
def test_megatron_documents_are_kept_and_the_split_falls_between_two(code: int, tmp_path: Path, call: Call) -> None:
    documents = [[[d * 10 + s + 1] * (d + s + 1) for s in range(d % 3 + 1)] for d in range(40)]
    megatron(tmp_path / "books.v2_document.bin", documents, code)
    flat = [[token for sequence in document for token in sequence] for document in documents]
    for number, name in enumerate(("books.v2_document", "books.v2_document.bin", "books.v2_document.idx")):
        out = tmp_path / f"out{number}"
        summary = prepared(call, "--input", tmp_path / name, "--vocab-size", VOCAB, "--val-split", 0.1, "--out", out)
        assert stream(out) + stream(out, "val") == [*chain(*flat)]
        train_ends, val_ends = ends(out)[0], ends(out, "val")[0]
        cut = train_ends[-1]
        assert train_ends + [cut + end for end in val_ends] == np.cumsum([len(d) for d in flat]).tolist()
        assert 0.05 < summary["splits"]["val"]["tokens"] / len([*chain(*flat)]) < 0.15
        assert call(verify, out)[0] == 0


def test_of_a_folder_with_train_bin_nothing_else_is_trained_on(tmp_path: Path, call: Call) -> None:
    for seed, name in enumerate(("train", "val", "test", "zzz_test_2")):
        raw(tmp_path / f"owt/{name}.bin", ids_of(100, seed))
    for source in (tmp_path / "owt", tmp_path / "owt/*.bin"):
        out = tmp_path / f"out-{source.stem}".replace("*", "all")
        summary = prepared(call, "--input", source, "--max-files", 1, "--vocab-size", VOCAB, "--out", out)
        assert stream(out) == ids_of(100, 0).tolist() and stream(out, "val") == ids_of(100, 1).tolist()
        assert summary["used_in_place"] == [str(tmp_path / f"owt/{name}.bin") for name in ("train", "val")]
    old = raw(tmp_path / "owt/old.bin", ids_of(100))
    message = refused(call, "--input", tmp_path / "owt", "--vocab-size", VOCAB, "--out", tmp_path / "out")
    assert f"{old}: beside a train.bin" in message and "by --input" in message
    named = ("--input", old, "--input", tmp_path / "owt/test.bin")
    summary = prepared(call, *named, "--vocab-size", VOCAB, "--val-split", 0, "--out", tmp_path / "out")
    assert summary["used_in_place"] == [str(old), str(tmp_path / "owt/test.bin")]


@pytest.mark.parametrize("name", ["books.jsonl", "books.NDJSON.zst", "a.txt", "a.txt.gz", "part.parquet"])
def test_text_beside_token_files_in_a_folder_is_not_passed_over(name: str, tmp_path: Path, call: Call) -> None:
    megatron(tmp_path / "m/books_text_document.bin", [[[1, 2, 3]], [[4, 5]]])
    raw(tmp_path / "n/train.bin", ids_of(100))
    (tmp_path / "n/input.txt").write_text("what nanoGPT made train.bin of")
    flags = ("--vocab-size", VOCAB, "--val-split", 0, "--out", tmp_path / "out")
    for folder, file in ((tmp_path / "m", "books_text_document.bin"), (tmp_path / "n", "train.bin")):
        (folder / name).write_text('{"text": "a"}')
        message = refused(call, "--input", folder, *flags)
        assert f"{folder}: holds token ids ({file}) and text ({name}); name the files" in message
        (folder / name).unlink()
        (folder / "tokenizer.json").touch()
    assert (
        prepared(call, "--input", tmp_path / "m", "--input", tmp_path / "n", *flags)["splits"]["train"]["tokens"] == 105
    )


def test_a_file_is_for_training_or_for_validation_and_once(tmp_path: Path, call: Call) -> None:
    a, held = raw(tmp_path / "web/a.bin", ids_of(100)), raw(tmp_path / "web/heldout.bin", ids_of(50, 1))
    (tmp_path / "link.bin").symlink_to(held)
    (tmp_path / "hard.bin").hardlink_to(a)
    flags = ("--vocab-size", VOCAB, "--out", tmp_path / "out")
    for number, val in enumerate((held, tmp_path / "link.bin")):
        out = tmp_path / f"out{number}"
        prepared(call, "--input", tmp_path / "web/*.bin", "--val-input", val, "--vocab-size", VOCAB, "--out", out)
        assert stream(out) == ids_of(100).tolist() and stream(out, "val") == ids_of(50, 1).tolist()
    for twice in (
        ("--input", a, "--input", tmp_path / "web/../web/a.bin"),
        ("--input", a, "--input", tmp_path / "hard.bin"),
        ("--input", a, "--input", tmp_path / "web/*.bin"),
        ("--input", a, "--val-input", a),
        ("--input", a, "--val-input", held, "--val-input", tmp_path / "link.bin"),
    ):
        assert "comes twice in --input and --val-input" in refused(call, *twice, *flags)
    message = refused(call, "--input", tmp_path / "web/*.bin", "--val-input", tmp_path / "web/*.bin", *flags)
    assert "no token files for training" in message


@pytest.mark.parametrize("count", [8, 10_000])
def test_uint32_ids_are_not_taken_for_uint16(count: int, tmp_path: Path, call: Call) -> None:
    source = raw(tmp_path / "wide.bin", ids_of(count), "<u4")
    flags = ("--input", source, "--vocab-size", VOCAB, "--val-split", 0)
    assert "wide.bin: looks like uint32" in refused(call, *flags, "--out", tmp_path / "out")
    for dtype, ids in (("uint32", ids_of(count)), ("uint16", [half for one in ids_of(count) for half in (one, 0)])):
        prepared(call, *flags, "--token-dtype", dtype, "--out", tmp_path / dtype)
        assert stream(tmp_path / dtype) == list(ids)
    prepared(call, *flags[2:], "--input", raw(tmp_path / "few.bin", ids_of(7), "<u4"), "--out", tmp_path / "few")
    assert len(stream(tmp_path / "few")) == 14, "too few to tell"


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_file_called_val_that_is_named_is_for_training(suffix: str, tmp_path: Path, call: Call) -> None:
    megatron(tmp_path / "books_val_text_document.bin", [[[1, 2, 3]], [[4, 5]]])
    source = tmp_path / f"books_val_text_document{suffix}"
    summary = prepared(call, "--input", source, "--vocab-size", VOCAB, "--val-split", 0, "--out", tmp_path / "out")
    assert summary["splits"].keys() == {"train"} and stream(tmp_path / "out") == [1, 2, 3, 4, 5]


def test_documents_by_the_eos_id_and_a_tail_wherever_it_falls(tmp_path: Path, call: Call) -> None:
    documents = [[*ids_of(length, length, 900).tolist(), 999] for length in range(1, 60)]
    flat = [*chain(*documents)]
    source = raw(tmp_path / "tokens.bin", flat)
    flags = ("--input", source, "--vocab-size", VOCAB, "--eos-id", 999, "--val-split", 0.1)
    prepared(call, *flags, "--out", tmp_path / "by-document")
    train_ends, val_ends = ends(tmp_path / "by-document")[0], ends(tmp_path / "by-document", "val")[0]
    both = train_ends + [train_ends[-1] + end for end in val_ends]
    assert both == np.cumsum([len(document) for document in documents]).tolist()
    prepared(call, *flags, "--val-by", "tail", "--out", tmp_path / "by-tail")
    assert len(stream(tmp_path / "by-tail")) == int(len(flat) * 0.9)
    assert stream(tmp_path / "by-tail") + stream(tmp_path / "by-tail", "val") == flat
    one = raw(tmp_path / "one.bin", ids_of(100, 0, 900))
    message = refused(call, "--input", one, *flags[2:], "--val-by", "document", "--out", tmp_path / "none")
    assert "no place between two documents" in message
    assert not (tmp_path / "none").exists()


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    wide=st.lists(st.booleans(), min_size=5, max_size=5),
    data=st.data(),
)
def test_every_window_over_files_of_two_widths_is_that_of_the_plain_concatenation(
    sizes: list[int], wide: list[bool], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    parts = [ids_of(size, seed) for seed, size in enumerate(sizes)]
    inputs: list[str] = []
    for number, part in enumerate(parts):
        path = folder / f"{number}.bin"
        llmc(path, part, *((20240801, 7) if wide[number] else ()))
        inputs += ["--input", str(path)]
    prepare([*inputs, "--vocab-size", str(VOCAB), "--val-split", "0", "--out", str(folder / "out")])
    tokens = TokenDataset(folder / "out").split("train")
    plain = np.concatenate(parts)
    assert tokens.dtype == ("uint32" if any(wide[: len(parts)]) else "uint16")
    length = data.draw(st.integers(1, len(plain)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(plain) - length), max_size=10)), np.int64)
    assert tokens.gather(starts, length).tolist() == [plain[s : s + length].tolist() for s in starts]


def test_the_ids_of_a_tokenizer_file_come_back_as_text(tmp_path: Path, call: Call) -> None:
    texts = [f"Document {number}: of this and that.\n" for number in range(60)]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / f"texts/{number:02}.txt").write_text(text)
    flags = ("--input", tmp_path / "texts", "--vocab-size", 300, "--val-split", 0)
    prepared(call, *flags, "--out", tmp_path / "own")
    file = tmp_path / "own/tokenizer/tokenizer.json"
    tokens = (tmp_path / "own/train-00000.bin").rename(tmp_path / "tokens.bin")
    eos_id = load_tokenizer(file.parent).eos_id
    flags = ("--input", tokens, "--tokenizer", file, "--eos-id", eos_id, "--val-split", 0)
    assert prepared(call, *flags, "--out", tmp_path / "out")["vocab_size"] == 300
    ids, begins = stream(tmp_path / "out"), [0, *ends(tmp_path / "out")[0]]
    tokenizer = load_tokenizer(tmp_path / "out/tokenizer")
    assert [tokenizer.decode(ids[begin:end]) for begin, end in pairwise(begins)] == texts
    own, mine = (json.loads((tmp_path / name / MANIFEST).read_text())["splits"]["train"] for name in ("own", "out"))
    for what in ("ids", "ends"):
        assert own["shards"][0][what]["sha256"] == mine["shards"][0][what]["sha256"]


def test_ids_beyond_the_vocabulary_are_named_by_file_and_place(tmp_path: Path, call: Call) -> None:
    far = BLOCK_BYTES // 2 + 17  # in the second block that is read
    ids = ids_of(far + 10)
    ids[far] = VOCAB
    for source, byte in ((raw(tmp_path / "a.bin", ids), 2 * far), (llmc(tmp_path / "b.bin", ids), 1024 + 2 * far)):
        message = refused(call, "--input", source, "--vocab-size", VOCAB, "--out", tmp_path / "out")
        assert f"{source}: token id 1000 at position {far} (byte {byte}) is outside the vocabulary of 1000" in message
        assert not list(tmp_path.glob("out*"))


def wrong(name: str, how: Any) -> Any:
    return lambda folder: megatron(folder / "x.bin", [[[1, 2], [3]], [[4, 5, 6]]], **{name: how})


def cut_off(folder: Path, suffix: str) -> None:
    path = megatron(folder / "x.bin", [[[1, 2], [3]], [[4, 5, 6]]]).with_suffix(suffix)
    os.truncate(path, path.stat().st_size - 2)


BAD = {
    "magic": (wrong("magic", b"MMIDIDX\0\1"), "not the index of a Megatron dataset"),
    "version": (wrong("version", 2), "a Megatron index of version 2; only 1 is known"),
    "short index": (lambda f: cut_off(f, ".idx"), "its 3 sequences and 3 document marks take"),
    "shorter index": (lambda f: (wrong("version", 1)(f), os.truncate(f / "x.idx", 20)), "it ends after 20 bytes"),
    "pointer outside": (
        wrong("pointers", lambda p: p + np.array([0, 0, 900])),
        "sequence 2 begins at byte 906, outside of",
    ),
    "negative pointer": (
        wrong("pointers", lambda p: p - np.array([0, 0, 90])),
        "sequence 2 begins at byte -84, outside of",
    ),
    "descending": (wrong("pointers", lambda p: p - np.array([0, 2, 0])), "sequence 1 begins at byte 2, before the end"),
    "a gap": (wrong("pointers", lambda p: p + np.array([0, 2, 2])), "sequence 1 begins at byte 6, after a gap"),
    "negative length": (wrong("lengths", lambda n: n - np.array([0, 9, 0], "<i4")), "sequence 1 has the length -8"),
    "marks": (wrong("marks", lambda m: m[::-1].copy()), "its document marks do not ascend"),
    "marks end": (wrong("marks", lambda m: m // 2), "marks go from 0 to 1, not from 0 to its 3"),
    "short bin": (lambda f: cut_off(f, ".bin"), "sequences take 12 bytes, x.bin has 10"),
    "int64": (lambda f: megatron(f / "x.bin", [[[1]]], 5), "stored as int64; only uint16 and int32"),
    "llm.c version": (lambda f: llmc(f / "x.bin", ids_of(9), version=2), "a llm.c file (20240520) of version 2"),
    "llm.c count": (lambda f: llmc(f / "x.bin", ids_of(9), count=8), "its llm.c header counts 8 tokens, 9 are in it"),
    "llm.c header alone": (lambda f: llmc(f / "x.bin", ids_of(0)), "x.bin: holds no tokens"),
    "llm.c evaluation": (lambda f: llmc(f / "x.bin", ids_of(9), 20240522), "multiple-choice questions for llm.c"),
    "llm.c of another kind": (
        lambda f: llmc(f / "x.bin", ids_of(9), 20250101),
        "begins with the header of a llm.c file, but of kind 20250101; only 20240520 and 20240801 are known",
    ),
    "llm.c of another kind, wide": (
        lambda f: raw(f / "x.bin", [7, 7, 9, *[0] * 253, *ids_of(9)], "<i4"),
        "begins with the header of a llm.c file, but of kind 7",
    ),
    "odd": (lambda f: (f / "x.bin").write_bytes(b"\1\0\2"), "3 bytes are not a whole number of uint16 ids"),
    "empty": (lambda f: (f / "x.bin").touch(), "x.bin: the file is empty"),
    "link to itself": (lambda f: (f / "x.bin").symlink_to(f / "x.bin"), "x.bin: a link that leads in a circle"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_one_clear_line(case: str, tmp_path: Path, call: Call) -> None:
    damage, message = BAD[case]
    damage(tmp_path)
    assert message in refused(call, "--input", tmp_path / "x.bin", "--vocab-size", VOCAB, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_ids_that_only_resemble_a_header_are_ids(tmp_path: Path, call: Call) -> None:
    for number, words in enumerate(([7, 7, 10], [7, 7, 9, 1], [7, 7, 0])):
        follow = 0 if words[2] == 0 else 9
        path = raw(tmp_path / f"{number}.bin", [*words, *[0] * (256 - len(words)), *ids_of(follow)], "<u4")
        flags = ("--vocab-size", VOCAB, "--val-split", 0, "--token-dtype", "uint32", "--out", tmp_path / f"out{number}")
        assert prepared(call, "--input", path, *flags)["splits"]["train"]["tokens"] == 256 + follow


def test_a_megatron_file_without_its_index_is_not_taken_for_one_document(tmp_path: Path, call: Call) -> None:
    path = megatron(tmp_path / "m/books_text_document.bin", [[[1, 2, 3]], [[4, 5]]])
    path.with_suffix(".idx").unlink()
    flags = ("--vocab-size", VOCAB, "--val-split", 0, "--out", tmp_path / "out")
    for source in (path, tmp_path / "m/*.bin"):
        message = refused(call, "--input", source, *flags)
        assert f"{path}: called as Megatron calls its files, but there is no books_text_document.idx beside" in message
    assert prepared(call, "--input", path.rename(tmp_path / "raw.bin"), *flags)["splits"]["train"]["tokens"] == 5


@pytest.mark.parametrize("known", ["llm.c", "Megatron"])
def test_beside_token_files_of_a_known_format_no_other_is_passed_over(known: str, tmp_path: Path, call: Call) -> None:
    first = tmp_path / "web/a.bin"
    llmc(first, ids_of(9)) if known == "llm.c" else megatron(first, [[[1, 2, 3]]])
    (tmp_path / "web/a.txt").write_text("some text " * 100)
    flags = ("--input", tmp_path / "web", "--vocab-size", VOCAB, "--val-split", 0, "--out", tmp_path / "out")
    other = llmc(tmp_path / "web/b.bin", ids_of(9), 20250101)
    message = refused(call, *flags)
    assert f"{other}: neither a llm.c file nor one of Megatron (there is no b.idx), beside a.bin" in message
    other.write_bytes(b"")
    assert f"{other}: the file is empty, beside a.bin; make it again, or remove it" in refused(call, *flags)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "web_000001.bin"])
def test_a_link_that_leads_nowhere_is_not_passed_over(name: str, tmp_path: Path, call: Call) -> None:
    is_nanogpt = name in ("train.bin", "val.bin")
    for seed, file in enumerate(("train.bin", "val.bin") if is_nanogpt else ("web_000000.bin", name)):
        (raw if is_nanogpt else llmc)(tmp_path / "in" / file, ids_of(100, seed))
    link = tmp_path / "in" / name
    target = link.rename(tmp_path / "moved.bin")
    link.symlink_to(tmp_path / "gone.bin")
    flags = ("--input", tmp_path / "in", "--vocab-size", VOCAB, "--out")
    assert f"{link}: a link to {tmp_path / 'gone.bin'}, which is not there" in refused(call, *flags, tmp_path / "out")
    target.rename(tmp_path / "gone.bin")
    assert prepared(call, *flags, tmp_path / "out")["splits"].keys() == {"train", "val"}


def test_an_input_that_cannot_be_looked_at_is_one_clear_line(tmp_path: Path, call: Call) -> None:
    code, _, err = call(prepare, "--input", tmp_path / ("x" * 300), "--out", tmp_path / "out")
    assert code == 2 and is_one_clear_line(err) and "File name too long" in err


def test_options_that_do_not_fit_are_one_clear_line(tmp_path: Path, call: Call) -> None:
    (tmp_path / "book.txt").write_text("text " * 100)
    tokens, out = raw(tmp_path / "x.bin", ids_of(100)), ("--out", tmp_path / "out")
    given = ("--input", tokens, "--vocab-size", VOCAB, *out)
    assert "token ids belong to a tokenizer; name it" in refused(call, "--input", tokens, *out)
    assert "no char tokenizer can be fitted" in refused(call, "--input", tokens, "--tokenizer", "char", *out)
    assert "is read as uint16, which cannot hold a vocabulary of 128256; --token-dtype uint32?" in refused(
        call, "--input", tokens, "--vocab-size", 128_256, *out
    )
    assert "--eos-id 1000: outside the vocabulary" in refused(call, *given, "--eos-id", 1000)
    message = refused(call, *given, "--input", tmp_path / "book.txt")
    assert "x.bin: holds token ids, and" in message and "book.txt text; prepare them one after the other" in message
    for flags in (["--augment", "case"], ["--dedup"], ["--filter", "letters"], ["--language", "python"]):
        assert flags[0] in (message := refused(call, *given, *flags)) and "for text only" in message
    for flags in (["--seed", 1], ["--shard-tokens", 50]):
        assert f"{flags[0]}: for text only" in refused(call, *given, *flags)
    val = raw(tmp_path / "v.bin", ids_of(100, 1))
    for flags in (["--val-split", 0.1], ["--val-by", "tail"]):
        message = refused(call, *given, "--val-input", val, *flags)
        assert f"{flags[0]}: nothing is set aside, as {val} is for validation" in message
    assert "leave --part and --join out" in refused(call, *given, "--part", "1/2")
    assert "leave the URL out" in refused(call, *given[:4], "--out", f"file://{tmp_path}/store")
    assert "--eos-id: for token files (.bin) only" in refused(
        call, "--input", tmp_path / "book.txt", "--eos-id", 1, *out
    )
    assert "book.txt: not a token file" in refused(call, *given, "--val-input", tmp_path / "book.txt")
    megatron(tmp_path / "m.bin", [[[1]]]).unlink()
    assert "m.bin: cannot be read" in refused(call, "--input", tmp_path / "m.idx", *given[2:])
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert "circle: a link that leads in a circle" in refused(call, *given[:4], "--out", tmp_path / "circle")


@pytest.mark.slow
def test_train_generate_and_evaluate_on_files_in_place_and_one_line_when_they_are_gone_or_changed(
    tmp_path: Path, call: Call
) -> None:
    source, val = raw(tmp_path / "t.bin", ids_of(9_000)), raw(tmp_path / "v.bin", ids_of(2_000))
    flags = ("--input", source, "--val-input", val, "--vocab-size", VOCAB)
    prepared(call, *flags, "--out", tmp_path / "data")
    config = small_config(tmp_path / "data", tmp_path / "run")
    config["training"]["max_steps"] = 10
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert call(train, "--config", tmp_path / "config.yaml")[0] == 0
    code, out, _ = call(evaluate, tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["bits_per_byte"] is None
    code, out, err = call(generate, tmp_path / "run")
    assert code == 2 and out == "" and is_one_clear_line(err) and "no tokenizer is known" in err
    content = val.read_bytes()
    changes = {
        "was changed since it was prepared": lambda: val.write_bytes(b"\3\0" + content[2:]),
        "has 3998 bytes and had 4000 when": lambda: os.truncate(val, 3998),
        "is not there": val.unlink,
    }
    for message, change in changes.items():
        change()
        for verb, *arguments in ((train, "--config", tmp_path / "config.yaml"), (evaluate, tmp_path / "run")):
            code, _, err = call(verb, *arguments)
            assert code == 4 and is_one_clear_line(err) and f"{val}: {message}" in err, err
            assert f"{tmp_path / 'data' / MANIFEST} uses it in place" in err
        code, out, err = call(verify, tmp_path / "data")
        assert code == 4 and f"FAIL  {val}: {message}" in out and is_one_clear_line(err)


def test_a_change_between_the_samples_is_found_by_verify(tmp_path: Path, call: Call) -> None:
    source = raw(tmp_path / "t.bin", ids_of(100_000))
    prepared(call, "--input", source, "--vocab-size", VOCAB, "--out", tmp_path / "out")
    content = bytearray(source.read_bytes())
    content[20_000] ^= 1
    source.write_bytes(content)
    stream(tmp_path / "out")
    code, out, _ = call(verify, tmp_path / "out")
    assert code == 4 and f"{source}: was changed since it was prepared" in out


def test_a_manifest_names_no_file_outside_but_one_whose_content_it_knows_and_none_from_a_store(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    source, secret = raw(tmp_path / "t.bin", ids_of(3_000)), raw(tmp_path / "secret", ids_of(3_000, 1))
    prepared(call, "--input", source, "--vocab-size", VOCAB, "--out", tmp_path / "data")
    with pytest.raises(UserError, match="refers to token files of one machine"):
        upload_data(tmp_path / "data", Remote(f"file://{tmp_path}/store"))
    manifest = tmp_path / "data" / MANIFEST
    for place, message in ((str(secret), "was changed since"), ("../secret", "splits.train.shards.0.ids")):
        manifest.write_text(manifest.read_text().replace(str(source), place).replace(str(secret), place))
        with pytest.raises(CorruptError, match=message):
            TokenDataset(tmp_path / "data").split("train")
    (tmp_path / "data").rename(tmp_path / "store")
    (tmp_path / "store" / MANIFEST).write_text(
        (tmp_path / "store" / MANIFEST).read_text().replace("../secret", str(source))
    )
    with pytest.raises(UserError, match="refers to token files of one machine"):
        local_data(f"file://{tmp_path}/store")
    code, _, err = call(verify, f"file://{tmp_path}/store")
    assert code == 2 and is_one_clear_line(err)
