"""Tokenizers that are a table and nothing else: bytes, characters, words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data.tokenizer_base import (
    IDENTITY,
    Ids,
    Lengths,
    close_documents,
    id_dtype,
    lacking,
    refuse_surrogates,
    write_identity,
)
from llmtrain.errors import CorruptError, UserError

CODE_POINTS = 0x110000
BLOCK_CHARACTERS = 1 << 16
# A lone surrogate cannot stand in a text that came from UTF-8, so it can stand between documents encoded as one string.
SEPARATOR = "\ud800"
UNSPELLABLE = "\ufffd"
# Runs of the same blank are one piece, so indentation is short and few different runs exist.
WORD_PIECES = re.compile(r"\w+| +|\n+|\t+|\s|[^\w\s]")
EOS_AND_UNK = 2


class ByteTokenizer:
    """The 256 bytes of UTF-8, then BOS, EOS, PAD: 259 ids, and nothing to fit."""

    kind = "byte"
    vocab_size = 259
    bos_id: int | None = 256
    eos_id = 257
    pad_id: int | None = 258
    unk_id: int | None = None

    def encode(self, text: str) -> Ids:
        """Return the UTF-8 bytes of a text as (bytes,) uint16."""
        refuse_surrogates(self.kind, text)
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def encode_documents(self, documents: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode many documents, each closed by EOS."""
        encoded = [document.encode() for document in documents]
        lengths = np.fromiter((len(data) + 1 for data in encoded), np.int64, len(encoded))
        joined = b"\0".join([*encoded, b""])
        del encoded
        ids = np.frombuffer(joined, np.uint8).astype(np.uint16)
        ids[np.cumsum(lengths) - 1] = self.eos_id
        return ids, lengths

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text of ids below 256; invalid UTF-8 becomes U+FFFD."""
        array = np.asarray(ids, np.int64)
        return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the byte itself."""
        return bytes([token]) if 0 <= token < 256 else b""

    def save(self, folder: Path) -> None:
        """Write the kind; there is nothing else to know."""
        write_identity(folder, self.kind)


class CharTokenizer:
    """One id per character of the training text in code point order, then `<eos>`.

    Text to be prepared may hold characters that the training part lacked (the validation part often does); only then
    there is one more id, `<unk>`, that they all become. A prompt may not: `encode` names the character instead.
    """

    kind = "char"
    bos_id: int | None = None
    pad_id: int | None = None

    def __init__(self, characters: str, has_unk: bool = False):
        codes = np.array([ord(c) for c in characters], np.int64)
        self._characters, self._has_unk = characters, has_unk
        self.eos_id = len(characters)
        self.unk_id: int | None = len(characters) + 1 if has_unk else None
        self.vocab_size = len(characters) + 1 + has_unk
        # The highest value of the dtype means "lacking", so it must not be an id itself.
        dtype = np.dtype(id_dtype(self.vocab_size + 1))
        self._lacking = np.iinfo(dtype).max
        self._table = np.full(CODE_POINTS, self._lacking, dtype)
        self._table[codes] = np.arange(len(codes))
        self._closing_table = self._table.copy()
        self._closing_table[ord(SEPARATOR)] = self.eos_id
        if self.unk_id is not None:
            self._closing_table[self._closing_table == self._lacking] = self.unk_id

    @classmethod
    def fit(cls, training: Iterable[str], validation: Iterable[str] = ()) -> CharTokenizer:
        """Collect the characters of the training documents; `<unk>` is added where validation has others."""
        known, others = _characters(training), _characters(validation)
        return cls("".join(sorted(known)), has_unk=bool(others - known))

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> CharTokenizer:
        """Rebuild from what `save` wrote."""
        characters, has_unk = content.get("characters"), content.get("has_unk")
        if not isinstance(characters, str) or not isinstance(has_unk, bool) or len(set(characters)) < len(characters):
            raise CorruptError(f"{IDENTITY}: damaged vocabulary; prepare the data again")
        return cls(characters, has_unk)

    def encode(self, text: str) -> Ids:
        """Return (characters,) ids.

        Raises:
            UserError: a character that the training text did not have.
        """
        ids = _translate(text, self._table)
        bad = np.flatnonzero(ids == self._lacking)
        if len(bad):
            raise lacking(self.kind, text, int(bad[0]))
        return ids

    def encode_documents(self, documents: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode many documents, each closed by `<eos>`; unknown characters become `<unk>`."""
        lengths = np.fromiter((len(document) + 1 for document in documents), np.int64, len(documents))
        joined = SEPARATOR.join([*documents, ""])
        ids = _translate(joined, self._closing_table)
        if self.unk_id is None and len(bad := np.flatnonzero(ids == self._lacking)):
            raise lacking(self.kind, joined, int(bad[0]))
        return ids, lengths

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the characters of ids; `<unk>` becomes U+FFFD."""
        return _look_up(ids, self._characters, self.unk_id)

    def token_bytes(self, token: int) -> bytes:
        """Return the character in UTF-8."""
        return _look_up([token], self._characters, None).encode()

    def save(self, folder: Path) -> None:
        """Write the characters."""
        write_identity(folder, self.kind, characters=self._characters, has_unk=self._has_unk)


class WordTokenizer:
    """Words, runs of blanks and punctuation marks by frequency, then `<eos>` and `<unk>` for all rarer ones."""

    kind = "word"
    bos_id: int | None = None
    pad_id: int | None = None

    def __init__(self, words: Sequence[str]):
        self._words = list(words)
        self._id_of = {word: i for i, word in enumerate(self._words)}
        self.eos_id = len(self._words)
        self.unk_id: int | None = self.eos_id + 1
        self.vocab_size = self.eos_id + EOS_AND_UNK
        self._dtype = id_dtype(self.vocab_size)

    @classmethod
    def fit(cls, training: Iterable[str], vocab_size: int | None, default_size: int) -> WordTokenizer:
        """Keep the most frequent pieces; of equally frequent ones, those first in code point order.

        Raises:
            UserError: `vocab_size` was asked for and the text has fewer different pieces.
        """
        counts: Counter[str] = Counter()
        for document in training:
            counts.update(WORD_PIECES.findall(document))
        largest = len(counts) + EOS_AND_UNK
        if vocab_size is not None and not EOS_AND_UNK < vocab_size <= largest:
            raise UserError(
                f"--vocab-size {vocab_size}: this text supports a word vocabulary of {EOS_AND_UNK + 1} to {largest}"
                " entries (with <eos> and <unk>)"
            )
        by_rank = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls([word for word, _ in by_rank[: (vocab_size or default_size) - EOS_AND_UNK]])

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> WordTokenizer:
        """Rebuild from what `save` wrote."""
        words = content.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise CorruptError(f"{IDENTITY}: damaged vocabulary; prepare the data again")
        return cls(words)

    def encode(self, text: str) -> Ids:
        """Return (pieces,) ids; words outside the vocabulary become `<unk>`."""
        refuse_surrogates(self.kind, text)
        get, unk = self._id_of.get, self.unk_id
        return np.array([get(piece, unk) for piece in WORD_PIECES.findall(text)], self._dtype)

    def encode_documents(self, documents: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode many documents, each closed by `<eos>`."""
        return close_documents((self.encode(document) for document in documents), self.eos_id, self._dtype)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text of ids; `<unk>` becomes U+FFFD."""
        return _look_up(ids, self._words, self.unk_id)

    def token_bytes(self, token: int) -> bytes:
        """Return the piece in UTF-8."""
        return _look_up([token], self._words, None).encode()

    def save(self, folder: Path) -> None:
        """Write the words, most frequent first."""
        write_identity(folder, self.kind, words=self._words)


def _translate(text: str, table: Ids) -> Ids:
    """Look up every character by its code point, in blocks that stay in the cache (4 bytes a character on the way)."""
    ids = np.empty(len(text), table.dtype)
    for start in range(0, len(text), BLOCK_CHARACTERS):
        block = text[start : start + BLOCK_CHARACTERS].encode("utf-32-le", "surrogatepass")
        ids[start : start + BLOCK_CHARACTERS] = table[np.frombuffer(block, "<u4")]
    return ids


def _characters(documents: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    for document in documents:
        seen.update(document)
    return seen


def _look_up(ids: Sequence[int] | Ids, texts: Sequence[str], unk_id: int | None) -> str:
    return "".join(
        texts[i] if 0 <= i < len(texts) else UNSPELLABLE if i == unk_id else "" for i in np.asarray(ids).tolist()
    )
