"""Tensor files: whatever their sizes, the bytes and hashes are right, and a disk that takes no more is an error."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint import direct_io, tensor_files
from llmtrain.checkpoint.tensor_files import write_files
from llmtrain.engine import Fragment


def fragments(sizes: list[int]) -> list[Fragment]:
    generator = torch.Generator().manual_seed(0)
    return [
        Fragment(f"model/{index}", (size,), 0, torch.randn(size, generator=generator))
        for index, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("piece_bytes", [4096, 8192, 1000])  # the kernel refuses 1000 bytes past its cache
@pytest.mark.parametrize("file_bytes", [1, 9000, 1 << 20])
def test_what_is_written_in_any_pieces_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, file_bytes: int
) -> None:
    monkeypatch.setattr(direct_io, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(tensor_files, "FILE_BYTES", file_bytes)
    saved = fragments([1, 3000, 0, 1024, 7, 5000, 2])
    written = write_files(tmp_path, "rank00000", iter(saved))
    assert len(written) == {1: 6, 9000: 3, 1 << 20: 1}[file_bytes]  # the empty one needs no file of its own
    assert [fragment.name for _, part in written for fragment in part] == [fragment.name for fragment in saved]
    for info, part in written:
        path = tmp_path / info.path
        assert (info.bytes, info.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        loaded = load_file(path)
        assert loaded.keys() == {f"{fragment.name}@0" for fragment in part}
        assert all(torch.equal(loaded[f"{fragment.name}@0"], fragment.values) for fragment in part)


def test_a_rank_that_holds_nothing_writes_a_file_of_nothing(tmp_path: Path) -> None:
    ((info, part),) = write_files(tmp_path, "rank00003", [])
    assert (info.path, part, load_file(tmp_path / info.path)) == ("rank00003.safetensors", [], {})


def test_a_disk_that_takes_no_more_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's limit on the size of a file: a short write first, then a refusal, as on a full disk."""
    monkeypatch.setattr(direct_io, "PIECE_BYTES", 8192)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_files(tmp_path, "rank00000", fragments([10_000]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
