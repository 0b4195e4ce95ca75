"""What is written is what is read: any documents, any shard size, any window; and damage is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data import reading
from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import MANIFEST, FileInfo, Manifest, TokenDataset, TokenizerInfo, verify_files
from llmtrain.errors import CorruptError, UserError

VOCAB = 100
documents_of_ids = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=20)


def write(folder: Path, documents: list[list[int]], shard_tokens: int, batch: int = 3, dtype: str = "uint16") -> Path:
    """A prepared folder with one split, documents appended a few at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, "train", dtype, shard_tokens)
    for start in range(0, len(documents), batch):
        part = documents[start : start + batch]
        lengths = np.array([len(document) for document in part], np.int64)
        writer.append(np.concatenate([np.array(document) for document in part]), lengths, int(lengths.sum()))
    tokenizer = TokenizerInfo(kind="none", vocab_size=VOCAB, sha256="0" * 64, files=())
    manifest = Manifest(dtype=dtype, tokenizer=tokenizer, splits={"train": writer.close()}, recipe={})
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


@settings(max_examples=60, deadline=None)
@given(documents=documents_of_ids, shard_tokens=st.integers(1, 30), batch=st.integers(1, 5), data=st.data())
def test_every_window_equals_the_plain_concatenation(documents, shard_tokens, batch, data, tmp_path_factory):
    dtype = data.draw(st.sampled_from(["uint16", "uint32"]))
    folder = write(tmp_path_factory.mktemp("shards"), documents, shard_tokens, batch, dtype)
    stream = TokenDataset(folder).split("train")
    plain = np.concatenate([np.array(document) for document in documents])
    assert len(stream) == len(plain)
    length = data.draw(st.integers(1, len(plain)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(plain) - length), max_size=10)), np.int64)
    rows = stream.gather(starts, length)
    assert rows.dtype == dtype
    assert rows.tolist() == [plain[start : start + length].tolist() for start in starts]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(documents=documents_of_ids, shard_tokens=st.integers(1, 30), batch=st.integers(1, 5))
def test_shards_are_full_but_the_last_and_ends_are_where_documents_end(
    documents, shard_tokens, batch, tmp_path_factory
):
    folder = write(tmp_path_factory.mktemp("shards"), documents, shard_tokens, batch)
    split = TokenDataset(folder).manifest.splits["train"]
    sizes = [shard.tokens for shard in split.shards]
    assert all(size == shard_tokens for size in sizes[:-1])
    assert 0 < sizes[-1] <= shard_tokens
    ends, start = [], 0
    for shard in split.shards:
        ends += (np.fromfile(folder / shard.ends.path, "<i8") + start).tolist()
        start += shard.tokens
    assert ends == np.cumsum([len(document) for document in documents]).tolist()
    assert split.documents == len(documents) == sum(shard.documents for shard in split.shards)
    assert verify_files(folder, TokenDataset(folder).manifest.files()) == []


@settings(max_examples=20, deadline=None)
@given(documents=documents_of_ids, data=st.data())
def test_how_documents_are_batched_does_not_change_a_byte(documents, data, tmp_path_factory):
    folders = [
        write(tmp_path_factory.mktemp("shards"), documents, shard_tokens=7, batch=data.draw(st.integers(1, 9)))
        for _ in range(2)
    ]
    one, other = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert one == other


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return write(tmp_path / "data", [[1, 2, 3], [4, 5], [6, 7, 8, 9]], shard_tokens=4)


def change_manifest(folder: Path, change, shard: int = 0) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content["splits"]["train"]["shards"][shard])
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("escape", ["../outside.bin", "/etc/hostname", "link.bin", "folder/inside.bin"])
def test_a_manifest_that_names_a_path_outside_its_folder_is_refused(prepared, escape):
    outside = prepared.parent / "outside.bin"
    outside.write_bytes(b"12345678")
    (prepared / "link.bin").symlink_to(outside)
    (prepared / "folder").symlink_to(prepared.parent)
    change_manifest(prepared, lambda shard: shard["ids"].update(path=escape))
    with pytest.raises(CorruptError, match=f"names '{escape}', which lies outside the folder"):
        TokenDataset(prepared)


def test_a_truncated_or_missing_shard_is_named(prepared):
    shard = prepared / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(CorruptError, match=r"train-00001.bin: has 6 bytes where the manifest says 8; truncated\?"):
        TokenDataset(prepared).split("train")
    shard.unlink()
    with pytest.raises(CorruptError, match=r"train-00001.bin: cannot be read"):
        TokenDataset(prepared).split("train")


@pytest.mark.parametrize(("shard_tokens", "number"), [(100, 0), (4, 1), (2, 2)])
@pytest.mark.parametrize("is_mapped", [True, False])
def test_a_shard_that_is_cut_off_or_goes_away_while_it_is_read_is_named(
    tmp_path, monkeypatch, shard_tokens, number, is_mapped
):
    """Of what is mapped, reading on would end the process by SIGBUS; of what is not, what is still there is read."""
    left = 2 if is_mapped else 0
    if not is_mapped:
        monkeypatch.setattr(reading, "MAPPED_BYTES", 0)
    folder = write(tmp_path / "data", [[1, 2, 3], [4, 5], [6, 7, 8, 9]], shard_tokens)
    shard = folder / f"train-{number:05d}.bin"
    stream = TokenDataset(folder).split("train")
    begin = np.array([0, 2])
    assert stream.gather(begin, 3).tolist() == [[1, 2, 3], [3, 4, 5]]
    with shard.open("r+b") as file:
        file.truncate(left)
    with pytest.raises(CorruptError, match=rf"{shard.name}: was cut off to {left} bytes while it was read"):
        stream.gather(begin, 3)
    shard.unlink()
    with pytest.raises(CorruptError, match=rf"{shard.name}: is gone while it is read \(No such file"):
        stream.gather(begin, 3)


def test_an_empty_shard_is_passed_over_and_one_that_was_emptied_is_named(tmp_path):
    whole = write(tmp_path / "whole", [[1, 2], [3, 4, 5], [6]], shard_tokens=4)
    stream = TokenDataset(whole).split("train")
    expected = stream.gather(np.array([0]), len(stream)).tolist()
    content = json.loads((whole / MANIFEST).read_text())
    shards = content["splits"]["train"]["shards"]
    for name in ("empty.bin", "empty.ends"):
        (whole / name).touch()
    nothing = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    empty = {
        "tokens": 0,
        "documents": 0,
        "ids": {"path": "empty.bin", **nothing},
        "ends": {"path": "empty.ends", **nothing},
    }
    content["splits"]["train"]["shards"] = [empty, shards[0], empty, *shards[1:], empty]
    (whole / MANIFEST).write_text(json.dumps(content))
    stream = TokenDataset(whole).split("train")
    assert stream.gather(np.array([0]), len(stream)).tolist() == expected
    (whole / "train-00000.bin").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"train-00000.bin: has 0 bytes where the manifest says 8; truncated\?"):
        TokenDataset(whole).split("train")


def test_a_shard_with_other_content_is_named_when_it_is_opened(prepared):
    ids = np.fromfile(prepared / "train-00001.bin", "<u2")
    ids[2] += 1
    ids.tofile(prepared / "train-00001.bin")
    with pytest.raises(CorruptError, match=r"train-00001.bin: was changed since it was prepared"):
        TokenDataset(prepared).split("train")
    change_manifest(prepared, lambda shard: shard.pop("sample_sha256"), 1)  # as before there was one
    assert len(TokenDataset(prepared).split("train"))


@pytest.mark.parametrize("what", ["tokens", "documents"])
def test_a_manifest_whose_counts_do_not_add_up_is_refused_when_it_is_opened(prepared, what):
    content = json.loads((prepared / MANIFEST).read_text())
    content["splits"]["train"][what] += 5
    (prepared / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptError, match=rf"manifest.json: a split counts \d+ {what}, its shards \d+; prepare"):
        TokenDataset(prepared).split("train")


def test_an_id_outside_the_vocabulary_is_named_with_its_shard_and_position(prepared):
    ids = np.fromfile(prepared / "train-00001.bin", "<u2")
    ids[2] = VOCAB
    ids.tofile(prepared / "train-00001.bin")
    change_manifest(prepared, lambda shard: shard.pop("sample_sha256"), 1)
    stream = TokenDataset(prepared).split("train")
    assert stream.gather(np.array([0]), 6).tolist() == [[1, 2, 3, 4, 5, 6]]
    with pytest.raises(CorruptError, match=r"train-00001.bin: token id 100 at position 2 .*vocabulary of 100"):
        stream.gather(np.array([0, 3]), 5)


def test_changed_content_of_the_right_size_is_found_by_its_hash(prepared):
    ids = np.fromfile(prepared / "train-00000.bin", "<u2")
    ids[0] += 1
    ids.tofile(prepared / "train-00000.bin")
    (problem,) = verify_files(prepared, TokenDataset(prepared).manifest.files())
    assert "train-00000.bin: content differs" in problem


def test_a_folder_without_manifest_or_with_a_broken_one_is_refused(prepared):
    with pytest.raises(UserError, match="no split 'val'; it has train"):
        TokenDataset(prepared).split("val")
    change_manifest(prepared, lambda shard: shard.update(tokens=-1))
    with pytest.raises(CorruptError, match=r"splits.train.shards.0.tokens: .*prepare the data again"):
        TokenDataset(prepared)
    (prepared / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"not prepared data .no manifest.json in it"):
        TokenDataset(prepared)
    with pytest.raises(UserError, match="no such folder"):
        TokenDataset(prepared / "nowhere")


def test_the_fingerprint_follows_the_tokens_and_not_the_recipe(tmp_path):
    one = TokenDataset(write(tmp_path / "a", [[1, 2], [3]], 10)).manifest
    same = one.model_copy(update={"recipe": {"other": True}})
    other = TokenDataset(write(tmp_path / "b", [[1, 2], [4]], 10)).manifest
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_file_info_refuses_what_is_no_hash():
    with pytest.raises(ValueError, match="sha256"):
        FileInfo(path="x", bytes=1, sha256="../x")
