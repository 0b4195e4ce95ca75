"""Curves out of characters: the dots lie where the values are."""

from __future__ import annotations

import numpy as np
import pytest

from llmtrain.observe.series import noise_of, running_median
from llmtrain.observe.text_curve import means, plot, sparkline

STEPS = np.arange(400.0)


def rows_of(lines: list[list[tuple[str, int | None]]], owner: int) -> list[int]:
    """For each column of characters, the first line in which the curve is."""
    return [
        next((row for row, line in enumerate(lines) if line[column][1] == owner), -1) for column in range(len(lines[0]))
    ]


def test_a_falling_line_goes_from_the_top_left_to_the_bottom_right() -> None:
    lines = plot([(STEPS, -STEPS)], width=40, height=8)
    assert len(lines) == 8 and all(len(line) == 40 for line in lines)
    rows = rows_of(lines, 0)
    assert rows[0] == 0 and rows[-1] == 7 and rows == sorted(rows) and set(rows) == set(range(8))


def test_curves_share_their_axes() -> None:
    lines = plot([(STEPS, np.zeros(400)), (STEPS[:200], np.ones(200))], width=40, height=8)
    low, high = rows_of(lines, 0), rows_of(lines, 1)
    assert set(low) == {7}
    assert set(high[:19]) == {0} and set(high[21:]) == {-1}, "the second ends in the middle"


def test_a_curve_without_points_leaves_the_others_alone() -> None:
    """A run that has not been evaluated yet, or one without a record beside another."""
    nothing, curve = (np.empty(0), np.empty(0)), (STEPS, -STEPS)
    owners = [owner for line in plot([nothing, curve, nothing], width=40, height=8) for _, owner in line]
    assert set(owners) == {1, None}


def test_a_jump_is_a_line_without_gaps() -> None:
    lines = plot([(STEPS, np.where(STEPS < 200, 0.0, 1.0))], width=40, height=8)
    assert all(any(owner == 0 for _, owner in line) for line in lines)


@pytest.mark.parametrize("count", [1, 2])
def test_few_points_and_flat_ones_are_drawn(count: int) -> None:
    assert any(owner == 0 for line in plot([(STEPS[:count], np.full(count, 3.0))], 20, 4) for _, owner in line)
    assert plot([(np.empty(0), np.empty(0))], 20, 4) == []


def test_a_sparkline_has_its_ends_at_the_ends_and_blanks_where_nothing_is() -> None:
    assert sparkline(np.array([0.0, 1.0, np.nan, 0.5])) == "▁█ ▅"
    assert sparkline(np.array([np.nan])) == "" and sparkline(np.full(3, 2.0)) == "▁▁▁"


def test_means_are_of_equal_stretches_of_x() -> None:
    assert means(np.array([0.0, 1, 2, 3, 8]), np.array([1.0, 3, 5, 7, 9]), 4).tolist()[:2] == [2.0, 6.0]
    assert np.isnan(means(np.array([0.0, 1, 2, 3, 8]), np.array([1.0, 3, 5, 7, 9]), 4)[2])


def test_noise_and_trend_are_told_apart() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 4000)
    assert noise_of(noise + np.linspace(9, 1, 4000)) == pytest.approx(0.1, rel=0.05)
    trend = running_median(noise + np.linspace(9, 1, 4000), 201)
    assert np.abs(trend - np.linspace(9, 1, 4000)).max() < 0.25
    spiked = np.ones(100)
    spiked[50] = 99
    assert running_median(spiked, 5).max() == 1
    assert running_median(np.array([3.0]), 5).tolist() == [3.0] and noise_of(np.empty(0)) == 0
