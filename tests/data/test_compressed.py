"""What is compressed is read to its own end, or refused: a file that was cut off is never taken for a shorter text."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.compressed import open_bytes
from llmtrain.data.corpus import ReadOptions, cut_into_chunks
from llmtrain.data.files import find_files
from llmtrain.errors import UserError

LINE = b'{"text": "%064d"}\n'
PER_BLOCK = (128 << 10) // len(LINE % 0)


def documents(path: Path, skip_bad: bool = False) -> tuple[list[str], Counter[str]]:
    reading, skipped = ReadOptions(skip_bad=skip_bad), Counter[str]()
    chunks = cut_into_chunks(find_files([str(path)]), reading)
    return [text for chunk in chunks for _, text in chunk.read(reading, skipped)], skipped


def in_blocks(count: int) -> tuple[bytes, list[int]]:
    """A frame of so many blocks of whole lines, and where each ends."""
    packer, data, ends = zstandard.ZstdCompressor(write_checksum=True).compressobj(), b"", list[int]()
    for block in range(count):
        data += packer.compress(b"".join(LINE % (block * PER_BLOCK + number) for number in range(PER_BLOCK)))
        data += packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        ends.append(len(data))
    return data + packer.flush(), ends


def unpacked(path: Path) -> bytes:
    with open_bytes(path, path.suffix) as (stream, _):
        return stream.read()


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_zst_that_ends_behind_a_line_but_within_a_frame_is_refused(tmp_path: Path, skip_bad: bool) -> None:
    path, (whole, ends) = tmp_path / "a.jsonl.zst", in_blocks(20)
    path.write_bytes(whole)
    assert len(documents(path)[0]) == 20 * PER_BLOCK
    for end in (*ends, len(whole) - 1, len(whole) - 4):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"a\.jsonl\.zst: damaged or truncated \.zst file .*leave it out"):
            documents(path, skip_bad)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_cut_off_file_is_refused_wherever_the_cut_is_even_where_bad_ones_are_skipped(
    tmp_path: Path, kind: str, suffix: str, skip_bad: bool
) -> None:
    lots = random.Random(0)
    text = b"".join(LINE % lots.getrandbits(200) for _ in range(20_000))
    path, whole = tmp_path / f"a.{kind}{suffix}", {".gz": gzip.compress, ".zst": zstandard.compress}[suffix](text)
    places = {len(whole) * tenth // 10 for tenth in range(1, 10)} | set(range(len(whole) - 9, len(whole)))
    for place in sorted({1, 3, 4, 5, 9, 17, 18, 19} | places):
        path.write_bytes(whole[:place])
        with pytest.raises(UserError, match=rf"a\.{kind}\{suffix}: damaged or truncated \{suffix} file"):
            documents(path, skip_bad)
    path.write_bytes(whole)
    assert documents(path, skip_bad)[1] == Counter()


@pytest.mark.parametrize("garbage", [b"x", b"junk that is no frame", b"\0" * 40])
def test_what_follows_the_last_frame_of_a_zst_and_is_none_is_refused(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"text") * 2 + garbage)
    with pytest.raises(UserError, match=r"a\.txt\.zst: damaged or truncated"):
        documents(path)


def frame(text: bytes, checksum: bool, size: bool) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=size).compress(text)


def in_pieces(text: bytes) -> bytes:
    """As a pipe is compressed: its size is not in the header."""
    packer = zstandard.ZstdCompressor().compressobj()
    return (
        packer.compress(text[: len(text) // 2])
        + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        + packer.compress(text[len(text) // 2 :])
        + packer.flush()
    )


def skippable(content: bytes, kind: int = 0) -> bytes:
    return (0x184D2A50 + kind).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content


TEXTS = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda seed, size: random.Random(seed).randbytes(size), st.integers(0, 9), st.integers(0, 300_000)),
    st.builds(lambda size: b"a" * size, st.integers(0, 600_000)),
    st.builds(lambda size: b"some words, " * size, st.integers(0, 60_000)),
)
FRAMES = st.one_of(
    st.builds(frame, TEXTS, st.booleans(), st.booleans()),
    st.builds(in_pieces, TEXTS),
    st.builds(skippable, st.binary(max_size=30) | st.builds(bytes, st.integers(0, 200_000)), st.integers(0, 15)),
    st.builds(lambda count: frame(b"ab", True, True) * count, st.integers(1, 12_000)),
)


def told_by_the_library(data: bytes) -> bytes | None:
    """The text of some frames, one after the other; None where the last one is cut off."""
    parts, decoder = list[bytes](), zstandard.ZstdDecompressor()
    while data:
        one = decoder.decompressobj()
        parts.append(one.decompress(data))
        if not one.eof:
            return None
        data = one.unused_data
    return b"".join(parts)


@settings(max_examples=60, deadline=None)
@given(frames=st.lists(FRAMES, min_size=1, max_size=4), data=st.data())
def test_a_zst_is_whole_where_the_library_says_so_of_each_of_its_frames(frames, data, tmp_path_factory):
    path, whole = tmp_path_factory.mktemp("zst") / "a.zst", b"".join(frames)
    for end in (len(whole), len(whole) - 1, data.draw(st.integers(1, len(whole)))):
        path.write_bytes(whole[:end])
        if (text := told_by_the_library(whole[:end])) is None:
            with pytest.raises(UserError, match=r"a\.zst: damaged or truncated"):
                unpacked(path)
        else:
            assert unpacked(path) == text


def of_window(window_log: int, text: bytes) -> bytes:
    """A frame whose one block is not compressed, but for which so much text would have to be kept."""
    return b"\x28\xb5\x2f\xfd" + bytes([0, window_log - 10 << 3]) + (len(text) << 3 | 1).to_bytes(3, "little") + text


def test_a_zst_of_a_long_window_is_read_where_there_is_memory_for_it_else_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.txt.zst"
    for window_log in (27, 28, 31):
        path.write_bytes(frame(b"usual, ", True, True) + of_window(window_log, b"long"))
        assert documents(path)[0] == ["usual, long"]
    monkeypatch.setattr("llmtrain.data.compressed.free_host_memory", lambda: 1 << 30)
    said = r"long\.txt\.zst: its window is of 2\.15 GB .zstd --long., .*memory .1\.07 GB are free.; pack it again"
    with pytest.raises(UserError, match=said):
        documents(path)
    path.write_bytes(of_window(28, b"long"))
    assert documents(path)[0] == ["long"]
