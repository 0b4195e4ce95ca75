"""Best-fit packing: whole documents side by side in windows that are padded, so that few are cut.

    ends of documents → pieces: a document of up to `seq_len` tokens is one; a longer one fills as many windows as it
    can, and what is left, its rest, is a piece again
    → for `GROUP` documents at a time, in their order: best-fit decreasing into windows

A rest begins with what came before it, so it stands first in a window, which is its own; documents that fit go beside
it. All others begin with the end-of-document id, which closes the one before. So a window is a row of ids as from a
stream, and where its documents begin and where it ends follows from these alone.

The result is a pure function of the ends and `seq_len`. Documents without a token of their own are left out.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmtrain.data.order import Int64s
from llmtrain.data.shards import TokenStream

GROUP = 1 << 17  # documents that are packed together; with another number the windows of a saved run would be others
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pieces:
    """Stretches of a stream."""

    begins: Int64s  # where their first targets are
    lengths: npt.NDArray[np.int32]  # targets, the id that closes a document included
    open: Bools  # begin a document
    close: Bools  # end one

    def __len__(self) -> int:
        return len(self.begins)

    def take(self, order: Int64s) -> Pieces:
        """Those with the given numbers."""
        return Pieces(self.begins[order], self.lengths[order], self.open[order], self.close[order])

    @classmethod
    def together(cls, parts: list[Pieces]) -> Pieces:
        """All pieces of all parts."""
        return cls(
            np.concatenate([part.begins for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.open for part in parts]),
            np.concatenate([part.close for part in parts]),
        )


class PackedWindows:
    """As `Windows`, but packed; takes 16 bytes of memory a document and 12 a window.

    Args:
        stream: the tokens.
        seq_len: inputs of a window, and targets and padding.
        document_end: the id that closes documents; windows are padded with it.
        groups: the ends of successive documents, (documents,) each: positions in the stream after their last tokens.
    """

    def __init__(self, stream: TokenStream, seq_len: int, document_end: int, groups: Iterable[Int64s]):
        self.stream, self.seq_len, self.padding = stream, seq_len, document_end
        parts, counts, fills = [], [], []
        begin = 0
        for ends in groups:
            pieces = cut(np.concatenate(([begin], ends)), self._are_closed(ends), seq_len)
            window_of = pack(pieces.lengths, ~pieces.open, seq_len)
            # A rest first, then as they were placed or, of equal windows, in the stream.
            parts.append(pieces.take(np.lexsort((pieces.open, window_of))))
            counts.append(np.bincount(window_of))
            fills.append(np.bincount(window_of, pieces.lengths).astype(np.int32))
            begin = int(ends[-1])
        pieces = Pieces.together(parts)
        self._first = np.cumsum(np.concatenate(([0], *counts)), dtype=np.int64)  # piece of each window, and the end
        self._fills = np.concatenate(fills)
        self._digest = _digest(pieces.begins, pieces.lengths, self._first)
        # What is read of each piece. What opens and what closes a document stands in the row already, also where the
        # stream has none; of a piece that does not open one, the token before its first target is read too.
        del parts, counts, fills  # as large as all that follows
        places = _sums_before(pieces.lengths)
        places -= np.repeat(_sums_before(self._fills), np.diff(self._first))
        places += pieces.open
        self._places = places.astype(np.int32)  # in the row
        del places
        self._starts, self._lengths = pieces.begins, pieces.lengths  # in the stream
        self._starts -= ~pieces.open
        self._lengths -= pieces.close
        self._lengths += ~pieces.open

    def __len__(self) -> int:
        return len(self._fills)

    @property
    def pieces(self) -> int:
        """Documents and parts of such in all windows."""
        return len(self._starts)

    @property
    def targets(self) -> int:
        """In all windows."""
        return int(self._fills.sum(dtype=np.int64))

    def digest(self) -> str:
        """Equal exactly when the windows are made of the same pieces; SHA-256, in hex."""
        return self._digest

    def count_targets(self, ids: Int64s) -> Int64s:
        """Targets in each of the windows `ids`, shape (n,); the rest is padding."""
        return self._fills[ids].astype(np.int64)

    def gather(self, ids: Int64s) -> torch.Tensor:
        """Read windows `ids` as (len(ids), seq_len + 1) tokens in the stored dtype.

        row[1:] are the targets; padding is what of them is the end-of-document id after another, up to the row's end.

        Raises:
            CorruptError: a shard is gone or was cut off; or an id is outside the vocabulary, and where.
        """
        rows = np.full((len(ids), self.seq_len + 1), self.padding, self.stream.dtype)
        flat = rows.reshape(-1)
        first = self._first[ids]
        counts = self._first[ids + 1] - first
        pieces = np.arange(counts.sum()) + np.repeat(first - _sums_before(counts), counts)
        begins = self._places[pieces] + np.repeat(np.arange(len(ids)) * (self.seq_len + 1), counts)
        starts, lengths = self._starts[pieces], self._lengths[pieces]
        stretches = zip(begins.tolist(), (begins + lengths).tolist(), strict=True)
        self.stream.fill([flat[begin:end] for begin, end in stretches], starts.tolist())
        if self.stream.has_wrong_id(rows):
            for start, length in zip(starts, lengths.tolist(), strict=True):
                self.stream.gather(start[None], length)  # which names it
        return torch.from_numpy(rows)

    def _are_closed(self, ends: Int64s) -> Bools:
        """Whether each document ends with the id: all but those that a file of tokens broke off."""
        closed = np.ones(len(ends), np.bool_)
        at_end = np.flatnonzero(np.isin(ends, self.stream.bounds[1:]))
        closed[at_end] = self.stream.gather(ends[at_end] - 1, 1)[:, 0] == self.padding
        return closed


def _digest(*columns: npt.NDArray[np.integer[Any]]) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column).view(np.uint8).data)
    return digest.hexdigest()


def _sums_before(values: npt.NDArray[np.integer[Any]]) -> Int64s:
    sums = np.cumsum(values, dtype=np.int64)
    sums -= values
    return sums


def cut(bounds: Int64s, closed: Bools, seq_len: int) -> Pieces:
    """Cut documents that lie one after another into pieces of at most `seq_len` tokens.

    Args:
        bounds: (documents + 1,) where each begins, and the last ends.
        closed: (documents,) whether the end-of-document id is there; where it is not, there is one more target.
        seq_len: of windows.
    """
    lengths = np.diff(bounds) + ~closed
    kept = np.flatnonzero(lengths > 1)
    lengths = lengths[kept]
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(kept)), counts)
    offsets = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    left = lengths[document] - offsets
    return Pieces(
        bounds[:-1][kept][document] + offsets, np.minimum(left, seq_len).astype(np.int32), offsets == 0, left <= seq_len
    )


def pack(lengths: npt.NDArray[np.int32], is_rest: Bools, seq_len: int) -> Int64s:
    """Best-fit decreasing: the longest piece first, each where the least room is left in which it fits.

    Pieces of a length are placed together, so the time grows with the number of different lengths.

    Args:
        lengths: (pieces,) at most `seq_len`.
        is_rest: (pieces,) each gets a window of its own, before the others.
        seq_len: of windows.

    Returns:
        (pieces,) the window of each.
    """
    window_of = np.empty(len(lengths), np.int64)
    first = np.flatnonzero(is_rest | (lengths == seq_len))
    count = len(first)
    window_of[first] = np.arange(count)
    rooms = _Rooms()
    for length, windows in _by_length(lengths, first):
        rooms.put(seq_len - length, window_of[windows])
    others = np.flatnonzero(~is_rest & (lengths < seq_len))
    for length, pieces in _by_length(lengths, others):
        while len(pieces):
            room = rooms.tightest(length) or seq_len
            fit = room // length
            wanted = -(-len(pieces) // fit)
            if room == seq_len:
                windows, count = np.arange(count, count + wanted), count + wanted
            else:
                windows = rooms.take(room, wanted)
            placed = min(len(pieces), fit * len(windows))
            window_of[pieces[:placed]] = np.repeat(windows, fit)[:placed]
            full, over = divmod(placed, fit)
            rooms.put(room - fit * length, windows[:full])
            rooms.put(room - over * length, windows[full:])
            pieces = pieces[placed:]  # noqa: PLW2901 -- those that still wait
    return window_of


def _by_length(lengths: npt.NDArray[np.int32], pieces: Int64s) -> Iterable[tuple[int, Int64s]]:
    """The given pieces by their length, the longest first."""
    order = pieces[np.argsort(-lengths[pieces], kind="stable")]
    changes = np.flatnonzero(np.diff(lengths[order])) + 1
    return ((int(lengths[part[0]]), part) for part in np.split(order, changes) if len(part))


class _Rooms:
    """Windows by the room that is left in them."""

    def __init__(self) -> None:
        self._windows: dict[int, list[Int64s]] = {}
        self._rooms: list[int] = []  # rising: those of which there are windows

    def put(self, room: int, windows: Int64s) -> None:
        """Add windows with that room; without any they are full, and forgotten."""
        if room and len(windows):
            if room not in self._windows:
                insort(self._rooms, room)
            self._windows.setdefault(room, []).append(windows)

    def tightest(self, length: int) -> int | None:
        """The least room in which so many tokens fit."""
        at = bisect_left(self._rooms, length)
        return self._rooms[at] if at < len(self._rooms) else None

    def take(self, room: int, most: int) -> Int64s:
        """Remove and return at least one window with that room, and at most so many."""
        parts = self._windows[room]
        windows = parts.pop()
        if len(windows) > most:
            parts.append(windows[most:])
        elif not parts:
            del self._windows[room]
            self._rooms.pop(bisect_left(self._rooms, room))
        return windows[:most]
