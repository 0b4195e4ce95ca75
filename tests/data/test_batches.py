"""Windows, batches and the sampler: counts, targets, shares of ranks, padding, and starting anywhere."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from llmtrain.data import batches as batches_module
from llmtrain.data.batches import (
    Layout,
    ResumableDistributedSampler,
    Windows,
    batches,
    in_groups,
    inputs_and_targets,
    plain_order,
    validation_batches,
)
from llmtrain.data.order import Int64s
from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import TokenStream
from llmtrain.errors import CorruptError
from llmtrain.model.loss import IGNORE_INDEX

CPU = torch.device("cpu")


def stream_of(folder: Path, tokens: int, shard_tokens: int = 7) -> TokenStream:
    """A stream of the ids 0, 1, 2, … so that every token names its own position."""
    writer = ShardWriter(folder, "train", "uint16", shard_tokens)
    writer.append(np.arange(tokens), np.array([tokens]), tokens)
    return TokenStream(folder, writer.close(), "uint16", max(1, tokens))


@pytest.mark.parametrize(("tokens", "length", "stride", "windows"), [
    (12, 4, 4, 2), (13, 4, 4, 3), (4, 4, 4, 0), (5, 4, 4, 1), (12, 4, 1, 8), (12, 4, 3, 3), (13, 4, 8, 2),
])  # fmt: skip
def test_number_of_windows(tmp_path: Path, tokens: int, length: int, stride: int, windows: int) -> None:
    assert len(Windows(stream_of(tmp_path, tokens), length, stride)) == windows


@given(tokens=st.integers(2, 60), length=st.integers(1, 12), stride=st.integers(1, 15), shard=st.integers(1, 20))
def test_targets_are_the_next_tokens_also_across_shards(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, stride: int, shard: int
) -> None:
    windows = Windows(stream_of(tmp_path_factory.mktemp("w"), tokens, shard), length, stride)
    rows = windows.gather(np.arange(len(windows)))
    inputs, targets = inputs_and_targets(rows, len(windows), CPU)
    assert torch.equal(targets, inputs + 1)
    assert inputs[:, 0].tolist() == [i * stride for i in range(len(windows))]


def test_without_overlap_every_token_is_a_target_once(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path, 101), 10, 10)
    _, targets = inputs_and_targets(windows.gather(np.arange(10)), 10, CPU)
    assert sorted(targets.flatten().tolist()) == list(range(1, 101))


layouts = st.builds(
    lambda windows, micro, accumulation, world: Layout(windows, micro * accumulation * world, micro, 0, world),
    st.integers(1, 200), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4),
)  # fmt: skip


def positions_of_epoch(layout: Layout, begin: int = 0) -> list[list[int]]:
    """For each step until the epoch's end, the positions all ranks take together, in order of micro-step and rank."""
    steps = []
    position, end = begin, (begin // layout.windows + 1) * layout.windows
    while position < end:
        ranks = [
            Layout(layout.windows, layout.global_batch, layout.micro_batch, rank, layout.world_size).rank_positions(
                position
            )
            for rank in range(layout.world_size)
        ]
        assert len({len(micro) for micro in ranks}) == 1  # every rank has as many micro-steps
        together = [micro[j] for j in range(len(ranks[0])) for micro in ranks]
        steps.append(np.concatenate(together).tolist())
        position = layout.end_of_batch(position)
    return steps


@given(layout=layouts, epoch=st.integers(0, 3))
def test_an_epoch_is_whole_whatever_the_number_of_ranks(layout: Layout, epoch: int) -> None:
    begin = epoch * layout.windows
    steps = positions_of_epoch(layout, begin)
    assert len(steps) == layout.steps_per_epoch()
    assert list(itertools.chain(*steps)) == list(range(begin, begin + layout.windows))


@given(layout=layouts, done=st.integers(0, 500), more=st.integers(0, 500))
def test_steps_to_counts_what_the_loop_will_do(layout: Layout, done: int, more: int) -> None:
    position = 0
    while position < done:
        position = layout.end_of_batch(position)
    end, steps, here = position + more, 0, position
    while here < end:
        here, steps = layout.end_of_batch(here), steps + 1
    # A target inside an epoch ends in the middle of a batch; counting may not differ for it.
    assert layout.steps_to(position, end) == steps


def consumed(windows: Windows, layout: Layout, position: int, steps: int, workers: int = 0) -> list[list[int]]:
    """The first token of every sample of each step, which with an identity stream names the sample."""
    stream = batches(windows, layout, plain_order(len(windows), 5), position=position, workers=workers)
    return [
        [int(row[0]) for tokens, _ in batch.micro_batches() for row in tokens]
        for batch in itertools.islice(stream, steps)
    ]


def test_starting_at_any_position_gives_what_would_have_come(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path, 1000), 10, 10)
    layout = Layout(len(windows), 8, 4)
    whole = consumed(windows, layout, 0, 40)
    position = 0
    for step in range(40):
        assert consumed(windows, layout, position, 1)[0] == whole[step]
        position = layout.end_of_batch(position)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_samples_of_a_step_do_not_depend_on_ranks(tmp_path: Path, world_size: int) -> None:
    windows = Windows(stream_of(tmp_path, 1000), 10, 10)
    alone = consumed(windows, Layout(len(windows), 8, 8), 0, 30)
    ranks = [consumed(windows, Layout(len(windows), 8, 2, rank, world_size), 0, 30) for rank in range(world_size)]
    for step in range(30):
        assert sorted(alone[step]) == sorted(itertools.chain(*(rank[step] for rank in ranks)))


class Calls:
    """Windows that take note of how many are asked for in a call."""

    def __init__(self, windows: Windows):
        self.windows, self.seq_len, self.asked = windows, windows.seq_len, list[int]()

    def __len__(self) -> int:
        return len(self.windows)

    def gather(self, ids: Int64s) -> torch.Tensor:
        self.asked.append(len(ids))
        return self.windows.gather(ids)


@pytest.mark.parametrize("as_int64", [False, True])
def test_several_micro_batches_are_read_in_one_call_and_are_those_of_single_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_int64: bool
) -> None:
    windows = Calls(Windows(stream_of(tmp_path, 1000), 10, 10))
    monkeypatch.setattr(batches_module, "_GROUP_S", 60.0)  # however busy the machine is
    monkeypatch.setattr(batches_module, "_GROUP_BYTES", 600)  # 6 micro-batches of 44 ids
    ids = [np.arange(4) + start for start in range(40)] + [np.arange(0)]
    found = list(in_groups(windows, iter(ids), as_int64))
    assert windows.asked == [4, 8, 16, *[24] * 5, 12]
    for tokens, these in zip(found, ids, strict=True):
        alone = windows.windows.gather(these)
        assert torch.equal(tokens, alone.long() if as_int64 else alone)
        assert tokens.dtype == (torch.int64 if as_int64 else torch.uint16)
        for inputs, other in zip(inputs_and_targets(tokens, 5, CPU), inputs_and_targets(alone, 5, CPU), strict=True):
            assert torch.equal(inputs, other)


def test_where_reading_takes_long_every_micro_batch_is_waited_for_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = Calls(Windows(stream_of(tmp_path, 1000), 10, 10))
    monkeypatch.setattr(batches_module, "_GROUP_S", 0.0)
    list(in_groups(windows, iter([np.arange(4)] * 5)))
    assert windows.asked == [4] * 5


def test_what_cannot_be_read_is_told_when_it_is_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_GROUP_S", 60.0)
    windows = Windows(stream_of(tmp_path, 1000, shard_tokens=1000), 10, 10)
    ids = np.memmap(tmp_path / "train-00000.bin", "<u2", "r+")
    ids[12 * 10 + 5] = 1000
    stream = in_groups(windows, iter([np.array([window]) for window in range(20)]))
    assert [int(next(stream)[0, 0]) for _ in range(12)] == [int(ids[10 * window]) for window in range(12)]
    with pytest.raises(CorruptError, match=f"token id 1000 at position {12 * 10 + 5}"):
        next(stream)


@pytest.mark.slow
def test_workers_deliver_the_same(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path, 1000), 10, 10)
    layout = Layout(len(windows), 8, 4)
    assert consumed(windows, layout, 16, 20, workers=2) == consumed(windows, layout, 16, 20)


ENDS_WITH_WORKERS = """
import pathlib, sys
from tests.data.test_batches import *
windows = Windows(stream_of(pathlib.Path(sys.argv[1]), 1000), 10, 10)
stream = batches(windows, Layout(len(windows), 8, 4), plain_order(len(windows), 5), position=0, workers=2)
for batch in stream:
    next(batch.micro_batches())
    raise RuntimeError("a bug of ours")
"""


@pytest.mark.slow
def test_a_process_that_ends_by_an_error_does_not_wait_for_its_workers(tmp_path: Path) -> None:
    """They do not obey the signal by which they are ended at the exit, and what has failed still holds them."""
    command = [sys.executable, "-c", ENDS_WITH_WORKERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: a bug of ours\n")


def children() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_same_one_line_as_without(tmp_path: Path) -> None:
    before = children()
    windows = Windows(stream_of(tmp_path, 1000, shard_tokens=1000), 10, 10)
    np.full(1000, 1000, "<u2").tofile(tmp_path / "train-00000.bin")
    for workers in (0, 2):
        with pytest.raises(CorruptError) as error:
            consumed(windows, Layout(len(windows), 8, 4), 0, 1, workers=workers)
        assert str(error.value).startswith(f"{tmp_path / 'train-00000.bin'}: token id 1000 at position ")
        assert "\n" not in str(error.value)
        assert not children() - before, "what the error holds is done with"


@pytest.mark.slow
def test_workers_end_with_what_reads_from_them_also_in_a_cycle_of_garbage(tmp_path: Path) -> None:
    """Torch tells them by queues that the collector has closed by then; what it tries next they do not obey."""
    before = children()
    windows = Windows(stream_of(tmp_path, 1000, shard_tokens=1000), 10, 10)
    for in_a_cycle in (False, True):
        stream = batches(windows, Layout(len(windows), 8, 4), plain_order(len(windows), 5), position=0, workers=2)
        held: list[object] = [next(next(stream).micro_batches()), stream]
        assert len(children() - before) == 2
        if in_a_cycle:
            held.append(held)
        del stream, held
        gc.collect()
        assert not children() - before


def test_the_sampler_is_a_distributed_sampler_that_starts_anywhere(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path, 1000), 10, 10)
    sampler = ResumableDistributedSampler(
        windows, Layout(len(windows), 4, 4), plain_order(len(windows), 1), position=10**12
    )
    assert isinstance(sampler, DistributedSampler)
    assert len(next(iter(sampler))) in range(1, 5)
    with pytest.raises(TypeError, match="endless"):
        len(sampler)


def test_a_short_batch_is_padded_without_targets(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path, 60), 10, 10)
    inputs, targets = inputs_and_targets(windows.gather(np.arange(2)), 5, CPU)
    assert inputs.shape == targets.shape == (5, 10)
    assert (targets[2:] == IGNORE_INDEX).all()
    assert (targets[:2] != IGNORE_INDEX).all()
    assert (inputs[2:] == 0).all()
    inputs, targets = inputs_and_targets(windows.gather(np.arange(0)), 3, CPU)
    assert (targets == IGNORE_INDEX).all()


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, list(range(25))), (5, [0, 5, 10, 15, 20]), (99, list(range(25)))]
)
def test_validation_sees_all_windows_or_evenly_spread_ones(
    tmp_path: Path, limit: int | None, expected: list[int]
) -> None:
    windows = Windows(stream_of(tmp_path, 251), 10, 10)
    for world_size in (1, 2, 3):
        per_rank = [
            list(validation_batches(windows, Layout(25, 4, 4, rank, world_size), limit)) for rank in range(world_size)
        ]
        assert len({len(rank) for rank in per_rank}) == 1
        seen = sorted(int(row[0]) // 10 for rank in per_rank for tokens in rank for row in tokens)
        assert seen == expected


@pytest.mark.parametrize(
    "left_out", [((0, 8),), ((16, 40), (48, 56)), ((90, 110),), ((16, 40), (24, 32), (40, 100)), ((96, 104),)]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_left_out_is_in_no_batch_and_everything_else_is(
    left_out: tuple[tuple[int, int], ...], world_size: int
) -> None:
    """From any batch on, and counted right: 100 windows in batches of 8, three epochs."""
    layouts = [Layout(100, 8, 2, rank, world_size, left_out) for rank in range(world_size)]
    outside = [p for p in range(300) if not any(begin <= p < end for begin, end in left_out)]
    position, seen, steps = layouts[0].begin_of_batch(0), [], 0
    while position < 300:
        assert layouts[0].steps_to(position, 300) == layouts[0].steps_to(0, 300) - steps
        assert layouts[0].position_after(0, steps) == position
        seen += sorted(int(p) for layout in layouts for micro in layout.rank_positions(position) for p in micro)
        steps += 1
        position = layouts[0].begin_of_batch(layouts[0].end_of_batch(position))
    assert seen == outside and steps == layouts[0].steps_to(0, 300)
