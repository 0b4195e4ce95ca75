"""Mixtures: which source each position takes its sample from, as a pure function of the weights, in O(1).

Weights become whole numbers, and these a cycle of as many positions as they add up to, in which every source has as
many as its number says. Where in the cycle is the one-processor case of P-fair scheduling (Baruah, Cohen, Plaxton
and Varvel 1996, "Proportionate progress"; before it Tijdeman 1980, "The chairman assignment problem"): after any number
of positions every source has had its share to within less than one sample. (Any window, wherever it begins, is then
within less than two; for most weights of three sources or more, no order at all stays within one.)

Where the weights change, a new stage begins: a new cycle, and every source goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush, heappushpop
from itertools import islice
from math import gcd, lcm

import numpy as np
import torch

from llmtrain.data.batches import Windows, WindowSet
from llmtrain.data.order import Int64s, sample_ids, seed_of_source

LONGEST_CYCLE = 100_000  # positions; finer weights are rounded to this many parts
FIRST_PLACES = 2048  # of a cycle that are laid out at first, within a millisecond

Weights = tuple[float, ...]  # one for each source, ≥ 0


@dataclass(frozen=True)
class Stage:
    """From position `begin` on, samples come by `weights`."""

    begin: int
    weights: Weights


class MixedWindows:
    """The windows of several sources, numbered source after source."""

    def __init__(self, sources: Sequence[Windows]):
        self.sources = tuple(sources)
        self.seq_len = sources[0].seq_len
        self._first = np.cumsum([0, *map(len, sources)])
        self._strides = np.array([windows.stride for windows in sources])
        self._dtype = np.result_type(*(windows.stream.dtype for windows in sources))

    def __len__(self) -> int:
        return int(self._first[-1])

    def gather(self, ids: Int64s) -> torch.Tensor:
        """Read windows `ids` as (len(ids), seq_len + 1) tokens; row[1:] are the targets."""
        rows = np.empty((len(ids), self.seq_len + 1), self._dtype)
        source_of = np.searchsorted(self._first, ids, "right") - 1
        starts = (ids - self._first[source_of]) * self._strides[source_of]
        for source in np.unique(source_of).tolist():
            its = np.flatnonzero(source_of == source)
            rows[its] = self.sources[source].stream.gather(starts[its], self.seq_len + 1)  # narrower ids are widened
        return torch.from_numpy(rows)


def samples_per_epoch(windows: WindowSet, global_batch: int) -> int:
    """How many samples the run counts as an epoch: all windows, and in a mixture up to a whole batch.

    A batch is cut short at the end of an epoch so that each window comes once in it, which a mixture does not promise.
    """
    samples = len(windows)
    return -(-samples // global_batch) * global_batch if isinstance(windows, MixedWindows) else samples


class MixedOrder:
    """Maps positions to the window ids of `MixedWindows`."""

    def __init__(self, windows: Sequence[int], seed: int, stages: Sequence[Stage]):
        """Prepare the cycle of each stage.

        Args:
            windows: of each source.
            seed: of the run; every source has an order of its own, the first that of a run on it alone.
            stages: the first begins at 0, each next one later.
        """
        self._windows = tuple(windows)
        self._seeds = [seed_of_source(seed, source) for source in range(len(windows))]
        self._first = np.cumsum([0, *windows])
        self._begins = np.array([stage.begin for stage in stages], dtype=np.int64)
        self._cycles = [_Cycle(whole_numbers(stage.weights)) for stage in stages]
        self._before = {0: np.zeros(len(windows), dtype=np.int64)}  # see `_consumed_before`

    def __call__(self, positions: Int64s) -> Int64s:
        """Map (n,) positions ≥ 0 to (n,) window ids."""
        ids = np.empty_like(positions)
        stage_of = np.searchsorted(self._begins, positions, "right") - 1
        for stage in np.unique(stage_of).tolist():
            here = np.flatnonzero(stage_of == stage)
            source_of, index = self._cycles[stage].locate(positions[here] - self._begins[stage])
            for source in np.unique(source_of).tolist():
                of_source = source_of == source
                own = index[of_source] + self._consumed_before(stage)[source]
                windows = sample_ids(own, self._windows[source], self._seeds[source])
                ids[here[of_source]] = windows + self._first[source]
        return ids

    def _consumed_before(self, stage: int) -> Int64s:
        """How many samples of each source come before a stage: known once the run is there."""
        if stage not in self._before:
            length = int(self._begins[stage] - self._begins[stage - 1])
            self._before[stage] = self._consumed_before(stage - 1) + self._cycles[stage - 1].consumed(length)
        return self._before[stage]

    @property
    def sources(self) -> int:
        """How many there are."""
        return len(self._windows)

    def sources_of(self, positions: Int64s) -> Int64s:
        """Map (n,) positions ≥ 0 to the (n,) sources that their samples are of."""
        sources = np.empty_like(positions)
        stage_of = np.searchsorted(self._begins, positions, "right") - 1
        for stage in np.unique(stage_of).tolist():
            here = stage_of == stage
            sources[here], _ = self._cycles[stage].locate(positions[here] - self._begins[stage])
        return sources

    def consumed(self, position: int) -> list[int]:
        """How many samples of each source come before `position`."""
        stage = int(np.searchsorted(self._begins, position, "right")) - 1
        taken = self._cycles[stage].consumed(position - int(self._begins[stage]))
        total: list[int] = (self._consumed_before(stage) + taken).tolist()
        return total

    def epochs(self, position: int) -> list[float]:
        """How often each source has been gone through before `position`."""
        return [count / windows for count, windows in zip(self.consumed(position), self._windows, strict=True)]


class _Cycle:
    """The order of sources that repeats: source s has `counts[s]` of sum(counts) positions.

    It is laid out as far as it was asked for: all 100,000 positions of the longest take tens of milliseconds.
    """

    def __init__(self, counts: Sequence[int]):
        self._counts = np.array(counts, dtype=np.int64)
        self._total = sum(counts)
        self._laid = (np.empty(0, np.int64), np.empty(0, np.int64))  # of each place, see `fair_order`

    def _lay(self, places: int) -> tuple[Int64s, Int64s]:
        """The first `places` at least; two threads that ask at once do the same work and get the same."""
        laid = self._laid
        if len(laid[0]) < places:
            wanted = max(places, 2 * len(laid[0]), FIRST_PLACES)
            self._laid = laid = fair_order(self._counts.tolist(), min(wanted, self._total))
        return laid

    def locate(self, offsets: Int64s) -> tuple[Int64s, Int64s]:
        """The (n,) sources of (n,) offsets, and the index of each sample within its source."""
        cycles, places = np.divmod(offsets, self._total)
        sources, before = self._lay(int(places.max(initial=-1)) + 1)
        source_of = sources[places]
        return source_of, cycles * self._counts[source_of] + before[places]

    def consumed(self, offset: int) -> Int64s:
        """The (sources,) numbers of samples before `offset`."""
        cycles, place = divmod(offset, self._total)
        sources, _ = self._lay(place)
        return cycles * self._counts + np.bincount(sources[:place], minlength=len(self._counts))


def fair_order(counts: Sequence[int], places: int) -> tuple[Int64s, Int64s]:
    """Lay out `counts[s]` samples of each source s so that every beginning has its share to within less than one.

    The j-th sample of a source may not come before slot floor(j × N / count), and must come before slot
    ceil((j + 1) × N / count). Taking the one that is due first, out of those that may come, keeps all these bounds.

    Returns:
        of each of the first `places` slots the source, and how many of the source come before: j.
    """
    total, sources = sum(counts), len(counts)
    may_come, keys = list[Int64s](), list[Int64s]()  # a key has both: when it is due, and of equal ones the source
    begun = np.zeros(places, np.int64)  # how many may come from each slot on
    for source, count in enumerate(counts):
        if count:
            steps = np.arange(-(-places * count // total) + 1) * total
            slots, due = steps[:-1] // count, -(steps[1:] // -count)
            begun[slots] += 1  # of one source no two may come from the same slot on
            may_come.append(slots)
            keys.append(due * sources + source)
    by_slot = np.empty(int(begun.sum()), np.int64)
    free = np.cumsum(begun) - begun
    for slots, its_keys in zip(may_come, keys, strict=True):
        by_slot[free[slots]] = its_keys
        free[slots] += 1
    due, source_of = np.divmod(_earliest_due(by_slot.tolist(), begun.tolist()), sources)
    return source_of, due * np.array(counts)[source_of] // total - 1


def _earliest_due(keys: Sequence[int], begun: Sequence[int]) -> Int64s:
    """For each slot the smallest key that is left, when `begun[slot]` more of them have joined."""
    coming, ready, taken = iter(keys), list[int](), list[int]()
    for count in begun:
        if count == 1:
            taken.append(heappushpop(ready, next(coming)))
        else:
            for key in islice(coming, count):
                heappush(ready, key)
            taken.append(heappop(ready))
    return np.array(taken, np.int64)


def whole_numbers(weights: Weights) -> list[int]:
    """The smallest whole numbers in the proportion of the weights as they are written (0.1 is a tenth).

    Where they add up to more than `LONGEST_CYCLE`, they are rounded to parts of that: the largest remainders up, and no
    weight to nothing.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    denominator = lcm(*(share.denominator for share in exact))
    counts = [int(share * denominator) for share in exact]
    divisor = gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= LONGEST_CYCLE:
        return counts
    rounded = [max(count > 0, count * LONGEST_CYCLE // total) for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda source: -(counts[source] * LONGEST_CYCLE % total))
    for source in by_remainder[: max(0, LONGEST_CYCLE - sum(rounded))]:
        rounded[source] += 1
    return rounded


def plan_stages(
    past: Sequence[Stage], weights_from: Mapping[int, Weights], step: int, position: int, after: Callable[[int], int]
) -> list[Stage]:
    """Lay out the stages of a run that is at `step` and `position`: what was stays, what comes is as the config says.

    Args:
        past: the stages that the run had planned when it was saved; empty for a new run.
        weights_from: weights by the number of steps after which they hold; 0 is one of them.
        step: optimizer steps done.
        position: samples consumed in them.
        after: gives the position after so many more steps.
    """
    stages = [stage for stage in past if stage.begin <= position]
    now = weights_from[max(at for at in weights_from if at <= step)]
    if stages and stages[-1].begin == position:
        stages.pop()
    if not stages or stages[-1].weights != now:
        stages.append(Stage(position, now))
    coming = sorted(at for at in weights_from if at > step)
    return stages + [Stage(after(at - step), weights_from[at]) for at in coming]
