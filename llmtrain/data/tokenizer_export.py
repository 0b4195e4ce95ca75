"""Any tokenizer as a `tokenizer.json`, which `tokenizers` and `transformers` load and which gives the same ids.

What the library does otherwise, and no file can tell it not to: it takes the spelling of a special token in a text for
that token (`encode_special_tokens = True` switches that off), it reads U+2581 as a space in a SentencePiece model, it
leaves characters out that a `char` vocabulary without `<unk>` lacks, and its Unicode may be newer than Python's, which
matters to `word` where a letter is so new that Python does not know it for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from llmtrain.data.tokenizer_base import Tokenizer
from llmtrain.data.tokenizer_fast import probes, special_token
from llmtrain.data.tokenizer_hf import HuggingFaceTokenizer, byte_letters
from llmtrain.data.tokenizer_none import NoTokenizer
from llmtrain.data.tokenizer_sentencepiece import EXISTING, SPACE_SYMBOL, SentencePieceTokenizer
from llmtrain.errors import UserError

# Python's \w, \s and so on in the words of the library, whose own differ: ² is of Python's \w, a combining accent not.
WORD, BLANK = r"[\p{L}\p{N}_]", r"[\s\x1c-\x1f]"
WORD_PIECES = rf"{WORD}+| +|\n+|\t+|{BLANK}|[^\p{{L}}\p{{N}}_\s\x1c-\x1f]"
# How Qwen2 and 2.5 cut a text into words: `PRETOKENIZE_REGEX` in transformers' models/qwen2/tokenization_qwen2.py.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Far below any piece's score: the library would take the spelling of such a piece in a text for the piece.
NEVER = -1e6
Json = dict[str, Any]


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the content of a `tokenizer.json`.

    Raises:
        UserError: there is no tokenizer, or the library cannot give its ids.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.content
    if isinstance(tokenizer, NoTokenizer):
        raise UserError("no tokenizer is known: the data was prepared from token files with --vocab-size alone")
    if isinstance(tokenizer, SentencePieceTokenizer):
        content = _sentencepiece(tokenizer)
    else:
        content = {"byte": _byte, "char": _char, "word": _word}[tokenizer.kind](tokenizer)
    text = json.dumps(content, ensure_ascii=False)
    if (differing := _first_difference(tokenizer, text)) is not None:
        raise UserError(
            f"this {tokenizer.kind} tokenizer has no tokenizer.json with its ids: `tokenizers` gives others to"
            f" {differing!r}"
        )
    return text


def _file(model: Json, specials: Mapping[str, int], **parts: Any) -> Json:
    """A whole file: the model, what goes before and after it, and the special tokens."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(name, token) for name, token in sorted(specials.items(), key=lambda s: s[1])],
        "normalizer": parts.get("normalizer"),
        "pre_tokenizer": parts.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": parts.get("decoder"),
        "model": model,
    }


def _byte(tokenizer: Tokenizer) -> Json:
    specials = {"<bos>": 256, "<eos>": 257, "<pad>": 258}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    model: Json = {"type": "BPE", "vocab": {**vocab, **specials}, "merges": []}
    return _file(model, specials, pre_tokenizer=level, decoder=level)


def _char(tokenizer: Tokenizer) -> Json:
    vocab, specials = _table(tokenizer)
    unk = "<unk>" if tokenizer.unk_id is not None else None
    model: Json = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": unk, "fuse_unk": False}
    return _file(model, specials, decoder={"type": "Fuse"})


def _word(tokenizer: Tokenizer) -> Json:
    vocab, specials = _table(tokenizer)
    split = {"type": "Split", "pattern": {"Regex": WORD_PIECES}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    return _file(model, specials, pre_tokenizer=split, decoder={"type": "Fuse"})


def _table(tokenizer: Tokenizer) -> tuple[dict[str, int], dict[str, int]]:
    """The vocabulary of `char` or `word`, and the special tokens among it."""
    specials = {"<eos>": tokenizer.eos_id}
    if tokenizer.unk_id is not None:
        specials["<unk>"] = tokenizer.unk_id
    texts = {tokenizer.token_bytes(token).decode(): token for token in range(tokenizer.eos_id)}
    return {**texts, **specials}, specials


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Json:
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if (bpe := tokenizer.bpe_config()) is not None:
        unspellable = {text for text, _, kind in tokenizer.scored_pieces() if kind != "text"}
        merges = [pair for pair in bpe["model"]["merges"] if "".join(pair) not in unspellable]
        normalizers = bpe["normalizer"]["normalizers"]
        if any(part["type"] == "Prepend" for part in normalizers):
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        decoder = {"type": "Sequence", "decoders": decoders}
        return {**bpe, "model": {**bpe["model"], "merges": merges}, "decoder": decoder}
    if tokenizer.kind == EXISTING:
        raise UserError("of SentencePiece models made elsewhere only BPE with bytes for what is lacking has one")
    pieces = tokenizer.scored_pieces()
    specials = {text: token for token, (text, _, kind) in enumerate(pieces) if kind == "special"}
    vocab = [[text, score if kind == "text" else NEVER] for text, score, kind in pieces]
    model = {"type": "Unigram", "unk_id": specials["<unk>"], "vocab": vocab, "byte_fallback": True}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}
    decoder = {"type": "Sequence", "decoders": decoders}
    return _file(model, specials, normalizer=spaces, pre_tokenizer=_isolated(pieces), decoder=decoder)


def _isolated(pieces: Sequence[tuple[str, float, str]]) -> Json | None:
    """Cut around each character that the vocabulary lacks and the spelling of a special piece or of a byte has.

    To the library one such piece is likelier than two characters that are unknown; cut apart, it is not found. No other
    piece has such a character, so nothing else changes.
    """
    known = {text for text, _, kind in pieces if kind == "text"}
    lacking = {character for text, _, kind in pieces if kind != "text" for character in text} - known
    if not lacking:
        return None
    pattern = {"Regex": "|".join(sorted(map(re.escape, lacking)))}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _first_difference(tokenizer: Tokenizer, content: str) -> str | None:
    """Find a text, of many kinds, of which the library gives other ids."""
    library = tokenizers.Tokenizer.from_str(content)
    library.encode_special_tokens = True
    for text in probes():
        if SPACE_SYMBOL in text:
            text = text.replace(SPACE_SYMBOL, "")  # noqa: PLW2901
        try:
            expected = tokenizer.encode(text)
        except UserError:  # a character that it lacks
            continue
        if not np.array_equal(library.encode(text, add_special_tokens=False).ids, expected):
            return text
    return None


def hugging_face_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, str]:
    """The files of a Hugging Face model folder that make up its tokenizer, by name.

    A document begins behind the id that ends one: no other that could stand before it occurs in prepared data. So the
    end is the beginning too, as GPT-2 has it, for whoever puts a first token before a text.

    Args:
        tokenizer: of any kind.
        seq_len: longest sequence of the model, in tokens.

    Raises:
        UserError: see `tokenizer_json`.
    """
    content = _without_additions(tokenizer_json(tokenizer))
    library = tokenizers.Tokenizer.from_str(content)
    ids = {"bos": tokenizer.eos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id}
    ids["pad"] = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": library.id_to_token(token) for name, token in ids.items() if token is not None},
    }
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def is_read_as_qwen(content: str) -> bool:
    """Whether a `tokenizer.json` gives the same ids as the tokenizer of Qwen2 with its vocabulary and merges.

    In a folder of a Qwen2 model transformers 5 takes only these from the file, whatever else it says.
    """
    parsed = json.loads(tokenizers.Tokenizer.from_str(content).to_str())  # where every key is there
    model, words = parsed["model"], parsed["pre_tokenizer"]
    parts = words.get("pretokenizers", []) if words else []
    split = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    own = [{**part, "trim_offsets": None} for part in (split, level)]
    return (
        parsed["normalizer"] == {"type": "NFC"}
        and [{**part, "trim_offsets": None} for part in parts] == own  # these change no id
        and model["type"] == "BPE"
        and not any(model.get(key) for key in ("unk_token", "dropout", "byte_fallback", "ignore_merges"))
    )


def _without_additions(content: str) -> str:
    """Take out what adds ids to a text, such as the first id of Llama's own files, or cuts it: nothing here does."""
    library = tokenizers.Tokenizer.from_str(content)
    added = library.num_special_tokens_to_add(is_pair=False)
    if not added and library.truncation is None and library.padding is None:
        return content
    parsed = json.loads(content)
    post_processor = None if added else parsed["post_processor"]
    changed = {**parsed, "post_processor": post_processor, "truncation": None, "padding": None}
    return json.dumps(changed, ensure_ascii=False)
