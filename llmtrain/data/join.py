"""The shards of all parts, copied into shards of the final size.

Stretches of the input that follow one another give token streams that follow one another, so nothing but the places
where shards end is different. Each final shard is a piece of work of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from llmtrain.data.encode import Encoded
from llmtrain.data.journal import JoinJournal
from llmtrain.data.progress_bar import Report
from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import ShardInfo, SplitInfo
from llmtrain.data.workers import ordered_map
from llmtrain.errors import UserError

# Keeps memory small, and is enough for a disk to be fast.
COPY_TOKENS = 1 << 22


def needed(encoded: list[Encoded], shard_tokens: int, whole: Collection[tuple[str, int]]) -> list[int]:
    """The indices of those parts of which something lies in a final shard that is not whole yet.

    Args:
        encoded: what each part wrote.
        shard_tokens: see `join_parts`.
        whole: split and number of each final shard that is.
    """
    found, begins = list[int](), Counter[str]()
    for index, part in enumerate(encoded):
        for name, split in part.splits.items():
            first, begins[name] = begins[name] // shard_tokens, begins[name] + split.tokens
            numbers = range(first, -(-begins[name] // shard_tokens) if split.tokens else first)
            if found[-1:] != [index] and any((name, number) not in whole for number in numbers):
                found.append(index)
    return found


def join_parts(
    parts: list[tuple[Path, Encoded]],
    dtype: Literal["uint16", "uint32"],
    *,
    folder: Path,
    journal: JoinJournal,
    shard_tokens: int,
    workers: int,
    report: Report,
) -> Encoded:
    """Copy the shards of parts, one part after another, into shards of `shard_tokens`; several processes write them.

    Args:
        parts: the folder of each part and what was written there.
        dtype: of the ids.
        folder: where the shards go.
        journal: of those that are whole, which are not written again.
        shard_tokens: tokens of each shard but the last of a split.
        workers: number of processes.
        report: is told of the bytes of ids copied.

    Raises:
        UserError: a shard cannot be read or written.
    """
    for folder_of_part, encoded in parts:
        if encoded.splits.keys() != parts[0][1].splits.keys():
            raise UserError(
                f"{folder_of_part}: has other splits than {parts[0][0]}; delete the wrong one and run it again"
            )
    sources = {name: list(_sources(name, parts)) for name in parts[0][1].splits}
    totals = {name: sum(source.tokens for source in sources[name]) for name in sources}
    counts = {name: max(1, -(-total // shard_tokens)) for name, total in totals.items()}
    shards = {(name, number): journal.whole.get((name, number)) for name in counts for number in range(counts[name])}
    report(sum(shard.ids.bytes for shard in shards.values() if shard))
    work = [place for place, shard in shards.items() if not shard]
    make_copier = partial(_ShardCopier, sources, dtype, folder, shard_tokens)
    for place, shard in zip(work, ordered_map(make_copier, work, workers), strict=True):
        shards[place] = shard
        journal.add(*place, shard)
        report(shard.ids.bytes)
    return _together(parts, totals, {place: shard for place, shard in shards.items() if shard})


def _together(
    parts: list[tuple[Path, Encoded]], totals: dict[str, int], shards: dict[tuple[str, int], ShardInfo]
) -> Encoded:
    """What all parts have come to: tokens by split, shards by split and number."""
    splits = {
        name: SplitInfo(
            tokens=totals[name],
            documents=sum(encoded.splits[name].documents for _, encoded in parts),
            text_bytes=sum(encoded.splits[name].text_bytes for _, encoded in parts),
            shards=tuple(shard for (split, _), shard in shards.items() if split == name),
        )
        for name in totals
    }
    for name, split in splits.items():
        for problem in split.contradictions():  # its ends, say, which are not checked against its ids
            raise UserError(
                f"{parts[0][0].parent}: the joined {name} split {problem}; delete it and run all parts again"
            )
    return Encoded(
        splits=splits,
        skipped=sum((Counter(encoded.skipped) for _, encoded in parts), Counter()),
        unknown=sum((Counter(encoded.unknown) for _, encoded in parts), Counter()),
        sources={
            name: sum((Counter(encoded.sources.get(name, {})) for _, encoded in parts), Counter()) for name in splits
        },
    )


@dataclass(frozen=True)
class _Source:
    """One shard of one part, and where it begins in the stream of all parts."""

    ids: Path
    ends: Path
    begin: int
    tokens: int


def _sources(split: str, parts: list[tuple[Path, Encoded]]) -> Iterator[_Source]:
    begin = 0
    for folder, encoded in parts:
        for shard in encoded.splits[split].shards:
            yield _Source(folder / shard.ids.path, folder / shard.ends.path, begin, shard.tokens)
            begin += shard.tokens


class _ShardCopier:
    """Writes one final shard, named by its split and number; each process makes its own."""

    def __init__(
        self, sources: dict[str, list[_Source]], dtype: Literal["uint16", "uint32"], folder: Path, shard_tokens: int
    ):
        self._sources, self._dtype, self._folder, self._shard_tokens = sources, dtype, folder, shard_tokens
        self._begins = {name: [source.begin for source in sources[name]] for name in sources}

    def __call__(self, item: tuple[str, int]) -> ShardInfo:
        split, number = item
        begin = number * self._shard_tokens
        try:
            writer = ShardWriter(self._folder, split, self._dtype, self._shard_tokens, first_shard=number)
            first = bisect_right(self._begins[split], begin) - 1
            for source in self._sources[split][first:]:
                if source.begin >= begin + self._shard_tokens:
                    break
                self._copy(writer, source, begin)
            return writer.close().shards[0]
        except OSError as error:
            place = error.filename or self._folder
            raise UserError(f"{place}: cannot be joined ({error.strerror or error})") from error

    def _copy(self, writer: ShardWriter, source: _Source, begin: int) -> None:
        """Append what of a source lies in the shard."""
        stored = np.dtype(self._dtype).newbyteorder("<")
        # Mapped, because a shard of very many documents has as many ends.
        ends = np.memmap(source.ends, "<i8", "r") if source.ends.stat().st_size else np.empty(0, np.int64)
        last = min(source.tokens, begin + self._shard_tokens - source.begin)
        for here in range(max(0, begin - source.begin), last, COPY_TOKENS):
            there = min(here + COPY_TOKENS, last)
            ids = np.fromfile(source.ids, stored, there - here, offset=here * stored.itemsize)
            if len(ids) < there - here:
                raise UserError(
                    f"{source.ids}: ends before its {source.tokens} tokens; delete its part and run it again"
                )
            first, end = np.searchsorted(ends, (here, there), "right")
            writer.append(ids, np.diff(ends[first:end], prepend=here), 0)
