"""Small curves out of characters, for terminals and logs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmtrain.observe.series import Floats

BARS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a Braille character: two columns of four
_BLANK = 0x2800


def means(xs: Floats, ys: Floats, count: int) -> Floats:
    """The mean of the points in each of `count` equal stretches of x; NaN where there is none."""
    if not len(xs):
        return np.full(count, np.nan)
    width = (xs[-1] - xs[0]) / count or 1.0
    places = np.minimum((xs - xs[0]) // width, count - 1).astype(np.int64)
    sums, points = np.bincount(places, ys, count), np.bincount(places, minlength=count)
    return np.where(points > 0, sums / np.maximum(points, 1), np.nan)


def sparkline(ys: Floats) -> str:
    """One character for each value, a blank where there is none."""
    known = ys[np.isfinite(ys)]
    if not len(known):
        return ""
    low, span = float(known.min()), float(known.max() - known.min()) or 1.0
    heights = [None if math.isnan(y) else round((y - low) / span * (len(BARS) - 1)) for y in ys]
    return "".join(" " if height is None else BARS[height] for height in heights)


def plot(curves: Sequence[tuple[Floats, Floats]], width: int, height: int) -> list[list[tuple[str, int | None]]]:
    """Curves over each other, in Braille dots.

    Args:
        curves: x and y of each, finite, x rising.
        width: in characters.
        height: in lines.

    Returns:
        for each line `width` pairs of a character and the number of the curve it is of, None: blank. Where curves
        meet in a character it is that of the last.
    """
    xs, ys = (np.concatenate([curve[axis] for curve in curves]) for axis in (0, 1))
    if not len(xs):
        return []
    left, right, low, high = float(xs.min()), float(xs.max()), float(ys.min()), float(ys.max())
    cells = np.zeros((height, width), np.int64)
    owners = np.full((height, width), -1)
    for number, (x, y) in enumerate(curves):
        columns, rows = _dots(x, y, (left, right, low, high), 2 * width, 4 * height)
        for column, row in zip(columns, rows, strict=True):
            cells[row // 4, column // 2] |= _DOTS[column % 2][row % 4]
            owners[row // 4, column // 2] = number
    return [
        [(chr(_BLANK + cell) if cell else " ", owner if cell else None) for cell, owner in zip(*line, strict=True)]
        for line in zip(cells.tolist(), owners.tolist(), strict=True)
    ]


def _dots(
    xs: Floats, ys: Floats, box: tuple[float, float, float, float], columns: int, rows: int
) -> tuple[list[int], list[int]]:
    """The dots of a curve: in each column from where the line comes to where it goes; rows count from the top."""
    if not len(xs):
        return [], []
    left, right, low, high = box
    at = np.interp(
        np.linspace(left, right, columns), xs, means_around(xs, ys, left, right, columns), left=np.nan, right=np.nan
    )
    places = (high - at) / ((high - low) or 1.0) * (rows - 1)
    found: tuple[list[int], list[int]] = ([], [])
    before: int | None = None
    for column, place in enumerate(places):
        if math.isnan(place):
            before = None
            continue
        row = min(rows - 1, max(0, round(place)))
        first = row if before is None or before == row else before + (1 if row > before else -1)
        for between in range(min(first, row), max(first, row) + 1):
            found[0].append(column)
            found[1].append(between)
        before = row
    return found


def means_around(xs: Floats, ys: Floats, left: float, right: float, columns: int) -> Floats:
    """Each point's value as the mean of all that fall into its column."""
    places = np.minimum((xs - left) / ((right - left) or 1.0) * columns, columns - 1).astype(np.int64)
    sums, points = np.bincount(places, ys, columns), np.bincount(places, minlength=columns)
    return (sums / np.maximum(points, 1))[places]
