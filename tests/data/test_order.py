"""The order of samples: a pure function that is a permutation, looks random, and costs nothing at any size."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.order import permute, sample_ids

SEEDS = st.integers(0, 2**63 - 1)


@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_window_comes_exactly_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    positions = np.arange(size, dtype=np.int64) + epoch * size
    assert np.array_equal(np.sort(sample_ids(positions, size, seed)), np.arange(size))


@pytest.mark.slow
@given(size=st.integers(1, 10**13), seed=SEEDS, start=st.integers(0, 10**15), count=st.integers(1, 50))
def test_any_stretch_equals_its_positions_asked_one_by_one(size: int, seed: int, start: int, count: int) -> None:
    positions = np.arange(start, start + count, dtype=np.int64)
    together = sample_ids(positions, size, seed)
    alone = [int(sample_ids(positions[i : i + 1], size, seed)[0]) for i in range(count)]
    assert together.tolist() == alone
    assert together.min() >= 0
    assert together.max() < size


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    size = 1000
    orders = [sample_ids(np.arange(size) + epoch * size, size, seed) for epoch in range(4) for seed in (1, 2)]
    for a, b in itertools.combinations(orders, 2):
        # Two independent permutations agree at about one place (Poisson with mean 1).
        assert np.count_nonzero(a == b) < 10


@pytest.mark.parametrize("size", [3, 4])
def test_small_permutations_are_all_equally_likely(size: int) -> None:
    """Chi-square over all size! orders in 3,000 epochs, against its 99.99 % quantile."""
    draws = 3_000
    counts = Counter(map(tuple, sample_ids(np.arange(draws * size), size, 7).reshape(draws, size).tolist()))
    expected = draws / math.factorial(size)
    cells = [counts[order] for order in itertools.permutations(range(size))]
    chi_square = sum((cell - expected) ** 2 / expected for cell in cells)
    quantile = {3: 25.7, 4: 57.1}[size]  # 5 and 23 degrees of freedom
    assert chi_square < quantile


def test_neighbours_and_epochs_are_uncorrelated() -> None:
    """Correlation of n independent pairs has standard deviation 1/√n; five of them is the bound."""
    size = 50_021
    first = sample_ids(np.arange(size), size, 3).astype(float)
    second = sample_ids(np.arange(size) + size, size, 3).astype(float)
    bound = 5 / math.sqrt(size)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < bound
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < bound


@pytest.mark.parametrize("size", [10**10, 10**13 // 1025])
def test_windows_of_a_huge_run_are_spread_evenly_and_apart_from_those_of_other_epochs_and_seeds(size: int) -> None:
    """100,000 consecutive positions from anywhere in an epoch, of three seeds and three epochs.

    Chi-square of their windows over 100 equal bins, and of the distances from one to the next: against the quantile of
    99 degrees of freedom that chance passes once in 10^6 (180.8; 54 of these are
    looked at here). Correlations of n independent pairs have standard deviation 1/√n; five of them is the bound.
    """
    count, bins, quantile, bound = 100_000, 100, 180.8, 5 / math.sqrt(100_000)
    starts = (0, size // 3, size - count)
    drawn = {
        (seed, epoch, start): sample_ids(np.arange(count, dtype=np.int64) + epoch * size + start, size, seed)
        for seed in (1, 1337, 2**62)
        for epoch in (0, 1, 10**5)
        for start in starts
    }
    for windows in drawn.values():
        assert len(np.unique(windows)) == count
        for places in (windows, np.diff(windows) % size):
            cells = np.bincount(places // -(-size // bins), minlength=bins)
            expected = len(places) / bins
            assert ((cells - expected) ** 2 / expected).sum() < quantile
        assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < bound
        assert abs(np.corrcoef(windows, np.arange(count))[0, 1]) < bound
    for one, other in itertools.combinations(drawn.values(), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < bound


def test_memory_does_not_grow_with_the_data() -> None:
    positions = np.arange(4096, dtype=np.int64) + 10**15
    peaks = []
    for size in (10**4, 10**13):
        tracemalloc.start()
        sample_ids(positions, size, 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def test_a_known_order_never_changes() -> None:
    """A changed order would silently repeat and skip samples in every run that is resumed across versions."""
    assert permute(np.arange(10, dtype=np.int64), 10, 42).tolist() == KNOWN_PERMUTATION
    assert sample_ids(np.array([0, 1, 10**6, 10**12]), 12_345, 1337).tolist() == KNOWN_IDS


KNOWN_PERMUTATION = [7, 3, 8, 0, 2, 4, 6, 1, 5, 9]
KNOWN_IDS = [10737, 11922, 9557, 4029]
