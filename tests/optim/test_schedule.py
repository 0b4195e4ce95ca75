"""Learning rates against values worked out by hand, and for every step there is."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config import ScheduleSection
from llmtrain.optim.schedule import Schedule, make_schedule

NAMES = ["constant", "linear", "step", "cosine", "three_phase", "warm_restarts"]


def schedule(peak: float, total: int, **settings: Any) -> Schedule:
    return make_schedule(ScheduleSection(**settings), peak, total)


def test_cosine_check_values() -> None:
    lr = schedule(3e-4, 50_000, name="cosine", warmup_steps=1000, min_lr=0.0)
    expected = {0: 0, 500: 1.5e-4, 1000: 3e-4, 10_000: 2.757e-4, 25_500: 1.5e-4, 50_000: 0, 10**9: 0}
    for step, value in expected.items():
        assert lr(step) == pytest.approx(value, rel=2e-4, abs=1e-12), step


def test_three_phase_check_values() -> None:
    lr = schedule(1e-3, 1000, name="three_phase", start_lr=1e-4, warmup_steps=10, min_lr=1e-4)
    expected = {0: 1e-4, 5: 5.5e-4, 10: 1e-3, 400: 1e-3, 800: 1e-3, 850: 8.682e-4, 900: 5.5e-4, 1000: 1e-4, 5000: 1e-4}
    for step, value in expected.items():
        assert lr(step) == pytest.approx(value, rel=1e-4), step


def test_linear_step_and_constant_check_values() -> None:
    linear = schedule(1e-3, 110, name="linear", warmup_steps=10, min_lr=0.0)
    assert [linear(s) for s in (0, 5, 10, 60, 110, 111)] == pytest.approx([0, 5e-4, 1e-3, 5e-4, 0, 0])
    drops = schedule(1e-3, 100, name="step", warmup_steps=0, step_size=10, gamma=0.5, min_lr=2e-4)
    assert [drops(s) for s in (0, 9, 10, 20, 30, 99)] == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4, 2e-4, 2e-4])
    constant = schedule(1e-3, 100, name="constant", warmup_steps=4)
    assert [constant(s) for s in (0, 1, 4, 1000)] == pytest.approx([0, 2.5e-4, 1e-3, 1e-3])


def test_warm_restarts_begin_again_and_grow() -> None:
    lr = schedule(1e-3, 10**6, name="warm_restarts", warmup_steps=10, cycle_steps=100, cycle_mult=2.0, min_lr=0.0)
    for begin, length in ((10, 100), (110, 200), (310, 400), (710, 800)):
        assert lr(begin) == pytest.approx(1e-3, rel=1e-3)
        assert lr(begin + length // 2) == pytest.approx(5e-4, rel=1e-6)
        assert lr(begin + length - 1) < 1e-6


@given(
    name=st.sampled_from(NAMES), step=st.integers(0, 10**12), total=st.integers(1, 10**7), warmup=st.integers(0, 10**5),
    mult=st.floats(1, 4), cycle=st.integers(1, 10**5),
)  # fmt: skip
def test_every_schedule_is_total_and_stays_in_bounds(
    name: str, step: int, total: int, warmup: int, mult: float, cycle: int
) -> None:
    lr = schedule(1e-3, total, name=name, warmup_steps=warmup, cycle_mult=mult, cycle_steps=cycle, min_lr=1e-5)
    value = lr(step)
    assert math.isfinite(value)
    assert 0 <= value <= 1e-3 * (1 + 1e-12)
    if step >= warmup:
        assert value >= 1e-5 * (1 - 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_warmup_zero_starts_at_the_peak(name: str) -> None:
    assert schedule(1e-3, 100, name=name, warmup_steps=0)(0) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_no_jump_where_the_warmup_ends(name: str) -> None:
    lr = schedule(1e-3, 10_000, name=name, warmup_steps=1000, cycle_steps=5000)
    assert abs(lr(1000) - lr(999)) <= 1.1e-6
