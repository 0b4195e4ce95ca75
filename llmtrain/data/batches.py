"""From sample ids to batches: windows over a token stream, the resumable DistributedSampler, and the loader.

Positions count samples from the start of the run, over all epochs. A global batch is the next `global_batch_size`
positions, cut short at the end of an epoch, so that an epoch is whole and every window comes exactly once in it.
Within a batch, micro-step j of rank r takes the rows [(j × world + r) × micro, …): which samples make a step does not
depend on the number of ranks. A short batch is padded to full shape with rows that have no targets, so shapes never
change and no rank is left out of a collective.
"""

from __future__ import annotations

import atexit
import signal
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from llmtrain.data.order import Int64s, sample_ids
from llmtrain.data.packed import PackedWindows
from llmtrain.data.shards import TokenStream
from llmtrain.errors import LlmtrainError
from llmtrain.health.signals import STOP_SIGNALS
from llmtrain.model.loss import IGNORE_INDEX

_BLOCK = 1 << 14  # positions ordered at once: numpy's cost per call is spread over many batches
_FIRST_BLOCK = 1 << 10  # at first, so that the first batch does not wait for all of these
_GROUP_BYTES, _GROUP_S = 1 << 18, 1e-3  # at most this of ids, as they are stored, in one call, and in so much time
Tokens_BS = torch.Tensor
Order = Callable[[Int64s], Int64s]  # from positions to window ids


class WindowSet(Protocol):
    """Numbered windows of equal length."""

    @property
    def seq_len(self) -> int:
        """Inputs of one window, and targets."""

    def __len__(self) -> int: ...

    def gather(self, ids: Int64s) -> Tokens_BS:
        """Read windows `ids` as (len(ids), seq_len + 1) tokens in the stored dtype; row[1:] are the targets."""


@dataclass(frozen=True)
class Windows:
    """Cuts a stream into windows of `seq_len` inputs and as many targets (the next token of each), `stride` apart."""

    stream: TokenStream
    seq_len: int
    stride: int

    def __len__(self) -> int:
        return max(0, (len(self.stream) - 1 - self.seq_len) // self.stride + 1)

    def gather(self, ids: Int64s) -> Tokens_BS:
        """Read windows by their ids, see `WindowSet`."""
        return torch.from_numpy(self.stream.gather(ids * self.stride, self.seq_len + 1))


def plain_order(windows: int, seed: int) -> Order:
    """All windows in each epoch, each epoch in an order of its own."""
    return partial(sample_ids, windows=windows, seed=seed)


@dataclass(frozen=True)
class Layout:
    """How positions become batches: a pure function of these numbers."""

    windows: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    left_out: tuple[tuple[int, int], ...] = ()  # stretches (from, to before) that no batch has samples of, ascending

    def begin_of_batch(self, position: int) -> int:
        """Where the next batch begins once `position` samples are behind us: here, or after a stretch left out."""
        for begin, end in self.left_out:
            if begin <= position < end:
                position = end
        return position

    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return -(-self.windows // self.global_batch)

    def end_of_batch(self, position: int) -> int:
        """Position after the global batch that begins at `position`."""
        return min(position + self.global_batch, self._end_of_stretch(position))

    def _end_of_stretch(self, position: int) -> int:
        """Position at which a batch is cut short: the end of the epoch, or the begin of what is left out."""
        end = (position // self.windows + 1) * self.windows
        return min([end, *(b for b, _ in self.left_out if b > position)]) if self.left_out else end

    def steps_to(self, position: int, end: int) -> int:
        """Optimizer steps from `position` until `end` or more samples are behind us."""
        steps = 0
        for begin, after in self.left_out:
            if begin < end and after > position:
                steps += self._steps_between(position, max(begin, position))
                position = after
        return steps + self._steps_between(position, end)

    def _steps_between(self, position: int, end: int) -> int:
        steps = 0
        if position % self.windows and position < end:  # the rest of a running epoch
            epoch_end = min(end, (position // self.windows + 1) * self.windows)
            steps, position = -(-(epoch_end - position) // self.global_batch), epoch_end
        epochs, rest = divmod(max(0, end - position), self.windows)
        return steps + epochs * self.steps_per_epoch() + -(-rest // self.global_batch)

    def position_after(self, position: int, steps: int) -> int:
        """Where the batch begins that follows `steps` optimizer steps from `position` on."""
        farthest = position + steps * self.global_batch + sum(end - begin for begin, end in self.left_out)
        taken = bisect_right(range(position, farthest + 1), steps, key=lambda end: self.steps_to(position, end))
        return self.begin_of_batch(position + taken - 1)

    def micro_steps(self, begin: int, end: int) -> int:
        """Micro-steps of the batch between these positions: the same on every rank."""
        return -(-(end - begin) // (self.micro_batch * self.world_size))

    def rank_positions(self, position: int) -> list[Int64s]:
        """For each micro-step of the batch at `position`, the positions this rank takes (fewer in a short batch)."""
        end = self.end_of_batch(position)
        stride = self.micro_batch * self.world_size
        first = position + self.rank * self.micro_batch
        starts = range(first, first + self.micro_steps(position, end) * stride, stride)
        return [np.arange(start, max(start, min(start + self.micro_batch, end)), dtype=np.int64) for start in starts]

    def rows_ahead(self, position: int, wanted: int) -> tuple[list[Int64s], int]:
        """The `rank_positions` of the next batches, and the position after them.

        So many batches that they have `wanted` positions or just more; fewer where one is cut short before, and at
        least one.
        """
        share = self.micro_batch * self.world_size
        whole = (self._end_of_stretch(position) - position) // self.global_batch
        if not whole or self.global_batch % share:
            return self.rank_positions(position), self.end_of_batch(position)
        after = position + min(whole, -(-wanted * self.world_size // self.global_batch)) * self.global_batch
        first = np.arange(position + self.rank * self.micro_batch, after, share, dtype=np.int64)
        return list(first[:, None] + np.arange(self.micro_batch)), after


class ResumableDistributedSampler(DistributedSampler[Any]):
    """Yields this rank's window ids, one micro-batch at a time, endlessly, from any position in O(1).

    Unlike its base class it holds no permutation, needs no `set_epoch` and never repeats samples to even out ranks.
    """

    def __init__(self, windows: WindowSet, layout: Layout, order: Order, position: int = 0):
        super().__init__(windows, num_replicas=layout.world_size, rank=layout.rank)  # type: ignore[arg-type]
        self.layout = layout
        self.order = order
        self.position = position

    def __iter__(self) -> Iterator[Int64s]:
        position, block = self.layout.begin_of_batch(self.position), _FIRST_BLOCK
        while True:
            micro_batches: list[Int64s] = []
            wanted = 0
            while wanted < block:
                rows, position = self.layout.rows_ahead(position, block - wanted)
                micro_batches += rows
                wanted += max(1, sum(map(len, rows)))
                position = self.layout.begin_of_batch(position)
            ids, begin = self.order(np.concatenate(micro_batches)), 0
            for micro_batch in micro_batches:
                yield ids[begin : begin + len(micro_batch)]
                begin += len(micro_batch)
            block = min(4 * block, _BLOCK)

    def __len__(self) -> int:
        raise TypeError("the sampler is endless; the loop decides when to stop")


@dataclass(slots=True)  # a frozen one takes four times as long to make, and there is one for each step
class Batch:
    """One optimizer step's share of this rank."""

    layout: Layout
    begin: int  # position of the first sample of the global batch
    end: int  # position after the last one
    target_count: int  # target tokens in the global batch, over all ranks
    padding: int | None  # of packed windows: the id that they are padded with
    order: Order
    _loader: Iterator[Tokens_BS]

    @property
    def epoch(self) -> int:
        """The epoch all its samples are from."""
        return self.begin // self.layout.windows

    def micro_batches(self) -> Iterator[tuple[Tokens_BS, bool]]:
        """Yield ((micro_batch or fewer, seq_len + 1) tokens, whether it is the last of the step)."""
        micro_steps = self.layout.micro_steps(self.begin, self.end)
        for index in range(micro_steps):
            yield next(self._loader), index == micro_steps - 1


Reading = Callable[[Iterator[Tokens_BS]], Iterator[Tokens_BS]]


class _MapStyle(Dataset[Tokens_BS | LlmtrainError]):
    """What DataLoader workers run: one gather for a whole micro-batch of ids.

    An error that we foresaw is returned: raised in a worker, it would reach the parent with the worker's traceback in
    the place of its one line.
    """

    def __init__(self, windows: WindowSet):
        self._windows = windows

    def __getitem__(self, ids: Int64s) -> Tokens_BS | LlmtrainError:
        try:
            return self._windows.gather(ids)
        except LlmtrainError as error:
            return error


def _leave_stopping_to_the_parent(_worker: int) -> None:
    """A scheduler signals all processes of a job; a worker that obeyed would end the run before it has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_loaders = set[Any]()  # that have workers


@atexit.register
def _end_workers() -> None:
    """Of loaders that an error still holds: what multiprocessing does next is to wait for them after such a signal."""
    for loader in list(_loaders):  # some may end meanwhile
        loader._shutdown_workers()


def _from_workers(windows: WindowSet, sampler: ResumableDistributedSampler, workers: int) -> Iterator[Tokens_BS]:
    """Yield what is gathered in other processes; they end with this generator.

    They are told to by queues, which would be closed already where a loader is found in a cycle of garbage; so it is
    never in one.
    """
    # batch_size=None: the sampler's items are whole micro-batches already.
    pinned = torch.cuda.is_available()
    items: Any = iter(
        DataLoader(
            _MapStyle(windows),
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            pin_memory=pinned,
            worker_init_fn=_leave_stopping_to_the_parent,
        )
    )
    loaders = _loaders  # at the exit the module may be empty before
    loaders.add(items)
    try:
        for item in items:
            if isinstance(item, LlmtrainError):
                raise item
            yield item
    finally:
        items._shutdown_workers()
        loaders.discard(items)


def batches(
    windows: WindowSet,
    layout: Layout,
    order: Order,
    *,
    position: int,
    workers: int = 0,
    reading: Reading = iter,
    as_int64: bool = False,
) -> Iterator[Batch]:
    """Yield the batches from `position` on, endlessly; `reading` goes through the micro-batches and may take note.

    `as_int64`: widen ids where that is cheapest, several micro-batches at once; packed ones, and those of workers, come
    as they are stored all the same.

    Mapped files are gathered in this process: it takes microseconds, where sending a micro-batch from a worker takes
    hundreds. `workers > 0` moves the reading into that many processes, for storage that stalls.
    """
    sampler = ResumableDistributedSampler(windows, layout, order, position)
    as_int64 &= not isinstance(windows, PackedWindows)  # of which inputs and targets are made one by one
    loader = reading(
        _from_workers(windows, sampler, workers) if workers else in_groups(windows, iter(sampler), as_int64)
    )
    counts, padding = None, None
    if isinstance(windows, PackedWindows):
        counts, padding = _target_counts(windows, layout, order, position), windows.padding
    while True:
        position = layout.begin_of_batch(position)
        end = layout.end_of_batch(position)
        targets = next(counts) if counts else (end - position) * windows.seq_len
        yield Batch(layout, position, end, targets, padding, order, loader)
        position = end


def in_groups(windows: WindowSet, ids: Iterator[Int64s], as_int64: bool = False) -> Iterator[Tokens_BS]:
    """Yield the windows of each array of ids, of several in one call: it costs as much as copying some kilobytes.

    Only where reading is quick, or they would all wait for what one could have waited for while another is computed.
    What cannot be read is told when it is its turn.
    """
    at_once = 1
    while group := list(islice(ids, at_once)):
        began = time.perf_counter()
        try:
            rows = windows.gather(np.concatenate(group))
        except LlmtrainError:
            yield from map(windows.gather, group)
            continue
        each_s = (time.perf_counter() - began) / len(group)
        each_bytes = rows.element_size() * rows.shape[1] * max(1, *map(len, group))
        if as_int64:
            rows = torch.from_numpy(rows.numpy().astype(np.int64))
        yield from torch.split(rows, [len(these) for these in group])
        at_once = max(1, int(min(_GROUP_BYTES / each_bytes, _GROUP_S / each_s, 2 * at_once)))


def _target_counts(windows: PackedWindows, layout: Layout, order: Order, position: int) -> Iterator[int]:
    """Targets of each batch from `position` on: every rank counts those of all ranks, so none has to ask.

    For many batches at once, as the records of few windows take as long to read as those of many.
    """
    whole = replace(layout, micro_batch=layout.global_batch, rank=0, world_size=1)
    ids = iter(ResumableDistributedSampler(windows, whole, order, position))
    while batches_ids := list(islice(ids, -(-_FIRST_BLOCK // layout.global_batch))):
        firsts = np.cumsum([0, *map(len, batches_ids[:-1])])
        yield from np.add.reduceat(windows.count_targets(np.concatenate(batches_ids)), firsts).tolist()


def validation_batches(windows: WindowSet, layout: Layout, limit: int | None) -> Iterator[Tokens_BS]:
    """Yield this rank's micro-batches of the validation windows: all of them, or `limit` spread evenly over the split.

    Every rank yields equally many, empty ones included, so that collectives match.
    """
    return map(windows.gather, validation_ids(windows, layout, limit))


def validation_ids(windows: WindowSet, layout: Layout, limit: int | None) -> Iterator[Int64s]:
    """Yield the ids of the windows in each of `validation_batches`."""
    count = len(windows) if limit is None else min(limit, len(windows))
    per_step = layout.micro_batch * layout.world_size
    for begin in range(0, count, per_step):
        first = min(count, begin + layout.rank * layout.micro_batch)
        rows = np.arange(first, min(count, first + layout.micro_batch), dtype=np.int64)
        yield rows * len(windows) // max(1, count)


def inputs_and_targets(
    tokens: Tokens_BS, rows: int, device: torch.device, padding: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move a micro-batch to the device, unless it lies there, and widen it.

    Args:
        tokens: (n ≤ rows, seq_len + 1) in the stored dtype, or int64; n may be 0.
        rows: to pad to; the added rows have inputs 0 and no targets.
        device: where to.
        padding: of the run of this id that may end a row, only the first is a target; None: all are.

    Returns:
        (rows, seq_len) int64 inputs and (rows, seq_len) int64 targets.
    """
    if padding is None and tokens.dtype == torch.int64 and tokens.device == device:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
    elif device.type == "cpu":  # numpy's calls take half the time of torch's
        ids = tokens.numpy()
        if padding is None:
            wide = torch.from_numpy(ids.astype(np.int64))
            inputs, targets = wide[:, :-1], wide[:, 1:]
        else:
            target_ids = ids[:, 1:].astype(np.int64)
            for row, end in zip(target_ids, _ends_of_targets(ids, padding), strict=True):
                if end < len(row):  # of few, and it takes as long for nothing
                    row[end:] = IGNORE_INDEX
            inputs, targets = torch.from_numpy(ids[:, :-1].astype(np.int64)), torch.from_numpy(target_ids)
    else:
        wide = tokens.to(device).long()
        inputs, targets = wide[:, :-1], wide[:, 1:]
        if padding is not None:
            is_padding = (inputs == padding) & (targets == padding)
            is_run = is_padding.flip(1).cumprod(1).flip(1).bool()  # and all that follows is, too
            targets = targets.masked_fill(is_run, IGNORE_INDEX)
    missing = rows - tokens.shape[0]
    if missing:
        inputs = torch.nn.functional.pad(inputs, (0, 0, 0, missing))
        targets = torch.nn.functional.pad(targets, (0, 0, 0, missing), value=IGNORE_INDEX)
    return inputs, targets


def _ends_of_targets(rows: npt.NDArray[np.integer[Any]], padding: int) -> list[int]:
    """For each row of ids the number of its targets, which are row[1:] up to the first of the run that ends it."""
    width, is_other = rows.shape[1], (rows != padding).tobytes()
    return [max(is_other.rfind(1, at, at + width) + 1, at) - at for at in range(0, rows.size, width)]
