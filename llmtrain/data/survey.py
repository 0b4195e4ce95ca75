"""Where the chunks of an input begin, without the chunks: what is needed to deal them out to processes.

However large the input is, what is known of it at once is bounded: of each file up to `OUTLINES` outlines of its
chunks (11 MB), and no more of all where `coarsened` gathers them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from llmtrain.data.corpus import BEGINNING, CHUNK_BYTES, Position, ReadOptions, cut, records_cutter
from llmtrain.data.files import SourceFile
from llmtrain.data.workers import ordered_map

OUTLINES = 1 << 15


@dataclass(frozen=True)
class Outline:
    """Where a chunk begins, and how much of the input files it is; or so many chunks, one after another."""

    start: Position
    source_bytes: int
    chunks: int = 1


def survey(
    files: Sequence[SourceFile], options: ReadOptions, workers: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Outline]:
    """Yield where each chunk of `cut_into_chunks` begins, in order; several processes look at the files.

    Only a file of more than `OUTLINES` chunks (128 GB, decompressed) is told of in groups of chunks. JSONL and datasets
    are read for it, since their lines and rows have to be counted; of Parquet only the end is, and text files not at
    all.
    """
    with_records = [file for file in files if file.format != "text"]
    of_each_file = (
        ordered_map(partial(_Outliner, options, chunk_bytes), with_records, workers) if with_records else iter(())
    )

    def cut_records(file: SourceFile, here: Position) -> Iterator[tuple[Outline, int]]:
        outlines, records = next(of_each_file)
        for outline in outlines:
            start = replace(outline.start, file=here.file, ordinal=here.ordinal + outline.start.ordinal)
            yield replace(outline, start=start), records - outline.start.record

    for piece in cut(files, cut_records, chunk_bytes, BEGINNING):
        yield piece if isinstance(piece, Outline) else Outline(piece.start, piece.source_bytes)


def coarsened(outlines: Iterable[Outline], most: int = OUTLINES) -> list[Outline]:
    """Merge neighbours wherever there are more than `most`, and so never hold more.

    None that was merged is larger than 4 / `most` of the whole.
    """
    kept = list[Outline]()
    for outline in outlines:
        kept.append(outline)
        if len(kept) > most:
            # Any two neighbours that are left are together larger, so at most half of them are, and one.
            kept = list(_merged(kept, 4 * sum(each.source_bytes for each in kept) // most))
    return kept


def _merged(outlines: Sequence[Outline], most_bytes: int) -> Iterator[Outline]:
    """Merge neighbours as long as together they are at most so large."""
    group = outlines[0]
    for outline in outlines[1:]:
        if (size := group.source_bytes + outline.source_bytes) <= most_bytes:
            group = Outline(group.start, size, group.chunks + outline.chunks)
        else:
            yield group
            group = outline
    yield group


class _Outliner:
    """Outlines the chunks of one file as if it were the whole input, and counts its records."""

    def __init__(self, options: ReadOptions, chunk_bytes: int):
        self._cut = records_cutter(options, chunk_bytes)

    def __call__(self, file: SourceFile) -> tuple[list[Outline], int]:
        count = 0

        def outlines() -> Iterator[Outline]:
            nonlocal count
            for chunk, records in self._cut(file, BEGINNING):
                count += records
                yield Outline(chunk.start, chunk.source_bytes)

        return coarsened(outlines()), count
