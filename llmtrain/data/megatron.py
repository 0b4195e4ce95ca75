"""The index of a Megatron dataset (`.idx` beside `.bin`): how long its sequences are, and which make a document.

b"MMIDIDX\\0\\0"  u64 version 1  u8 dtype  u64 sequences  u64 document marks
int32 lengths of the sequences in tokens, int64 where each begins in the .bin in bytes,
int64 document marks: 0, and the number of sequences before the end of each document; then, rarely, int8 modes
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.outside import Dtype
from llmtrain.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
# int32 is read as uint32: no id is negative, and one that is lies beyond every vocabulary.
DTYPES: dict[int, Dtype] = {8: "uint16", 4: "uint32"}
OTHER_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "float64", 7: "float32"}
AT_ONCE = 1 << 20  # entries: keeps memory small however long the index is
Numbers = npt.NDArray[np.int64]


class MegatronIndex:
    """An index, memory-mapped and checked against itself and against the size of its `.bin`.

    Raises:
        UserError: damaged, cut short, not of this `.bin`, or of a kind that cannot be used in place.
    """

    def __init__(self, path: Path, bin_bytes: int):
        self.path = path
        try:
            self._map(bin_bytes)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error

    def ends(self, first: int, last: int) -> Iterator[Numbers]:
        """Yield the token positions after the last token of each document that ends in (first, last], in blocks."""
        begin, end = self._first_ending_after(first), self._first_ending_after(last)
        for mark in range(begin, end, AT_ONCE):
            yield self._tokens_before(self._marks[mark : min(mark + AT_ONCE, end)])

    def boundaries(self, target: int) -> Iterator[int]:
        """Yield the last document end before a token position, and the first at or after it, where there are such."""
        after = self._first_ending_after(target - 1)
        for mark in (after - 1, after):
            if 1 <= mark < len(self._marks):
                yield self._end_of(mark)

    def _map(self, bin_bytes: int) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            head = file.read(HEADER.size)
        if not head.startswith(MAGIC):
            raise UserError(f"{self.path}: not the index of a Megatron dataset (it begins with {head[:9]!r})")
        if len(head) < HEADER.size:
            raise self._damaged(f"it ends after {size} bytes")
        _, version, code, sequences, marks = HEADER.unpack(head)
        if version != 1:
            raise UserError(f"{self.path}: a Megatron index of version {version}; only 1 is known")
        if code not in DTYPES:
            held = OTHER_DTYPES.get(code, f"dtype number {code}")
            raise UserError(f"{self.path}: its ids are stored as {held}; only uint16 and int32 can be used in place")
        self.dtype = DTYPES[code]
        self._itemsize = np.dtype(self.dtype).itemsize
        needed = HEADER.size + 12 * sequences + 8 * marks
        if size not in (needed, needed + sequences):
            raise self._damaged(
                f"its {sequences} sequences and {marks} document marks take {needed} bytes, it has {size}"
            )
        if not sequences or not marks:
            raise UserError(f"{self.path}: holds no {'tokens' if not sequences else 'documents'}")

        def mapped(dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
            return np.asarray(np.memmap(self.path, dtype, "r", offset, count))

        self._lengths = mapped("<i4", HEADER.size, sequences)
        self._pointers = mapped("<i8", HEADER.size + 4 * sequences, sequences)
        self._marks = mapped("<i8", HEADER.size + 12 * sequences, marks)
        self._check_sequences(bin_bytes)
        self._check_marks()
        self.tokens = bin_bytes // self._itemsize

    def _check_sequences(self, bin_bytes: int) -> None:
        end = 0
        for begin in range(0, len(self._lengths), AT_ONCE):
            lengths = self._lengths[begin : begin + AT_ONCE].astype(np.int64)
            pointers = self._pointers[begin : begin + AT_ONCE]
            self._refuse(lengths < 0, begin, lengths, "has the length {}")
            outside = (pointers < 0) | (pointers > bin_bytes)
            self._refuse(outside, begin, pointers, f"begins at byte {{}}, outside of the {bin_bytes} bytes of its .bin")
            ends = pointers + lengths * self._itemsize
            before = np.concatenate(([end], ends[:-1]))
            self._refuse(
                pointers < before, begin, pointers, "begins at byte {}, before the end of the one before it (not"
                " ascending)",
            )  # fmt: skip
            self._refuse(
                pointers > before, begin, pointers, "begins at byte {}, after a gap; only files without gaps can be"
                " used in place",
            )  # fmt: skip
            end = int(ends[-1])
        if end != bin_bytes:
            raise self._damaged(
                f"its sequences take {end} bytes, {self.path.with_suffix('.bin').name} has {bin_bytes}; is one of"
                " them cut off, or of another dataset?"
            )

    def _check_marks(self) -> None:
        before = 0
        for begin in range(0, len(self._marks), AT_ONCE):
            marks = self._marks[begin : begin + AT_ONCE]
            if (np.diff(marks, prepend=before) < 0).any():
                raise self._damaged("its document marks do not ascend")
            before = int(marks[-1])
        if int(self._marks[0]) != 0 or before != len(self._lengths):
            raise self._damaged(
                f"its document marks go from {int(self._marks[0])} to {before}, not from 0 to its {len(self._lengths)}"
                " sequences"
            )

    def _refuse(self, wrong: npt.NDArray[np.bool_], begin: int, values: Numbers, said: str) -> None:
        if wrong.any():
            first = int(np.argmax(wrong))
            raise self._damaged(f"sequence {begin + first} {said.format(int(values[first]))}")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: damaged Megatron index: {what}")

    def _first_ending_after(self, token: int) -> int:
        """The number of the first mark (0 is none: it ends nothing) of a document that ends after `token` tokens."""
        return bisect_left(range(len(self._marks)), token + 1, lo=1, key=self._end_of)

    def _end_of(self, mark: int) -> int:
        return int(self._tokens_before(self._marks[mark : mark + 1])[0])

    def _tokens_before(self, marks: Numbers) -> Numbers:
        last = len(self._pointers) - 1
        inside = self._pointers[np.minimum(marks, last)] // self._itemsize
        return np.where(marks <= last, inside, self.tokens)
