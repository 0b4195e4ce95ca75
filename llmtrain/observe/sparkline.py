"""A curve in one line of text, over everything since the beginning, in memory that does not grow."""

from __future__ import annotations

import math

import numpy as np

from llmtrain.observe.text_curve import sparkline


class Sparkline:
    """At most `width` columns; each is a mean over an equal number of values, but the last."""

    def __init__(self, width: int = 24):
        self._width = width
        self._means: list[float] = []  # of `_per_mean` values each, fewer than twice the width
        self._per_mean = 1
        self._sum, self._count = 0.0, 0  # of the values after those

    def add(self, value: float) -> None:
        """Take in the next value; one that is not finite leaves no mark."""
        if not math.isfinite(value):
            return
        self._sum += value
        self._count += 1
        if self._count < self._per_mean:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * self._width:
            self._means = [sum(pair) / 2 for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._per_mean *= 2

    def __str__(self) -> str:
        """The curve, its lowest value at the bottom and its highest at the top; logarithmic where all are above 0."""
        columns = self._columns()
        if len(columns) < 2:
            return ""
        if min(columns) > 0:
            columns = [math.log(value) for value in columns]
        return sparkline(np.array(columns))

    def _columns(self) -> list[float]:
        means = [*self._means, *([self._sum / self._count] if self._count else [])]
        if len(means) <= self._width:
            return means
        return [means[place * len(means) // self._width] for place in range(self._width)]
