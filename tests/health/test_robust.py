"""The statistics of a window are those of its numbers, bit for bit."""

from __future__ import annotations

import random
from collections import deque
from statistics import median

import pytest

from llmtrain.health.robust import RobustWindow


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 128])
@pytest.mark.parametrize("kind", ["spread", "few values", "falling", "one far off"])
def test_median_and_deviation_are_those_of_the_newest(size: int, kind: str) -> None:
    dice = random.Random(size)
    draw = {
        "spread": lambda step: dice.gauss(5.0, 1.0),
        "few values": lambda step: float(dice.randint(0, 2)),
        "falling": lambda step: 10.0 / (step + 1),
        "one far off": lambda step: 1e30 if step % 50 == 7 else dice.random(),
    }[kind]
    window, newest = RobustWindow(size), deque(maxlen=size)
    for step in range(3 * size + 5):
        number = draw(step)
        window.add(number)
        newest.append(number)
        middle = median(newest)
        assert window.median() == middle
        assert window.spread() == (middle, median(abs(x - middle) for x in newest))
    again = RobustWindow(size, window.newest)
    assert again.spread() == window.spread()
    assert again.is_full and len(again) == size


def test_a_smaller_window_keeps_the_newest() -> None:
    assert list(RobustWindow(2, [1.0, 5.0, 3.0]).newest) == [5.0, 3.0]
