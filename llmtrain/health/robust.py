"""Median and median absolute deviation of the newest numbers, kept in order so that asking costs microseconds."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class RobustWindow:
    """The newest `size` numbers; none may be NaN."""

    def __init__(self, size: int, numbers: Iterable[float] = ()):
        self.newest = deque(numbers, maxlen=size)
        self._sorted = sorted(self.newest)

    def __len__(self) -> int:
        return len(self.newest)

    @property
    def is_full(self) -> bool:
        """Whether the next number pushes one out."""
        return len(self.newest) == self.newest.maxlen

    def add(self, number: float) -> None:
        """Take in a number; the oldest goes where there is no room."""
        if self.is_full:
            del self._sorted[bisect_left(self._sorted, self.newest[0])]
        self.newest.append(number)
        insort(self._sorted, number)

    def median(self) -> float:
        """The middle one, or the mean of the two in the middle."""
        count = len(self._sorted)
        return (self._sorted[(count - 1) // 2] + self._sorted[count // 2]) / 2

    def spread(self) -> tuple[float, float]:
        """The median, and that of the distances to it: the farthest of the nearer half, which stand side by side."""
        numbers, count, middle = self._sorted, len(self._sorted), self.median()
        nearer = (count + 1) // 2
        begin, last = 0, count - nearer
        while begin < last:
            trial = (begin + last) // 2
            if middle - numbers[trial] > numbers[trial + nearer] - middle:
                begin = trial + 1
            else:
                last = trial
        farthest = max(middle - numbers[begin], numbers[begin + nearer - 1] - middle)
        if count % 2:
            return middle, farthest
        left = middle - numbers[begin - 1] if begin else float("inf")
        right = numbers[begin + nearer] - middle if begin + nearer < count else float("inf")
        return middle, (farthest + min(left, right)) / 2
