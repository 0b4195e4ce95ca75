"""Chunks of documents to token ids and shards: the work that `prepare` deals out to its processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrain.data.corpus import Chunk, Position, ReadOptions, Skipped, place_of, read_documents, source_of
from llmtrain.data.journal import Done, Journal
from llmtrain.data.progress_bar import Report
from llmtrain.data.shard_writer import NOTHING, ShardWriter
from llmtrain.data.shards import SplitInfo
from llmtrain.data.split import Splitter, augmented
from llmtrain.data.tokenizer import Ids, Lengths, Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_base import UnspellableError
from llmtrain.data.workers import for_each, ordered_map
from llmtrain.errors import UserError

SplitName = Literal["train", "val"]


class Encoded(BaseModel):
    """What was written of an input, or of one part of it: shards, and counts of what was left out or unknown.

    `sources` has for each split how many documents are from each input, by its number; they follow each other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    splits: dict[str, SplitInfo]
    skipped: dict[str, int]
    unknown: dict[str, int]
    sources: dict[str, dict[int, int]] = {}


@dataclass(frozen=True)
class Division:
    """How documents are read, divided and altered: what turns chunks into the documents of each split."""

    reading: ReadOptions
    splitter: Splitter
    augment: tuple[str, ...]
    seed: int

    def split_names(self) -> tuple[SplitName, ...]:
        """The splits there are."""
        return ("train", "val") if self.splitter.fraction > 0 else ("train",)

    def documents(self, chunks: Iterable[Chunk], split: SplitName) -> Iterator[str]:
        """Yield the documents of one split, in input order."""
        skipped: Skipped = Counter()
        for chunk in chunks:
            for ordinal, text in read_documents(chunk, self.reading, skipped):
                yield from self.divide(ordinal, text)[split]

    def divide(self, ordinal: int, text: str) -> dict[SplitName, list[str]]:
        """Return the documents that one input document becomes in each split."""
        train, val = self.splitter.divide(ordinal, text)
        altered = augmented(train, self.augment, self.seed, ordinal) if train else []
        return {"train": [document for document in (train, *altered) if document], "val": [val] if val else []}


@dataclass(frozen=True)
class EncodedDocuments:
    """Token ids of several documents of one split, as `ShardWriter.append` takes them."""

    ids: Ids
    lengths: Lengths
    text_bytes: int
    unknown: int  # how many ids are `<unk>`


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk's documents in each split, and what was left out of it."""

    start: Position
    splits: dict[SplitName, EncodedDocuments]
    skipped: Skipped
    source_bytes: int
    sources: dict[SplitName, Counter[int]]  # how many documents are from each input


class ChunkEncoder:
    """Encodes chunks; each process makes its own."""

    def __init__(self, division: Division, tokenizer: Tokenizer):
        self._division = division
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, division: Division, tokenizer_folder: Path) -> ChunkEncoder:
        """Make one in another process, where only the saved tokenizer can be had."""
        return cls(division, load_tokenizer(tokenizer_folder))

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Read, divide and encode a chunk."""
        try:
            return self._encoded(chunk, by_itself=False)
        except UserError:
            return self._encoded(chunk, by_itself=True)

    def _encoded(self, chunk: Chunk, by_itself: bool) -> EncodedChunk:
        skipped: Skipped = Counter()
        # Before they are encoded, all else of them is let go.
        documents, sources = self._divide(chunk, skipped, by_itself)
        splits = {split: _encode(self._tokenizer, texts) for split, texts in documents.items() if texts}
        return EncodedChunk(chunk.start, splits, skipped, chunk.source_bytes, sources)

    def _divide(
        self, chunk: Chunk, skipped: Skipped, by_itself: bool
    ) -> tuple[dict[SplitName, list[str]], dict[SplitName, Counter[int]]]:
        """The documents of each split, and how many are from each input; `by_itself`: each that can be encoded."""
        documents: dict[SplitName, list[str]] = {"train": [], "val": []}
        sources: dict[SplitName, Counter[int]] = {"train": Counter(), "val": Counter()}
        for ordinal, text in read_documents(chunk, self._division.reading, skipped):
            divided = self._division.divide(ordinal, text)
            if by_itself:
                try:
                    divided = self._spelled(divided, skipped)
                except UserError as error:
                    more = "; --skip-bad leaves such documents out" if isinstance(error, UnspellableError) else ""
                    raise UserError(f"{place_of(chunk, ordinal)}: {error}{more}") from None
            source = source_of(chunk, ordinal)
            for split, parts in divided.items():
                documents[split] += parts
                sources[split][source] += len(parts)
        return documents, sources

    def _spelled(self, divided: dict[SplitName, list[str]], skipped: Skipped) -> dict[SplitName, list[str]]:
        """What can be encoded: nothing of a document that cannot; of one that can, also those altered copies that can.

        Raises:
            UnspellableError: something cannot, and `skip_bad` is not set.
            UserError: the tokenizer failed in another way.
        """
        bad = list[str]()
        for part in chain.from_iterable(divided.values()):
            try:
                self._tokenizer.encode_documents([part])
            except UnspellableError:
                if not self._division.reading.skip_bad:
                    raise
                bad.append(part)
        if any(parts[0] in bad for parts in divided.values() if parts):
            skipped["documents that cannot be spelled"] += 1
            return {split: [] for split in divided}
        if bad:
            skipped["altered copies that cannot be spelled"] += len(bad)
        return {split: [part for part in parts if part not in bad] for split, parts in divided.items()}


def encode_to_shards(
    chunks: Iterable[Chunk],
    division: Division,
    tokenizer_folder: Path,
    dtype: Literal["uint16", "uint32"],
    *,
    folder: Path,
    journal: Journal,
    shard_tokens: int,
    workers: int,
    report: Report,
) -> Encoded:
    """Encode chunks in several processes and write them as shards, in the order of the chunks.

    Args:
        chunks: whole documents, from the first that is not done.
        division: how they are divided.
        tokenizer_folder: where the tokenizer is saved.
        dtype: holds all its ids.
        folder: where the shards go.
        journal: of this folder; says what is done, and is told.
        shard_tokens: tokens of each shard but the last of a split.
        workers: number of processes; what is written does not depend on it.
        report: is told of the progress.
    """
    writers: dict[str, ShardWriter] = {
        name: ShardWriter(folder, name, dtype, shard_tokens, state=journal.done.splits.get(name, NOTHING))
        for name in division.split_names()
    }
    shards = _Shards(writers, journal, report)
    make_encoder: Callable[[], ChunkEncoder] = partial(ChunkEncoder.load, division, tokenizer_folder)
    for_each(shards.add, ordered_map(make_encoder, chunks, workers, alike=True))
    return shards.close()


class _Shards:
    """What is written of an input, from where its journal ends."""

    def __init__(self, writers: Mapping[str, ShardWriter], journal: Journal, report: Report):
        done = journal.done
        self._writers, self._journal, self._report, self._chunks = writers, journal, report, done.chunks
        self._skipped, self._unknown = Counter(done.skipped), Counter(done.unknown)
        self._sources = {name: Counter(done.sources.get(name, {})) for name in self._writers}
        self._documents = sum(state.documents for state in done.splits.values())
        self._source_bytes = done.source_bytes
        report(self._source_bytes)

    def add(self, chunk: EncodedChunk) -> None:
        """Append a chunk, and note in the journal where all is if that has finished a shard."""
        for name, documents in chunk.splits.items():
            self._writers[name].append(documents.ids, documents.lengths, documents.text_bytes)
            self._unknown[name] += documents.unknown
            self._sources[name] += chunk.sources[name]
            self._documents += len(documents.lengths)
        self._chunks += 1
        self._skipped += chunk.skipped
        self._source_bytes += chunk.source_bytes
        if any(writer.has_finished for writer in self._writers.values()):
            done = Done(
                chunks=self._chunks,
                last=chunk.start,
                source_bytes=self._source_bytes,
                skipped=self._skipped,
                unknown=self._unknown,
                sources={name: dict(count) for name, count in self._sources.items()},
            )
            self._journal.add(self._writers, done)
        self._report(chunk.source_bytes, f"{self._documents:,} documents")

    def close(self) -> Encoded:
        """Finish the last shards; return what all came to."""
        return Encoded(
            splits={name: writer.close() for name, writer in self._writers.items()},
            skipped=self._skipped,
            unknown=self._unknown,
            sources={name: dict(count) for name, count in self._sources.items()},
        )


def _encode(tokenizer: Tokenizer, documents: list[str]) -> EncodedDocuments:
    ids, lengths = tokenizer.encode_documents(documents)
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in documents)
    unknown = int(np.count_nonzero(ids == tokenizer.unk_id)) if tokenizer.unk_id is not None else 0
    return EncodedDocuments(ids, lengths, text_bytes, unknown)
