"""The fast way from text to ids: `gigatoken`, given nothing it could take for a special token.

Measured on one core with 12 MB of Python source: byte-level BPE 180 to 370 MB/s where `tokenizers` has 4, SentencePiece
BPE 50 to 110 MB/s where `sentencepiece` has 6. The slow library stays the reference: `FastEncoder.agrees_with` decides
whether the fast one may stand in for it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gigatoken import gigatoken_rs

from llmtrain.data.pieces import CHOICES
from llmtrain.data.tokenizer_base import Ids, Lengths, close_documents, lengths_between

# A noncharacter of Unicode, never assigned: it stands for the end of a document between documents that are encoded as
# one string, and around the names of special tokens to make them unspellable.
SEPARATOR = "\U0010ffff"
# Another one, which stands where text is cut before it is cut into words.
CUT = "\U0010fffe"
RESERVED = (CUT, SEPARATOR)
# Below this mean length (in characters) a call per document costs more than the joined call (11 against 61 MB/s at
# 100 characters); above it the joined call is the slower one (270 against 440 MB/s at 16,000).
JOIN_BELOW_CHARACTERS = 2000
PROBE = (
    "The quick brown fox can't jump over 12345.678 lazy dogs, we'll see.\n\n\tdef f(x):\r\n      return  x**2   # ok  ",
    "  Größe, naïve café, Ελληνικά, Русский текст, עברית, العربية, हिन्दी, ไทย, 日本語のテスト, 한국어, 中文字符。",
    "🎉👩\u200d👩\u200d👧 e\u0301 \u00a0\u2003\u200b\ufeff \u2581 ½ ² Ⅷ ﬁ İ ß \x00\x01\x7f",
    "<|x|> <s> [SEP] ##a '' \"\" https://a.b/c?d=e&f=%20 _a__b A1b2C3",
)
SHUFFLED_PROBES = 200


class FastEncoder:
    """Text to ids through `gigatoken`.

    Args:
        config: a parsed tokenizer.json from `unspellable`.
        eos_id: closes documents.
        dtype: of the ids.

    Raises:
        ValueError: `gigatoken` does not support such a tokenizer.
    """

    def __init__(self, config: dict[str, Any], eos_id: int, dtype: npt.DTypeLike):
        words, cuts = _without_cuts(config.get("pre_tokenizer"))
        self._cuts = re.compile(f"({cuts})") if cuts is not None else None
        self._cut_id = 1 + max(eos_id, *config["model"]["vocab"].values()) if cuts is not None else -1
        added = [*config["added_tokens"], special_token(SEPARATOR, eos_id)]
        if cuts is not None:
            added.append(special_token(CUT, self._cut_id))
        changed = {**config, "added_tokens": added, "pre_tokenizer": words}
        try:
            self._backend: Any = gigatoken_rs.load_hf_json(json.dumps(changed))
        except Exception as error:  # of no documented kind
            raise ValueError(f"gigatoken: {error}") from error
        self._eos_id, self._dtype = eos_id, dtype

    def encode(self, text: str) -> Ids:
        """Return the (tokens,) ids of a text without what is `RESERVED`."""
        if self._cuts is None:
            return np.asarray(self._backend.encode(text), self._dtype)
        # Three times as fast as to substitute each.
        ids = np.asarray(self._backend.encode(CUT.join(filter(None, self._cuts.split(text)))))
        return np.asarray(ids[ids != self._cut_id], self._dtype)

    def encode_documents(self, documents: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode documents without what is `RESERVED`, each closed by the end-of-document id."""
        if sum(map(len, documents)) < JOIN_BELOW_CHARACTERS * len(documents):
            ids = self.encode(SEPARATOR.join([*documents, ""]))
            return ids, lengths_between(ids, self._eos_id)
        return close_documents(map(self.encode, documents), self._eos_id, self._dtype)

    def agrees_with(self, reference: Callable[[str], Ids]) -> bool:
        """Say whether texts of many kinds, and their pieces shuffled, get the ids of the reference."""
        return all(np.array_equal(self.encode(text), reference(text)) for text in probes())


def holds(text: str, characters: Sequence[str]) -> bool:
    """Say whether one of a few characters is in a text.

    One by one: a set of a regular expression takes as long as to encode the text, where this knows at once that a text
    of narrower characters has none of the wide ones.
    """
    return any(character in text for character in characters)


def probes() -> tuple[str, ...]:
    """Texts of many kinds, and their pieces shuffled."""
    lots = random.Random(0)
    pieces = [text[start : start + 3] for text in PROBE for start in range(len(text))]
    shuffled = ("".join(lots.choices(pieces, k=lots.randrange(20))) for _ in range(SHUFFLED_PROBES))
    return (*PROBE, *shuffled)


def unspellable(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a copy of a parsed tokenizer.json that gives the same ids, but never those of `names`, and adds none.

    Both libraries match the spelling of a special token in text, which would let a document forge its own end.
    """
    hidden = {name: hide(name) for name in names}
    model = dict(config["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(token, token): i for token, i in model["vocab"].items()}
    else:  # Unigram: pairs of token and score
        model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    added = [token for token in config.get("added_tokens") or [] if token["content"] not in names]
    return {
        **config,
        "model": model,
        "added_tokens": added,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def hide(name: str) -> str:
    """What a special token is called where no text shall spell it."""
    return f"{SEPARATOR}{name}{SEPARATOR}"


def with_cuts(words: dict[str, Any], cuts: str) -> dict[str, Any]:
    """A pre-tokenizer that cuts around each match of `cuts`, and what is between into words."""
    split = {"type": "Split", "pattern": {"Regex": cuts}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, words]}


def _without_cuts(pre_tokenizer: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str | None]:
    """Take apart what `with_cuts` made: gigatoken knows the words, and the cuts are made before it sees the text."""
    for cuts in filter(None, (pieces.cuts() for pieces in CHOICES)):
        words = (pre_tokenizer or {}).get("pretokenizers", [None])[-1]
        if words is not None and pre_tokenizer == with_cuts(words, cuts):
            return words, cuts
    return pre_tokenizer, None


def special_token(content: str, token_id: int) -> dict[str, Any]:
    """One entry of `added_tokens` in a tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **flags, "special": True}
