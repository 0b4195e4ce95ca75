"""Tokenizers in the `tokenizer.json` format: `bbpe` trained on the input, and files made elsewhere.

`gigatoken` trains and encodes; `tokenizers` is the reference: it decodes, encodes prompts, and stands in where
`gigatoken` cannot give the same ids.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gigatoken import gigatoken_rs

from llmtrain.data.pieces import cut_bytes
from llmtrain.data.tokenizer_base import Ids, Lengths, close_documents, id_dtype, refuse_surrogates, write_identity
from llmtrain.data.tokenizer_fast import (
    PROBE,
    RESERVED,
    FastEncoder,
    hide,
    holds,
    special_token,
    unspellable,
    with_cuts,
)
from llmtrain.data.tokenizer_unknown import marked, numbered, refuse_unknown, spells_every_text, unknown_id
from llmtrain.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
EXISTING = "tokenizer.json"  # the kind of a file that was not made here
EOS = "<|endoftext|>"
EOS_NAMES = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>")
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]")
BYTES = 256
PROBED_IDS = 1000
# Ids that no token has: of files in use there are thousands at most, and each costs the model a row.
UNUSED_IDS = 1_000_000
BATCH_CHARACTERS = 1 << 18  # what the library returns takes about 30 bytes for each
THREADS = "TOKENIZERS_PARALLELISM"
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class HuggingFaceTokenizer:
    """A `tokenizer.json`.

    Raises:
        UserError: the text is no such file, or it has no token for the end of a document; says which it has.
    """

    def __init__(self, content: str, kind: str = EXISTING, source: str = TOKENIZER_FILE):
        self.kind = kind
        self.content = content  # of the file
        self._source = source
        config = _parse_json(content, source)
        self._full = _load(content, source)
        config["model"].setdefault("type", type(self._full.model).__name__)  # which old files leave out
        added = _added_tokens(config, self._full)
        special = {token["content"]: token["id"] for token in added if token["special"]}
        eos_id = self._first_of(EOS_NAMES)
        if eos_id is None:
            raise UserError(
                f"{source}: none of its tokens ends a document ({', '.join(EOS_NAMES)});"
                f" its special tokens are: {', '.join(special) or 'none'}"
            )
        self.eos_id = eos_id
        self.bos_id = self._first_of(BOS_NAMES)
        self.pad_id = self._first_of(PAD_NAMES)
        unk_id = unknown_id(config, self._full)
        self.unk_id = None if unk_id == eos_id else unk_id
        self.vocab_size = _vocab_size(self._full, source)
        self._dtype = id_dtype(self.vocab_size)
        self._decoders = _decoders(config.get("decoder"))
        marks = {i for i in (self.eos_id, self.bos_id, self.pad_id) if i is not None}
        self._textless = marks | set(special.values())
        names = {name for i in self._textless if (name := self._full.id_to_token(i)) is not None}
        self._config = unspellable({**config, "added_tokens": added}, names)
        # Where neither, what it cannot spell is looked for in every text.
        self._is_whole = self.unk_id is not None or spells_every_text(self._config, byte_letters())
        self._reference = self._load_reference(added, names)
        # A file that panics shall do so now and unseen, not in the middle of a text and with the library's own words.
        with _quiet(), _panics_refused(source), contextlib.suppress(Exception):
            self._full.decode(list(range(PROBED_IDS)), skip_special_tokens=False)
            self._reference.encode(" ".join(PROBE), add_special_tokens=False)

    def _load_reference(self, added: Sequence[dict[str, Any]], names: Collection[str]) -> tokenizers.Tokenizer:
        """The library with the same ids, but never those of `names`."""
        hidden = {name: hide(name) for name in names}
        config = numbered(
            self._config, {hidden.get(token["content"], token["content"]): token["id"] for token in added}
        )
        if self.unk_id is None:
            config = marked(config, hide(str(self._full.id_to_token(self.eos_id))), self.eos_id)
        return _load(json.dumps(config), self._source)

    @classmethod
    def fit(
        cls, training: Iterable[str], vocab_size: int | None, default_size: int, cuts: str | None = None
    ) -> HuggingFaceTokenizer:
        """Train byte-level BPE (GPT-2's splitting of text into words) on documents, cut as `Pieces.cuts` says before.

        Raises:
            UserError: `vocab_size` was asked for and the merges run out before it is reached.
        """
        if vocab_size is not None and vocab_size <= BYTES:
            raise UserError(f"--vocab-size {vocab_size} is too small for bbpe: its bytes and {EOS} need {BYTES + 1}")
        # 0xFF is no byte of UTF-8, so it cannot stand inside a document.
        text = b"\xff".join(cut_bytes(document.encode(), cuts, b"\xff") for document in training)
        tokens, merges = _train_merges(text, (vocab_size or default_size) - 1)
        if vocab_size is not None and len(tokens) + 1 < vocab_size:
            raise UserError(
                f"--vocab-size {vocab_size} is larger than this text supports;"
                f" the largest possible for bbpe is {len(tokens) + 1}"
            )
        return cls(_byte_level_json(tokens, merges, cuts), kind="bbpe")

    def encode(self, text: str) -> Ids:
        """Return the (tokens,) ids of a text.

        Raises:
            UserError: it has what the tokenizer can neither spell nor call unknown.
        """
        refuse_surrogates(self.kind, text)
        with _panics_refused(self._source):
            encoding = self._reference.encode(text, add_special_tokens=False)
        if not self._is_whole:
            refuse_unknown(self.kind, text, encoding, self.eos_id)
        return np.array(encoding.ids, self._dtype)

    def encode_documents(self, documents: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode many documents, each closed by the end-of-document id."""
        if self._fast is None or any(holds(document, RESERVED) for document in documents):
            return close_documents(self._encode_by_library(documents), self.eos_id, self._dtype)
        return self._fast.encode_documents(documents)

    def _encode_by_library(self, documents: Sequence[str]) -> Iterator[Ids]:
        """Yield what `encode` gives for each, sooner: where each token lies in the text is not worked out."""
        for batch in _batches(documents):
            for document in batch:
                refuse_surrogates(self.kind, document)
            with _one_thread(), _panics_refused(self._source):
                encodings = self._reference.encode_batch_fast(batch, add_special_tokens=False)
            for document, encoding in zip(batch, encodings, strict=True):
                ids = encoding.ids
                if not self._is_whole and self.eos_id in ids:
                    self.encode(document)  # raises, and says what is lacking, and where
                yield np.array(array("I", ids), self._dtype)  # numpy alone takes twice as long for a list

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text of ids."""
        known = [i for i in np.asarray(ids).tolist() if 0 <= i < self.vocab_size and i not in self._textless]
        with _panics_refused(self._source):
            return self._full.decode(known, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token of a byte-level tokenizer, and what others decode it to, in UTF-8."""
        piece = self._full.id_to_token(token) if 0 <= token < self.vocab_size else None
        if piece is None or token in self._textless:
            return b""
        if "ByteLevel" in self._decoders and set(piece) <= _bytes_by_letter().keys():
            return bytes(map(_bytes_by_letter().__getitem__, piece))
        if "ByteFallback" in self._decoders and BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[1:-1], 16)])
        # Decoded twice, because decoders treat the start of a text, such as a space there, in their own ways.
        return self.decode([token, token]).removeprefix(self.decode([token])).encode()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, which `tokenizers` and `transformers` load as it is."""
        (folder / TOKENIZER_FILE).write_text(self.content, encoding="utf-8")
        write_identity(folder, self.kind)

    @functools.cached_property
    def _fast(self) -> FastEncoder | None:
        """Loaded when documents come, not for a prompt: a large vocabulary takes a while."""
        if not self._is_whole or not _one_merge_per_token(self._config["model"]):
            return None
        try:
            with _quiet(), _panics_refused(self._source):
                fast = FastEncoder(self._config, self.eos_id, self._dtype)
                return fast if fast.agrees_with(self.encode) else None
        except (ValueError, UserError):
            return None

    def _first_of(self, names: Sequence[str]) -> int | None:
        ids = (self._full.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)


def _one_merge_per_token(model: dict[str, Any]) -> bool:
    """Say whether no token can be merged in two ways, or the model is one where gigatoken ranks merges as it should."""
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return True
    merged = ["".join(pair) for pair in _merges(model)]
    return len(set(merged)) == len(merged)


def _vocab_size(library: tokenizers.Tokenizer, source: str) -> int:
    """One more than the highest id.

    Raises:
        UserError: that is so high that most ids below it, and more than a million, stand for nothing.
    """
    vocab = library.get_vocab(with_added_tokens=True)
    token = max(vocab, key=vocab.__getitem__)
    if (highest := vocab[token]) >= 2 * len(vocab) + UNUSED_IDS:
        raise UserError(
            f"{source}: the token {token[:40]!r} has the id {highest:,}, and there are only {len(vocab):,} tokens; the"
            " model would have a row for every id up to it: number them from 0 on without large gaps"
        )
    return 1 + highest


def _added_tokens(config: dict[str, Any], library: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The added tokens with the ids that the library gives them, whatever the file says of these."""
    added = ((token, library.token_to_id(token["content"])) for token in config.get("added_tokens") or [])
    return [{**token, "id": token_id} for token, token_id in added if token_id is not None]


def _decoders(config: dict[str, Any] | None) -> set[str]:
    """The types of the decoders, of which a sequence is several."""
    config = config or {}
    return {str(config.get("type"))}.union(*(_decoders(part) for part in config.get("decoders") or []))


def _merges(model: dict[str, Any]) -> list[list[str]]:
    """The merges of a BPE model, in either of the two forms that files have; none for other models."""
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]


def _parse_json(content: str, source: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(content)
        prefix = config["model"].get("continuing_subword_prefix") or ""
        prefixed = all(right.startswith(prefix) for _, right in _merges(config["model"]))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(source, error) from error
    if not prefixed:  # the library cuts so many bytes off unseen, and where that halves a character it aborts Python
        raise _unreadable(source, f"a merge goes on with a piece that does not begin with '{prefix}'")
    return config


def _load(content: str, source: str) -> tokenizers.Tokenizer:
    try:
        with _quiet(), _panics_refused(source):
            return tokenizers.Tokenizer.from_str(content)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise _unreadable(source, error) from error


@contextlib.contextmanager
def _panics_refused(source: str) -> Iterator[None]:
    """Raise UserError where a library panics over the file."""
    try:
        yield
    except BaseException as error:
        # Not an Exception, so that nobody catches it by chance, and its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise _unreadable(source, error) from error


def _unreadable(source: str, reason: object) -> UserError:
    return UserError(f"{source}: not a tokenizer.json that `tokenizers` reads ({reason})")


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    """Group documents up to `BATCH_CHARACTERS`; a longer one is alone."""
    batch, size = list[str](), 0
    for document in documents:
        if batch and size + len(document) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document)
    if batch:
        yield batch


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the library from dealing a batch out to all cores: `--workers` says how many are used.

    It looks into the environment at each call, and has no other switch.
    """
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before


def _train_merges(text: bytes, size: int) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """Learn merges until there are `size` different tokens (bytes included) or nothing is left to merge.

    Two merges can give the same token ("ab"+"c" and "a"+"bc"). Only the first is kept, because the libraries disagree
    about the rank of the second (its place in the list, or its token's), and training goes on for as many more.
    """
    asked = size
    while True:
        with _quiet():
            vocabulary, merges = gigatoken_rs.train_bpe(text, asked, [], separator=b"\xff")
        first_merges = dict[bytes, tuple[bytes, bytes]]()
        for left, right in merges:
            first_merges.setdefault(left + right, (left, right))
        tokens = [bytes([byte]) for byte in range(BYTES)] + list(first_merges)
        if len(tokens) >= size or len(vocabulary) < asked:
            return tokens, list(first_merges.values())
        asked += size - len(tokens)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the library writes past Python to standard output and error, so that `--json` stays JSON."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)


def _byte_level_json(tokens: Sequence[bytes], merges: Sequence[tuple[bytes, bytes]], cuts: str | None) -> str:
    """Write tokens and merges as a GPT-2-like tokenizer.json, with the end-of-document token last."""
    spelling = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {
        "type": "BPE",
        "vocab": {spell(token): i for i, token in enumerate(tokens)},
        "merges": [[spell(left), spell(right)] for left, right in merges],
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(EOS, len(tokens))],
        "normalizer": None,
        "pre_tokenizer": byte_level if cuts is None else with_cuts(byte_level, cuts),
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False)


def byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(BYTES)]


@functools.cache
def _bytes_by_letter() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(byte_letters())}
