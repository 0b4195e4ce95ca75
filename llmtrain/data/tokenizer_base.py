"""What every tokenizer promises, and the small file that says which kind a saved one is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.errors import CorruptError, UserError

IDENTITY = "llmtrain_tokenizer.json"
Ids = npt.NDArray[np.unsignedinteger[Any]]
Lengths = npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """Text to token ids and back. No text, whatever it spells, becomes a special id."""

    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int  # closes every document
    pad_id: int | None
    unk_id: int | None  # stands for what the tokenizer cannot spell; None where every text can be spelled

    def encode(self, text: str) -> Ids:
        """Return the (tokens,) uint16 or uint32 ids of one text, without bos and eos.

        Raises:
            UserError: the text has a character that the tokenizer cannot spell; names it and its position.
        """
        ...

    def encode_documents(self, documents: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode many documents at once, each closed by `eos_id`; what cannot be spelled becomes `unk_id`.

        Returns:
            (tokens,) ids of all documents in order, and (documents,) their lengths in tokens, eos included.
        """
        ...

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text of ids; those that stand for no text are left out, invalid UTF-8 becomes U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of text that one id stands for inside a text; none where it stands for no text."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer into an existing folder; `load_tokenizer` reads it back."""
        ...


def id_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest dtype that `shards` stores and that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def close_documents(pieces: Iterable[Ids], eos_id: int, dtype: npt.DTypeLike) -> tuple[Ids, Lengths]:
    """Concatenate the ids of documents, each followed by `eos_id`."""
    arrays = list(pieces)
    lengths = np.fromiter((len(a) + 1 for a in arrays), np.int64, len(arrays))
    ids = np.empty(int(lengths.sum()), dtype)
    end = 0
    for array in arrays:
        start, end = end, end + len(array) + 1
        ids[start : end - 1] = array
        ids[end - 1] = eos_id
    return ids, lengths


def lengths_between(ids: Ids, eos_id: int) -> Lengths:
    """The (documents,) lengths of documents that were encoded as one, each ending with `eos_id`."""
    return np.diff(np.flatnonzero(ids == eos_id), prepend=-1).astype(np.int64)


class UnspellableError(UserError):
    """A text has something that the tokenizer has no token for."""


def lacking(kind: str, text: str, position: int) -> UnspellableError:
    """Say which character of a text the tokenizer cannot spell."""
    character = text[position]
    name = f"'{character}' (U+{ord(character):04X})" if character.isprintable() else f"U+{ord(character):04X}"
    return UnspellableError(f"the {kind} tokenizer lacks the character {name} at position {position} of the text")


def refuse_surrogates(kind: str, text: str) -> None:
    """Raise UserError for the first lone surrogate of a text: it has no UTF-8 form, so no tokenizer can spell it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise lacking(kind, text, error.start) from None


def write_identity(folder: Path, kind: str, **content: object) -> None:
    """Write `llmtrain_tokenizer.json`: the kind, and for table tokenizers the whole vocabulary."""
    text = json.dumps({"kind": kind, **content}, ensure_ascii=True, indent=1)
    (folder / IDENTITY).write_text(text + "\n", encoding="utf-8")


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Read `llmtrain_tokenizer.json`; None where a folder has none (a tokenizer from elsewhere).

    Raises:
        CorruptError: the file is not what `write_identity` writes.
    """
    path = folder / IDENTITY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CorruptError(f"{path}: not JSON ({error}); prepare the data again") from error
    if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
        raise CorruptError(f"{path}: names no tokenizer kind; prepare the data again")
    return content
