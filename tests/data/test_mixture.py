"""Mixtures: shares that are exact, and an order that is a function of the position alone."""

from __future__ import annotations

import itertools
from fractions import Fraction
from heapq import heappop, heappush
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data import reading
from llmtrain.data.batches import Layout, Windows, batches, plain_order
from llmtrain.data.mixture import (
    LONGEST_CYCLE,
    MixedOrder,
    MixedWindows,
    Stage,
    fair_order,
    plan_stages,
    whole_numbers,
)
from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import TokenStream
from llmtrain.errors import CorruptError
from tests.data.test_batches import stream_of

EVERY = 10**6
weights_of = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


def sources_of(order: MixedOrder, windows: list[int], positions: np.ndarray) -> np.ndarray:
    """Which source each position takes its sample from."""
    return np.searchsorted(np.cumsum(windows), order(positions.astype(np.int64)), "right")


@given(weights=weights_of, start=st.integers(0, 10**13), seed=st.integers(0, 2**63 - 1))
def test_every_source_has_its_share_to_within_one_sample(weights: list[int], start: int, seed: int) -> None:
    """From the beginning of the stage to any position; so between any two positions to within two."""
    windows = [EVERY] * len(weights)
    order = MixedOrder(windows, seed, [Stage(0, tuple(map(float, weights)))])
    positions = np.arange(start, start + 100)
    taken = np.array(order.consumed(start))
    for source in sources_of(order, windows, positions).tolist():
        taken[source] += 1
        start += 1
        assert order.consumed(start) == taken.tolist()
        for count, weight in zip(taken.tolist(), weights, strict=True):
            assert abs(count - Fraction(start * weight, sum(weights))) < 1


@given(weights=weights_of, sizes=st.lists(st.integers(1, 30), min_size=6, max_size=6), begin=st.integers(0, 200))
def test_each_source_is_gone_through_epoch_by_epoch_in_new_orders(
    weights: list[int], sizes: list[int], begin: int
) -> None:
    """And the order before a change of weights, or a source that joins late, does not matter for that."""
    windows = sizes[: len(weights)]
    stages = [Stage(0, (1.0,) + (0.0,) * (len(weights) - 1)), Stage(begin, tuple(map(float, weights)))]
    order = MixedOrder(windows, 7, stages[begin == 0 :] if begin else [Stage(0, stages[1].weights)])
    ids = order(np.arange(300))
    first = np.cumsum([0, *windows])
    for source, size in enumerate(windows):
        own = ids[(ids >= first[source]) & (ids < first[source + 1])] - first[source]
        epochs = [own[at : at + size].tolist() for at in range(0, len(own) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        if size > 12 and len(epochs) > 1:
            assert epochs[0] != epochs[1]
    assert all(
        np.array_equal(order(np.array([position])), ids[position : position + 1]) for position in range(0, 300, 23)
    )


def cycle_slot_by_slot(counts: list[int]) -> tuple[list[int], list[int]]:
    """The order that runs have had from the first version on, written down plainly: source and j of each slot."""
    total, order, index = sum(counts), list[int](), list[int]()
    waiting = [(0, source, 0) for source, count in enumerate(counts) if count]  # (may come at, source, j)
    ready: list[tuple[int, int, int]] = []  # (due before, source, j)
    for slot in range(total):
        while waiting and waiting[0][0] <= slot:
            _, source, j = heappop(waiting)
            heappush(ready, (-((j + 1) * total // -counts[source]), source, j))
        _, source, j = heappop(ready)
        order.append(source)
        index.append(j)
        heappush(waiting, ((j + 1) * total // counts[source], source, j + 1))
    return order, index


def test_the_order_of_sources_never_changes_however_far_it_is_laid_out() -> None:
    """Runs that are resumed go on in it: all small mixtures, and large ones drawn at random."""
    small = [list(counts) for n in (1, 2, 3, 4) for counts in itertools.product(range(6), repeat=n) if any(counts)]
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, most, n) for most in (3, 40, 1000) for n in (2, 3, 7, 20) for _ in range(20)]
    skewed = [[9997, 1, 1, 1], [1, 5000, 4999], [500] * 19 + [499, 1], [0, 0, 7, 0]]
    fine = whole_numbers((0.123457, 0.5, 0.376543))
    assert sum(fine) == LONGEST_CYCLE
    for counts in [*small, *(counts.tolist() for counts in drawn if counts.any()), *skewed, fine]:
        sources, index = cycle_slot_by_slot(counts)
        for places in (len(sources), int(generator.integers(0, len(sources)))):
            laid, before = fair_order(counts, places)
            assert (laid.tolist(), before.tolist()) == (sources[:places], index[:places]), (counts, places)


def test_a_position_has_the_same_sample_whatever_was_asked_for_before() -> None:
    """Forwards, backwards and at random through cycles and stages, of which no more is laid out than needed."""
    windows, begins = [10**6, 10**5, 7], (0, 150_001, 160_000)
    weights = ((0.123457, 0.5, 0.376543), (0.3, 0.7, 0.0), (0.511111, 0.222222, 0.266667))
    stages = [Stage(begin, each) for begin, each in zip(begins, weights, strict=True)]
    whole = MixedOrder(windows, 5, stages)(np.arange(300_000))
    generator = np.random.default_rng(0)
    for starts in (range(0, 300_000, 9973), range(299_000, 0, -9973), generator.integers(0, 299_000, 30).tolist()):
        order = MixedOrder(windows, 5, stages)
        for start in starts:
            assert np.array_equal(order(np.arange(start, start + 8)), whole[start : start + 8])
            taken = np.searchsorted(np.cumsum(windows), whole[:start], "right")
            assert order.consumed(start) == np.bincount(taken, minlength=3).tolist()


def test_the_only_source_comes_in_the_order_of_a_run_on_it_alone() -> None:
    positions = np.arange(5000)
    alone = plain_order(997, seed=3)(positions)
    assert np.array_equal(MixedOrder([997], 3, [Stage(0, (0.3,))])(positions), alone)
    mixed = MixedOrder([997, 50], 3, [Stage(0, (2.0, 1.0))])(positions)
    assert np.array_equal(mixed[mixed < 997], alone[: (mixed < 997).sum()])
    assert MixedOrder([997, 997], 3, [Stage(0, (1.0, 1.0))])(positions)[1::2].tolist() != (alone[:2500] + 997).tolist()


@pytest.mark.parametrize(("weights", "counts"), [
    ((0.7, 0.2, 0.1), [7, 2, 1]), ((0.3, 0.3), [1, 1]), ((1e-3, 0.999), [1, 999]), ((5.0, 0.0), [1, 0]),
    ((2.5, 7.5, 10.0), [1, 3, 4]),
])  # fmt: skip
def test_weights_are_taken_as_they_are_written(weights: tuple[float, ...], counts: list[int]) -> None:
    assert whole_numbers(weights) == counts


@given(st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=9))
def test_weights_too_fine_for_a_cycle_are_rounded_and_none_to_nothing(weights: list[float]) -> None:
    counts, total = whole_numbers(tuple(weights)), sum(weights)
    assert 0 < sum(counts) <= LONGEST_CYCLE + len(weights)
    for weight, count in zip(weights, counts, strict=True):
        assert count > 0
        assert abs(count / sum(counts) - weight / total) <= (len(weights) + 1) / LONGEST_CYCLE


def test_stages_that_were_stay_and_those_to_come_follow_the_steps() -> None:
    layout = Layout(10**6, 8, 8)
    weights = {0: (1.0, 0.0), 100: (0.5, 0.5), 300: (0.0, 1.0)}
    plan = plan_stages([], weights, 0, 0, lambda steps: layout.position_after(0, steps))
    assert plan == [Stage(0, (1.0, 0.0)), Stage(800, (0.5, 0.5)), Stage(2400, (0.0, 1.0))]
    # A resume in the middle of the second stage, with twice the batch: what was stays where it was.
    larger = Layout(10**6, 16, 8)
    again = plan_stages(plan, weights, 200, 1600, lambda steps: larger.position_after(1600, steps))
    assert again == [plan[0], plan[1], Stage(1600 + 100 * 16, (0.0, 1.0))]
    # Other weights from now on; on the very position of a change they take its place.
    other = weights | {100: (0.9, 0.1)}
    assert plan_stages(plan, other, 200, 1600, lambda steps: 1600 + 8 * steps)[:3] == [
        *plan[:2], Stage(1600, (0.9, 0.1))
    ]  # fmt: skip
    assert plan_stages(plan, other, 100, 800, lambda steps: 800 + 8 * steps)[:2] == [plan[0], Stage(800, (0.9, 0.1))]


def test_any_position_of_a_huge_mixture_is_found_at_once() -> None:
    """Nothing is built that grows with the data: 10^13 tokens in windows of 2048, at step 10^7."""
    windows = [3 * 10**9, 10**9, 8 * 10**8]
    order = MixedOrder(windows, 1, [Stage(0, (0.625, 0.25, 0.125)), Stage(10**9, (0.5, 0.25, 0.25))])
    ids = order(np.arange(10**10, 10**10 + 4096))
    assert len(np.unique(ids)) == 4096
    assert sum(order.consumed(10**10)) == 10**10
    assert order.epochs(10**10) == [count / size for count, size in zip(order.consumed(10**10), windows, strict=True)]


def test_windows_of_several_sources_are_read_from_each(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    parts = [Windows(stream_of(tmp_path / name, tokens), 4, 4) for name, tokens in (("a", 41), ("b", 21))]
    mixed = MixedWindows(parts)
    assert (len(mixed), mixed.seq_len) == (15, 4)
    rows = mixed.gather(np.array([14, 0, 10, 9]))
    assert rows.tolist() == [[16, 17, 18, 19, 20], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [36, 37, 38, 39, 40]]
    assert mixed.gather(np.empty(0, np.int64)).shape == (0, 5)


@pytest.mark.parametrize("is_mapped", [True, False])
def test_sources_of_other_widths_are_read_as_wide_as_the_widest_and_a_wrong_id_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mapped: bool
) -> None:
    if not is_mapped:
        monkeypatch.setattr(reading, "MAPPED_BYTES", 0)
    parts = []
    for dtype, wrong in (("uint16", 0), ("uint32", 1)):
        folder = tmp_path / dtype
        folder.mkdir()
        writer = ShardWriter(folder, "train", dtype, shard_tokens=7)
        writer.append(np.arange(41) + 50 * wrong, np.array([41]), 41)
        parts.append(Windows(TokenStream(folder, writer.close(), dtype, 90), 4, 4))
    mixed = MixedWindows(parts)
    rows = mixed.gather(np.array([11, 0, 1]))
    assert rows.tolist() == [[54, 55, 56, 57, 58], [0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert rows.dtype == torch.uint32
    with pytest.raises(CorruptError, match=r"uint32/train-00005\.bin: .*90"):
        mixed.gather(np.array([3, 19]))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_samples_of_a_mixed_step_do_not_depend_on_ranks(tmp_path: Path, world_size: int) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    windows = MixedWindows([Windows(stream_of(folder, 300), 10, 10) for folder in folders])
    order = MixedOrder([29, 29], 5, [Stage(0, (3.0, 1.0))])

    def steps(world: int, rank: int) -> list[list[list[int]]]:
        layout = Layout(len(windows), 8, 8 // world, rank, world)
        stream = itertools.islice(batches(windows, layout, order, position=0), 30)
        return [torch.cat([tokens for tokens, _ in batch.micro_batches()]).tolist() for batch in stream]

    ranks = [steps(world_size, rank) for rank in range(world_size)]
    assert [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)] == steps(1, 0)
