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

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmtrain.data.order import Int64s

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
