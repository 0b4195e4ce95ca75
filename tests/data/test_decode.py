"""Text while it is written: equal to the whole in the end, never taken back, cut exactly at stop strings."""

from __future__ import annotations

import io

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.decode import INCOMPLETE, IncrementalDecoder, StopStrings
from llmtrain.data.tokenizer import Tokenizer, fit_tokenizer
from llmtrain.data.tokenizer_hf import HuggingFaceTokenizer
from llmtrain.data.tokenizer_sentencepiece import SentencePieceTokenizer

TEXT = "The café is naïve, 日本語 und Größe, 🎉 party! def f(x): return x ** 2 # ok\n  indented  twice\n" * 20


def sentencepiece_with_a_dummy_prefix() -> Tokenizer:
    """As most published models are: a space is put before every text, and dropped again when it is decoded."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=350, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


def tokenizer_json_with_a_dummy_prefix() -> Tokenizer:
    """The same habit in a `tokenizer.json`, as those of Llama and its kin have it."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    inner.train_from_iterator(TEXT.splitlines(), trainer)
    return HuggingFaceTokenizer(inner.to_str())


TOKENIZERS = {
    "char": fit_tokenizer("char", [TEXT]),
    "byte": fit_tokenizer("byte", [TEXT]),
    "word": fit_tokenizer("word", [TEXT]),
    "bpe": fit_tokenizer("bpe", [TEXT], 350),
    "bbpe": fit_tokenizer("bbpe", [TEXT], 300),
    "dummy prefix": sentencepiece_with_a_dummy_prefix(),
    "metaspace": tokenizer_json_with_a_dummy_prefix(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150)
@given(data=st.data())
def test_the_pieces_make_the_whole_for_any_ids(name: str, data: st.DataObject) -> None:
    """Any ids at all, as a model may choose them: bytes that are no character, control ids, spaces in a row."""
    tokenizer = TOKENIZERS[name]
    ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    prompt, written = tokenizer.encode(data.draw(st.sampled_from(["", "The", "日本", "x "]))).tolist(), data.draw(ids)
    decoder = IncrementalDecoder(tokenizer, prompt)
    pieces = [decoder.add(token) for token in written]
    assert not any(piece.endswith(INCOMPLETE) for piece in pieces)
    whole = tokenizer.decode(prompt + written)
    assert tokenizer.decode(prompt) + "".join(pieces) + decoder.finish() == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_text_comes_out_as_it_went_in(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    text = "Größe 日本語 🎉 party!"
    ids = tokenizer.encode(text).tolist()
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(map(decoder.add, ids)) + decoder.finish() == tokenizer.decode(ids)
    if name not in ("dummy prefix", "metaspace"):
        assert tokenizer.decode(ids) == text


def test_a_character_of_several_bytes_comes_whole() -> None:
    decoder = IncrementalDecoder(TOKENIZERS["byte"])
    assert [decoder.add(byte) for byte in "a🎉b".encode()] == ["a", "", "", "", "🎉", "b"]


@pytest.mark.parametrize("name", ["dummy prefix", "metaspace"])
def test_the_space_before_the_first_word_is_kept(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    party = tokenizer.encode("party").tolist()
    after = IncrementalDecoder(tokenizer, tokenizer.encode("The").tolist())
    assert "".join(map(after.add, party)) + after.finish() == " party"


def first_cut(text: str, stops: list[str]) -> str:
    """The definition: the shortest beginning that ends in a stop string, less the longest such."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(
    pieces=st.lists(st.text("ab.", max_size=4), max_size=12),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
def test_the_cut_is_the_same_however_the_text_is_cut_into_pieces(pieces: list[str], stops: list[str]) -> None:
    passing = StopStrings(stops)
    passed = ""
    for piece in pieces:
        passed += passing.add(piece)
        if passing.found:
            break
    passed += passing.finish()
    text = "".join(pieces)
    assert passed == first_cut(text, stops)
    assert passing.found == (passed != text)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    passing = StopStrings(["\n\n", "END"])
    assert [passing.add(piece) for piece in ("one\n", "two", " E", "N", "X")] == ["one", "\ntwo", " ", "", "ENX"]
