"""Whether two tokenizers give every text the same ids, though they may be saved in different files."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tokenizers

from llmtrain.data.tokenizer_base import Tokenizer
from llmtrain.data.tokenizer_export import tokenizer_json
from llmtrain.data.tokenizer_fast import probes
from llmtrain.errors import UserError

# What of a tokenizer.json decides about ids; compared as the library writes it, so that spelling does not matter.
_PARTS = ("model", "normalizer", "pre_tokenizer")


def first_difference(theirs: Tokenizer, ours: Tokenizer) -> str | None:
    """Say in what two tokenizers differ; None: their vocabularies are the same, and so are the ids of all texts.

    Where text is normalised and cut by other rules, the ids of texts of many kinds decide.

    Args:
        theirs: called "it".
        ours: called "the data's".
    """
    try:
        left, right = (tokenizers.Tokenizer.from_str(tokenizer_json(one)) for one in (theirs, ours))
    except UserError as error:
        return f"they cannot be compared ({error})"
    if difference := _vocabularies(left.get_vocab(), right.get_vocab()):
        return difference
    parts = [_parts(json.loads(one.to_str())) for one in (left, right)]
    if parts[0] == parts[1]:
        return None
    if _merges(parts[0]) != _merges(parts[1]):
        return "it joins pieces by other merges"
    for text in probes():
        ids = [_ids(one, text) for one in (theirs, ours)]
        if not np.array_equal(*ids):
            return f"it gives other ids to {text!r}"
    return None


def _vocabularies(left: dict[str, int], right: dict[str, int]) -> str | None:
    if left == right:
        return None
    if len(left) != len(right):
        return f"it has {len(left):,} ids, the data's {len(right):,}"
    by_id = {token: text for text, token in right.items()}
    token, text = min((token, text) for text, token in left.items() if by_id.get(token) != text)
    return f"its id {token} is {text!r}, the data's is {by_id.get(token)!r}"


def _parts(content: dict[str, Any]) -> dict[str, Any]:
    return {name: content.get(name) for name in _PARTS}


def _merges(parts: dict[str, Any]) -> Any:
    return parts["model"].get("merges")


def _ids(tokenizer: Tokenizer, text: str) -> Any:
    try:
        return tokenizer.encode(text)
    except UserError:  # a character that it lacks
        return ()
