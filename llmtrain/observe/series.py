"""A line of points made smaller, for pictures, and smoother, for eyes and rules."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def thin(xs: Floats, ys: Floats, max_points: int) -> tuple[Floats, Floats]:
    """Keep the lowest and the highest point of each of `max_points / 2` runs of points, so that no spike is lost."""
    if len(xs) <= max_points:
        return xs, ys
    edges = np.linspace(0, len(xs), max_points // 2 + 1).astype(np.int64)
    lowest = [start + int(ys[start:end].argmin()) for start, end in pairwise(edges)]
    highest = [start + int(ys[start:end].argmax()) for start, end in pairwise(edges)]
    kept = np.unique(lowest + highest)
    return xs[kept], ys[kept]


def running_median(ys: Floats, width: int) -> Floats:
    """The median of the `width` values around each (odd; fewer at the ends): what is left of a curve without noise."""
    half = min(width // 2, (len(ys) - 1) // 2) if len(ys) else 0
    if not half:
        return ys
    padded = np.concatenate([np.full(half, np.nan), ys, np.full(half, np.nan)])
    medians: Floats = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    return medians


def noise_of(ys: Floats) -> float:
    """Standard deviation without the trend: 1.4826 / √2 of the median absolute difference of neighbours.

    Differences of neighbours hardly see a trend, and the median not the odd spike.
    """
    return float(1.4826 * np.median(np.abs(np.diff(ys))) / np.sqrt(2)) if len(ys) > 1 else 0.0
