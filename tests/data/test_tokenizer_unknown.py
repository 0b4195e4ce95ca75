"""What a `tokenizer.json` cannot spell becomes its unknown id or is refused; nothing is left out unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.data.tokenizer_fast import SEPARATOR, special_token
from llmtrain.data.tokenizer_hf import HuggingFaceTokenizer, byte_letters
from llmtrain.data.tokenizer_unknown import UTF8_BYTES
from llmtrain.errors import UserError
from llmtrain.prepare import main as prepare
from tests.conftest import Call, is_one_clear_line

EOS = "</s>"
LETTERS = byte_letters()
WORDS = {"type": "WhitespaceSplit"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
ABC = ["a", "b", "ab", "é"]
BPE = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(ABC)}, "merges": [["a", "b"]]}
# None of them has the unknown token that it names, or names one.
MODELS: dict[str, dict[str, Any]] = {
    "BPE": BPE,
    "BPE that names one": {**BPE, "unk_token": "<unk>"},
    "BPE that names the end": {**BPE, "unk_token": EOS},
    "WordLevel": {"type": "WordLevel", "vocab": BPE["vocab"], "unk_token": "<unk>"},
    "WordPiece": {
        "type": "WordPiece", "vocab": BPE["vocab"], "unk_token": "[UNK]", "continuing_subword_prefix": "",
        "max_input_chars_per_word": 100,
    },
    "Unigram": {"type": "Unigram", "vocab": [[piece, -1.0 - i] for i, piece in enumerate(ABC)], "unk_id": None},
}  # fmt: skip


def made(
    model: dict[str, Any], *added: tuple[str, bool], pre_tokenizer: dict[str, Any] | None = WORDS
) -> HuggingFaceTokenizer:
    """One with the end of a document and other added tokens, with whether each is special, behind its vocabulary."""
    tokens = [
        {**special_token(name, len(model["vocab"]) + number), "special": special}
        for number, (name, special) in enumerate([(EOS, True), *added])
    ]
    content = {"version": "1.0", "added_tokens": tokens, "pre_tokenizer": pre_tokenizer, "model": model}
    return HuggingFaceTokenizer(json.dumps(content))


def byte_level(present: Sequence[int], pre_tokenizer: dict[str, Any] = BYTES, **model: object) -> HuggingFaceTokenizer:
    vocab = {LETTERS[byte]: i for i, byte in enumerate(present)}
    return made({"type": "BPE", "vocab": vocab, "merges": [], **model}, pre_tokenizer=pre_tokenizer)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_it_lacks_is_named_with_its_place_where_it_has_no_unknown_token(model: dict[str, Any]) -> None:
    tokenizer = made(model)
    assert tokenizer.unk_id is None
    ids, lengths = tokenizer.encode_documents(["ab é", "", "ab"])
    assert (ids.tolist(), lengths.tolist()) == ([2, 3, 4, 4, 2, 4], [3, 1, 2])
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_documents(["ab", text])):
        with pytest.raises(UserError, match=r"lacks the character '日' .U.65E5. at position 5 of the text, and has no"):
            encode("ab é 日 本")
        with pytest.raises(UserError, match=r"lacks .* at position 3 of the text"):
            encode(f"ab {EOS}")


def test_an_unknown_word_is_named_whole() -> None:
    with pytest.raises(UserError, match="lacks 'cat' at position 3 of the text"):
        made(MODELS["WordLevel"]).encode("ab cat")


@pytest.mark.parametrize("family", ["BPE", "WordLevel", "WordPiece", "Unigram"])
def test_what_it_lacks_becomes_the_unknown_token_that_it_has(family: str) -> None:
    model = dict(MODELS[family])
    if family == "Unigram":
        model |= {"vocab": [*model["vocab"], ["<unk>", 0.0]], "unk_id": 4}
    else:
        model |= {"vocab": {**model["vocab"], "<unk>": 4}, "unk_token": "<unk>"}
    tokenizer = made(model, ("<unk>", True))
    assert (tokenizer.unk_id, tokenizer.eos_id) == (4, 5)
    assert tokenizer.encode("ab 日 é").tolist() == [2, 4, 3]
    assert tokenizer.encode_documents(["日", "ab"])[0].tolist() == [4, 5, 2, 5]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=100, deadline=None)
@given(present=st.sets(st.sampled_from(UTF8_BYTES), min_size=200), text=TEXT)
@example(present=set(UTF8_BYTES) - {0xA9}, text="a é")
@example(present=set(UTF8_BYTES) - {0xF4}, text=f"a{SEPARATOR}")
def test_text_of_bytes_that_it_has_comes_back_and_no_other_is_taken(present: set[int], text: str) -> None:
    tokenizer = byte_level(sorted(present))
    if set(text.encode()) <= present:
        ids = tokenizer.encode(text)
        assert bytes(sorted(present)[i] for i in ids) == text.encode()
        assert tokenizer.encode_documents([text, text])[0].tolist() == [*ids, tokenizer.eos_id] * 2
    else:
        first = next(place for place, letter in enumerate(text) if not set(letter.encode()) <= present)
        with pytest.raises(UserError, match=f"lacks the character .* at position {first} of the text"):
            tokenizer.encode(text)
        with pytest.raises(UserError, match=f"lacks the character .* at position {first} of the text"):
            tokenizer.encode_documents(["", text])


def test_one_that_has_all_bytes_takes_the_fast_way_as_before() -> None:
    assert byte_level(range(256))._fast is not None
    behind = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}
    assert byte_level(UTF8_BYTES)._is_whole and byte_level(UTF8_BYTES, behind)._is_whole
    assert not byte_level(UTF8_BYTES[1:])._is_whole
    assert not byte_level(UTF8_BYTES, end_of_word_suffix="</w>")._is_whole
    assert not byte_level(UTF8_BYTES, WORDS)._is_whole


@pytest.mark.parametrize("lacks", [None, 0xE6])
@pytest.mark.parametrize("family", ["BPE", "Unigram"])
def test_bytes_instead_of_characters_count_if_all_are_there(family: str, lacks: int | None) -> None:
    pieces = [f"<0x{byte:02X}>" for byte in range(256) if byte != lacks]
    vocab: Any = [[piece, 0.0] for piece in pieces] if family == "Unigram" else {p: i for i, p in enumerate(pieces)}
    more = {"unk_id": None} if family == "Unigram" else {"merges": []}
    tokenizer = made({"type": family, "vocab": vocab, "byte_fallback": True, **more}, pre_tokenizer=None)
    assert tokenizer.encode("é").tolist() == [pieces.index("<0xC3>"), pieces.index("<0xA9>")]
    if lacks is None:
        assert [pieces[i] for i in tokenizer.encode("日")] == ["<0xE6>", "<0x97>", "<0xA5>"]
    else:
        with pytest.raises(UserError, match=r"lacks the character '日' .* at position 0"):
            tokenizer.encode("日")
        with pytest.raises(UserError, match=r"lacks .*日"):
            tokenizer.encode_documents(["é日é"])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_added_tokens_behind_special_ones_keep_their_ids(model: dict[str, Any]) -> None:
    """The library numbers what its model lacks anew: without the special ones, those behind would get their ids."""
    tokenizer = made(model, ("<think>", False), ("<pad>", True), ("<call>", False))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (4, 6, 8)
    ids, lengths = tokenizer.encode_documents(["ab<think>ab <call>", "<think>"])
    assert (ids.tolist(), lengths.tolist()) == ([2, 5, 2, 7, 4, 5, 4], [5, 2])
    assert tokenizer.encode("ab<think>ab <call>").tolist() == [2, 5, 2, 7]


def test_added_tokens_keep_their_ids_on_the_fast_way() -> None:
    vocab = {LETTERS[byte]: byte for byte in range(256)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    tokenizer = made(model, ("<pad>", True), ("<think>", False), pre_tokenizer=BYTES)
    assert tokenizer._fast is not None
    ids, _ = tokenizer.encode_documents(["a<think>", f"{EOS}"])
    assert ids.tolist() == [97, 258, 256, *EOS.encode(), 256]
    assert np.array_equal(tokenizer.encode("a<think>"), ids[:2])


LOSSY = made(BPE).content
ONE_UNKNOWN = {**MODELS["WordLevel"], "vocab": {"ab": 0, "<unk>": 1}}


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_names_the_file_and_the_line_of_what_cannot_be_spelled(
    tmp_path: Path, call: Call, workers: int
) -> None:
    (tmp_path / "t.json").write_text(LOSSY)
    (tmp_path / "a.txt").write_text("ab é ab\n" * 9)
    (tmp_path / "b.jsonl").write_text('{"text": "ab"}\n' * 20 + '{"text": "é ¿"}\n')
    arguments = ("--tokenizer", tmp_path / "t.json", "--out", tmp_path / "out", "--workers", workers)
    code, _, err = call(prepare, "--input", tmp_path / "a.txt", "--input", tmp_path / "b.jsonl", *arguments)
    assert code == 2 and is_one_clear_line(err.splitlines(keepends=True)[-1])  # before it, that blanks are lost
    assert f"{tmp_path / 'b.jsonl'}: line 21: the tokenizer.json tokenizer lacks the character '¿'" in err
    assert "at position 2 of the text" in err and err.endswith("; --skip-bad leaves such documents out\n")
    assert not (tmp_path / "out").exists()
    (tmp_path / "c.txt").write_text("ab ¿")
    code, _, err = call(prepare, "--input", tmp_path / "c.txt", "--val-split", 0, *arguments)
    assert code == 2 and f"{tmp_path / 'c.txt'}: the tokenizer.json tokenizer lacks" in err
    code, out, _ = call(
        prepare, "--input", tmp_path / "b.jsonl", "--val-split", 0.05, "--val-by", "tail", "--skip-bad", *arguments
    )
    assert code == 0 and "  skipped: 1 documents that cannot be spelled\n" in out
    splits = json.loads((tmp_path / "out/manifest.json").read_text())["splits"]
    assert {name: split["documents"] for name, split in splits.items()} == {"train": 20, "val": 20}
    shutil.rmtree(tmp_path / "out")
    assert call(prepare, "--input", tmp_path / "a.txt", *arguments)[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_of_a_document_that_can_be_spelled_only_the_altered_copy_is_left_out(
    tmp_path: Path, call: Call, workers: int
) -> None:
    (tmp_path / "t.json").write_text(LOSSY)
    (tmp_path / "b.jsonl").write_text('{"text": "ab ab ab ab ab ab ab ab ab"}\n' * 20 + '{"text": "é ¿"}\n')
    arguments = ("--tokenizer", tmp_path / "t.json", "--out", tmp_path / "out", "--workers", workers)
    altered = ("--augment", "case", "--val-split", 0, "--skip-bad", *arguments)
    code, _, _ = call(prepare, "--input", tmp_path / "b.jsonl", *altered)
    assert code == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    left_out = manifest["recipe"]["skipped"]
    assert left_out["documents that cannot be spelled"] == 1
    copies = left_out["altered copies that cannot be spelled"]  # a tenth of the letters becomes A or B
    assert copies > 0
    assert manifest["splits"]["train"]["documents"] == 20 + 20 - copies


def test_prepare_does_not_say_that_one_from_elsewhere_was_fitted_here(tmp_path: Path, call: Call) -> None:
    (tmp_path / "t.json").write_text(made(ONE_UNKNOWN, ("<unk>", True)).content)
    (tmp_path / "a.txt").write_text("ab no ab ab")
    arguments = ("--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--val-split", 0)
    code, out, _ = call(prepare, *arguments, "--tokenizer", tmp_path / "t.json")
    assert code == 0 and "  1 tokens of train are <unk>: what the tokenizer cannot spell\n" in out
