"""What a `tokenizer.json` does with what it cannot spell: an id for it, a refusal, and never nothing at all.

The library leaves a character out where a BPE vocabulary lacks it and names no unknown token, and fails with words of
its own where another model does. So the end of a document, which no text spells, is made its unknown token: it stands
in the ids of just those texts. Where it can be read in a file that it spells every text, nobody looks.
"""

from __future__ import annotations

from typing import Any

import tokenizers

from llmtrain.data.tokenizer_base import UnspellableError, lacking

# Neither overlong forms nor what is beyond U+10FFFF.
UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
Json = dict[str, Any]


def unknown_id(config: Json, library: tokenizers.Tokenizer) -> int | None:
    """The id of a parsed tokenizer.json for what it cannot spell; None where it has none, or names one it lacks."""
    model = config["model"]
    if isinstance(model["vocab"], list):  # Unigram
        return None if model.get("unk_id") is None else int(model["unk_id"])
    name = library.model.unk_token
    return None if name is None else library.model.token_to_id(name)


def spells_every_text(config: Json, letters: list[str]) -> bool:
    """Say whether it can be read in a parsed tokenizer.json that it has all bytes, and makes its tokens of them.

    Args:
        config: from `unspellable`.
        letters: the stand-in of each byte.
    """
    model = config["model"]
    vocab = set(model["vocab"] if isinstance(model["vocab"], dict) else (token for token, _ in model["vocab"]))
    if model["type"] not in ("BPE", "Unigram"):
        return False
    if model.get("byte_fallback") and vocab.issuperset(f"<0x{byte:02X}>" for byte in UTF8_BYTES):
        return True
    # Of a character that begins a word, ends it, is all of it, or is inside.
    before, after = {"", model.get("continuing_subword_prefix") or ""}, {"", model.get("end_of_word_suffix") or ""}
    return _last(config.get("pre_tokenizer")).get("type") == "ByteLevel" and vocab.issuperset(
        b + letters[byte] + a for byte in UTF8_BYTES for b in before for a in after
    )


def marked(config: Json, eos: str, eos_id: int) -> Json:
    """Return a copy of a parsed tokenizer.json that gives `eos_id` for what it cannot spell, else the same ids.

    Args:
        config: from `numbered`, without an unknown token.
        eos: what the end of a document is called there, which no text spells.
        eos_id: its id.
    """
    # Fused, they could not be told apart, to name the first.
    unknown = {"unk_id": eos_id} if isinstance(config["model"]["vocab"], list) else {"unk_token": eos}
    return {**config, "model": {**config["model"], **unknown, "fuse_unk": False}}


def numbered(config: Json, ids: dict[str, int]) -> Json:
    """Return a copy of a parsed tokenizer.json whose model has all added tokens: else the library numbers them anew.

    Args:
        config: from `unspellable`, which leaves out the special ones.
        ids: of all added tokens, those with the names that `unspellable` gives them.
    """
    vocab = config["model"]["vocab"]
    if isinstance(vocab, dict):
        return {**config, "model": {**config["model"], "vocab": {**ids, **vocab}}}
    more = sorted((token_id, name) for name, token_id in ids.items() if token_id >= len(vocab))
    lowest = min((score for _, score in vocab), default=0.0)  # of lower ones the unknown would become less likely
    return {**config, "model": {**config["model"], "vocab": [*vocab, *([name, lowest] for _, name in more)]}}


def refuse_unknown(kind: str, text: str, encoding: tokenizers.Encoding, mark: int) -> None:
    """Raise UnspellableError where a text, encoded by one that is `marked`, has what cannot be spelled.

    Args:
        kind: of the tokenizer.
        text: what was encoded.
        encoding: its ids and offsets.
        mark: the id that stands for what is lacking.
    """
    if mark not in encoding.ids:
        return
    start, end = encoding.offsets[encoding.ids.index(mark)]
    what = str(lacking(kind, text, min(start, len(text) - 1)))
    if end - start > 1:
        what = f"the {kind} tokenizer lacks {text[start:end][:40]!r} at position {start} of the text"
    raise UnspellableError(f"{what}, and has no token for what it does not know; take a tokenizer that has either")


def _last(pre_tokenizer: Json | None) -> Json:
    steps = (pre_tokenizer or {}).get("pretokenizers")
    return _last(steps[-1]) if steps else pre_tokenizer or {}
