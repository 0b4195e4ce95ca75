"""One pass over the ids counts, measures and recognises documents as looking at each of them does."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data import outside, scan
from llmtrain.data.scan import Scan, found_in, repeats, scan_split
from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import Manifest, TokenDataset, TokenizerInfo
from llmtrain.errors import CorruptError

VOCAB = 7
DOCUMENT = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
DOCUMENTS = st.lists(st.one_of(DOCUMENT, st.sampled_from([[1], [1, 2, 3], [0] * 8])), max_size=40)


def written(folder: Path, documents: list[list[int]], dtype: str = "uint16", shard_tokens: int = 10) -> Manifest:
    writer = ShardWriter(folder, "train", dtype, shard_tokens)
    lengths = np.array([len(document) for document in documents], np.int64)
    writer.append(np.array([token for document in documents for token in document], dtype), lengths, 1)
    tokenizer = TokenizerInfo(kind="none", vocab_size=VOCAB, sha256="", files=())
    return Manifest(dtype=dtype, tokenizer=tokenizer, splits={"train": writer.close()}, recipe={})


def scanned(documents: list[list[int]], dtype: str = "uint16", shard_tokens: int = 10, block_bytes: int = 12) -> Scan:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "BLOCK_BYTES", block_bytes)
        manifest = written(Path(folder), documents, dtype, shard_tokens)
        read: list[int] = []
        result = scan_split(Path(folder), manifest, "train", read.append)
        assert sum(read) == sum(map(len, documents)) * np.dtype(dtype).itemsize
        return result


@given(
    documents=DOCUMENTS,
    dtype=st.sampled_from(["uint16", "uint32"]),
    shard_tokens=st.integers(1, 60),
    block_bytes=st.integers(1, 12).map(lambda n: 4 * n),
)
def test_a_scan_is_what_looking_at_each_document_gives(
    documents: list[list[int]], dtype: str, shard_tokens: int, block_bytes: int
) -> None:
    result = scanned(documents, dtype, shard_tokens, block_bytes)
    assert result.counts.tolist() == [sum(document.count(token) for document in documents) for token in range(VOCAB)]
    assert result.lengths.tolist() == [len(document) for document in documents]
    same = {(a, b): documents[a] == documents[b] for a in range(len(documents)) for b in range(a)}
    assert {pair: bool(result.hashes[pair[0]] == result.hashes[pair[1]]) for pair in same} == same


@given(documents=DOCUMENTS)
def test_where_files_and_blocks_end_changes_no_hash(documents: list[list[int]]) -> None:
    assert scanned(documents, shard_tokens=3, block_bytes=4).hashes.tolist() == scanned(documents).hashes.tolist()


HASHES = st.lists(st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63, 2**64 - 1])), max_size=60)


@settings(max_examples=200)
@given(hashes=HASHES, bits=st.integers(0, 4))
def test_repeats_are_those_of_a_counter_however_few_are_sorted_at_once(hashes: list[int], bits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "AT_ONCE_BITS", bits)
        found = repeats(np.array(hashes, np.uint64))
    expected = {hashes.index(value): times for value, times in Counter(hashes).items() if times > 1}
    assert dict(zip(found.documents.tolist(), found.times.tolist(), strict=True)) == expected
    order = [(-times, document) for document, times in zip(found.documents, found.times, strict=True)]
    assert all(a < b for a, b in pairwise(order))


@given(few=HASHES, many=HASHES, bits=st.integers(0, 4))
def test_what_is_found_elsewhere_is_counted_with_its_repetitions(few: list[int], many: list[int], bits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "AT_ONCE_BITS", bits)
        count = found_in(np.array(few, np.uint64), np.array(many, np.uint64))
    assert count == sum(value in many for value in few)


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    manifest = written(tmp_path, [[1, 2], [3] * 9, [4]], "uint32")
    path = tmp_path / "train-00001.bin"
    ids = np.fromfile(path, "<u4")
    ids[1] = 2**32 - 1  # which a count of all values up to it would have no memory for
    ids.tofile(path)
    with pytest.raises(CorruptError, match=r"train-00001.bin: token id 4294967295 at position 1 is outside the voc"):
        scan_split(tmp_path, manifest, "train", lambda _bytes: None)


def test_ends_that_do_not_rise_are_refused(tmp_path: Path) -> None:
    manifest = written(tmp_path, [[1, 2], [3] * 4])
    np.array([5, 2], "<i8").tofile(tmp_path / "train-00000.ends")
    with pytest.raises(CorruptError, match=r"train-00000.ends: not the rising ends of 2 documents"):
        scan_split(tmp_path, manifest, "train", lambda _bytes: None)


def test_ids_of_two_widths_are_the_same_documents(tmp_path: Path) -> None:
    """Token files in place may be mixed: what is stored narrow is widened before it is compared."""
    from llmtrain.prepare import main as prepare

    ids = np.arange(1, VOCAB)
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, len(ids)
    (tmp_path / "b.bin").write_bytes(header.tobytes() + ids.astype("<u4").tobytes())
    inputs = [word for name in "ab" for word in ("--input", str(tmp_path / f"{name}.bin"))]
    prepare([*inputs, "--vocab-size", str(VOCAB), "--val-split", "0", "--out", str(tmp_path / "out")])
    manifest = TokenDataset(tmp_path / "out").manifest
    assert repeats(scan_split(tmp_path / "out", manifest, "train", lambda _bytes: None).hashes).times.tolist() == [2]
