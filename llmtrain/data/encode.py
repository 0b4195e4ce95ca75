"""Chunks of documents to token ids: the work that `prepare` deals out to its processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llmtrain.data.corpus import Chunk, ReadOptions, Skipped
from llmtrain.data.split import Splitter, augmented
from llmtrain.data.tokenizer import Ids, Lengths, Tokenizer, load_tokenizer

SplitName = Literal["train", "val"]


@dataclass(frozen=True)
class Division:
    """How documents are read, divided and altered: what turns chunks into the documents of each split."""

    reading: ReadOptions
    splitter: Splitter
    augment: tuple[str, ...]
    seed: int

    def documents(self, chunks: Iterable[Chunk], split: SplitName) -> Iterator[str]:
        """Yield the documents of one split, in input order."""
        skipped: Skipped = Counter()
        for chunk in chunks:
            for ordinal, text in chunk.read(self.reading, skipped):
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

    splits: dict[SplitName, EncodedDocuments]
    skipped: Skipped
    source_bytes: int


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
        skipped: Skipped = Counter()
        documents: dict[SplitName, list[str]] = {"train": [], "val": []}
        for ordinal, text in chunk.read(self._division.reading, skipped):
            for split, parts in self._division.divide(ordinal, text).items():
                documents[split] += parts
        splits = {split: _encode(self._tokenizer, texts) for split, texts in documents.items() if texts}
        return EncodedChunk(splits, skipped, chunk.source_bytes)


def _encode(tokenizer: Tokenizer, documents: list[str]) -> EncodedDocuments:
    ids, lengths = tokenizer.encode_documents(documents)
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in documents)
    unknown = int(np.count_nonzero(ids == tokenizer.unk_id)) if tokenizer.unk_id is not None else 0
    return EncodedDocuments(ids, lengths, text_bytes, unknown)
