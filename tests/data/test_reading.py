"""Rows out of files of ids: of any place in a file, and while other threads read too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data import reading
from llmtrain.data.reading import IdFile, RowReader

UINT16 = np.dtype("uint16")


def reader_of(folder: Path, begin: int) -> RowReader:
    """Of three files of 10 ids each, 0 to 29, behind a header."""
    files = []
    for number in range(3):
        path = folder / f"{number}.bin"
        path.write_bytes(bytes(begin) + np.arange(10 * number, 10 * number + 10).astype("<u2").tobytes())
        files.append(IdFile(str(path), begin, 10, UINT16.newbyteorder("<")))
    return RowReader(files, UINT16)


@pytest.mark.parametrize("begin", [0, 1, 2, 1023, 1024])
def test_ids_may_begin_at_any_byte(tmp_path: Path, begin: int) -> None:
    rows = reader_of(tmp_path, begin).rows(np.array([0, 8, 26]), 4)
    assert rows.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [26, 27, 28, 29]]


def test_a_file_that_another_thread_lets_go_is_read_to_the_end_of_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAPPED_BYTES", 0)
    reader = reader_of(tmp_path, 0)
    assert reader.rows(np.array([3]), 2).tolist() == [[3, 4]]
    is_read, others = reading._is_read, list[int]()

    def meanwhile(descriptor: int, row: memoryview, place: int) -> bool:
        reader._open.clear()
        others.append(os.open(tmp_path / "2.bin", os.O_RDONLY))  # would get the number of a closed one
        return is_read(descriptor, row, place)

    monkeypatch.setattr(reading, "_is_read", meanwhile)
    try:
        assert reader.rows(np.array([3]), 2).tolist() == [[3, 4]]
    finally:
        for descriptor in others:
            os.close(descriptor)
    assert others
