"""SentencePiece: `bpe` and `unigram` trained on the input, and models made elsewhere.

Models trained here spell every text exactly: identity normalisation, nothing trimmed or added, bytes for what the
vocabulary lacks. Control pieces (`<s>`, `</s>`) are never matched in text by the library.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece

from llmtrain.data.pieces import AS_USUAL, Pieces
from llmtrain.data.tokenizer_base import Ids, Lengths, close_documents, id_dtype, refuse_surrogates, write_identity
from llmtrain.data.tokenizer_fast import SEPARATOR, FastEncoder, holds, unspellable
from llmtrain.errors import UserError

MODEL_FILE = "tokenizer.model"
EXISTING = "sentencepiece"  # the kind of a model that was not trained here
# The library writes a space as this character and reads this character as a space: a text that has it would come back
# with spaces, so it is spelled in bytes.
SPACE_SYMBOL = "\u2581"
NOT_FOR_FAST = (SPACE_SYMBOL, SEPARATOR)
SPLIT_AT_SYMBOL = re.compile(f"({SPACE_SYMBOL})")
# What the trainer cannot have in a sentence: it ends lines, drops sentences with a tab, NUL or its own symbols.
BETWEEN_SENTENCES = re.compile("[\r\n\t\0\u2581\u2585]+")
SENTENCE_CHARACTERS = 1000  # at 4 bytes each, under the 4192 bytes beyond which the trainer drops a sentence
# The E-step of unigram sums floats per thread, so the number of threads is part of the result: it must not follow the
# machine.
TRAINER_THREADS = 8
# No piece goes on after a word with a space, so a cut there changes no id; long texts are cut, because the library
# needs hundreds of bytes of memory per character of a call.
CUT_CHARACTERS = 1 << 20
AFTER_WORD = re.compile("(?<! )(?= )")


class SentencePieceTokenizer:
    """A SentencePiece model.

    Raises:
        UserError: the bytes are no model, or it has no end-of-document piece that text cannot spell.
    """

    def __init__(self, model: bytes, kind: str = EXISTING, source: str = MODEL_FILE):
        self.kind = kind
        self._model = model
        try:
            if not model:
                raise ValueError("empty")  # which the library takes for "nothing to load"
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{source}: not a SentencePiece model") from error
        self.vocab_size = int(self._processor.vocab_size())
        self.eos_id = int(self._processor.eos_id())
        if self.eos_id < 0 or not self._processor.is_control(self.eos_id):
            raise UserError(f"{source}: the model has no control piece for the end of a document (usually </s>)")
        self.bos_id = _present(self._processor.bos_id())
        self.pad_id = _present(self._processor.pad_id())
        self._trained_here = kind != EXISTING
        self.unk_id = None if self._trained_here else _present(self._processor.unk_id())
        self._dtype = id_dtype(self.vocab_size)
        bytes_of_symbol = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
        self._space_symbol = np.array(self._processor.piece_to_id(bytes_of_symbol), np.int32)

    @classmethod
    def fit(
        cls, kind: str, training: Iterable[str], vocab_size: int | None, default_size: int, pieces: Pieces = AS_USUAL
    ) -> SentencePieceTokenizer:
        """Train a model on documents.

        Raises:
            UserError: `vocab_size` was asked for and the text supports only fewer, or needs more; says how many.
        """
        model = io.BytesIO()
        # Named only where chosen: what is named stands in the model's file, whose hash tells tokenizers apart.
        chosen: dict[str, Any] = {"split_digits": True} if pieces.digits == "split" else {}
        chosen |= {"allow_whitespace_only_pieces": True} if pieces.whitespace == "join" else {}
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(training),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size or default_size,
                hard_vocab_limit=vocab_size is not None,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                **chosen,
                num_threads=TRAINER_THREADS,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise _training_error(kind, vocab_size, str(error)) from error
        return cls(model.getvalue(), kind)

    def encode(self, text: str) -> Ids:
        """Return the (tokens,) ids of a text."""
        refuse_surrogates(self.kind, text)
        return self._encode_by_library([text])[0]

    def encode_documents(self, documents: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode many documents, each closed by the model's end-of-sentence id."""
        if self._fast is None or any(holds(document, NOT_FOR_FAST) for document in documents):
            return close_documents(self._encode_by_library(documents), self.eos_id, self._dtype)
        return self._fast.encode_documents(documents)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text of ids."""
        known = [i for i in np.asarray(ids).tolist() if 0 <= i < self.vocab_size]
        return str(self._processor.decode(known))

    def token_bytes(self, token: int) -> bytes:
        """Return the text of a piece, in UTF-8, or its byte."""
        if not 0 <= token < self.vocab_size:
            return b""
        if self._is_special(token) or self._processor.is_unused(token):
            return b""
        piece = str(self._processor.id_to_piece(token))
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # as in <0x0A>
        return piece.replace(SPACE_SYMBOL, " ").encode()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model`, which the library loads as it is."""
        (folder / MODEL_FILE).write_bytes(self._model)
        write_identity(folder, self.kind)

    def bpe_config(self) -> dict[str, Any] | None:
        """The model as a parsed tokenizer.json, if it is BPE with bytes for what is lacking; it lacks a decoder."""
        try:
            from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

            config: dict[str, Any] = json.loads(sentencepiece_to_tokenizer_json(self._model))
        except (ImportError, ValueError):
            return None
        return config

    def scored_pieces(self) -> list[tuple[str, float, Literal["text", "byte", "special"]]]:
        """Every piece as the library writes it, its score, and what it stands for."""
        processor = self._processor
        return [
            (
                str(processor.id_to_piece(token)),
                float(processor.get_score(token)),
                "special" if self._is_special(token) else "byte" if processor.is_byte(token) else "text",
            )
            for token in range(self.vocab_size)
        ]

    def _is_special(self, token: int) -> bool:
        return bool(self._processor.is_control(token) or self._processor.is_unknown(token))

    @functools.cached_property
    def _fast(self) -> FastEncoder | None:
        """Loaded when documents come: gigatoken, if the model is one it knows (BPE with bytes for what is lacking)."""
        config = self.bpe_config()
        if config is None:
            return None
        special = [piece for piece, _, kind in self.scored_pieces() if kind == "special"]
        try:
            fast = FastEncoder(unspellable(config, special), self.eos_id, self._dtype)
        except ValueError:
            return None
        return fast if fast.agrees_with(lambda text: self._processor.encode(text, out_type="numpy")) else None

    def _encode_by_library(self, documents: Sequence[str]) -> list[Ids]:
        parts_of = [_parts(document) if self._trained_here else [document] for document in documents]
        batch = [part for parts in parts_of for part in parts]
        encoded = iter(self._processor.encode(batch, out_type="numpy", num_threads=1))
        return [
            self._concatenate(
                [self._space_symbol if part == SPACE_SYMBOL else ids for part, ids in zip(parts, encoded, strict=False)]
            )
            for parts in parts_of
        ]

    def _concatenate(self, arrays: Sequence[npt.NDArray[np.int32]]) -> Ids:
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return joined.astype(self._dtype)


def _present(special_id: int) -> int | None:
    return int(special_id) if special_id >= 0 else None


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for line in BETWEEN_SENTENCES.split(document):
            for start in range(0, len(line), SENTENCE_CHARACTERS):
                yield line[start : start + SENTENCE_CHARACTERS]


def _parts(document: str) -> list[str]:
    """Cut a document where no piece is lost: around each space symbol, and after a word every million characters."""
    parts = []
    for piece in SPLIT_AT_SYMBOL.split(document) if SPACE_SYMBOL in document else [document]:
        start = 0
        while found := AFTER_WORD.search(piece, start + CUT_CHARACTERS):
            parts.append(piece[start : found.start()])
            start = found.start()
        parts.append(piece[start:])
    return parts


def _training_error(kind: str, vocab_size: int | None, message: str) -> UserError:
    """Turn the library's words into ours; it says in them how large the vocabulary can or must be."""
    asked = f"--vocab-size {vocab_size}" if vocab_size is not None else "the default vocabulary"
    if at_most := re.search(r"to a value <= (\d+)", message):
        return UserError(f"{asked} is larger than this text supports; the largest possible for {kind} is {at_most[1]}")
    if at_least := re.search(r"required_chars. \d+ vs (\d+)", message):
        return UserError(f"{asked} is too small for {kind}: its bytes and characters alone need {at_least[1]}")
    return UserError(f"SentencePiece cannot train {kind} on this text with {asked}: {' '.join(message.split())}")
