"""Every tokenizer can be had as a tokenizer.json that `tokenizers` loads, and that gives the same ids and texts."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llmtrain.data.pieces import Pieces
from llmtrain.data.tokenizer import KINDS, Tokenizer, fit_tokenizer, load_tokenizer
from llmtrain.data.tokenizer_export import tokenizer_json
from llmtrain.data.tokenizer_none import NoTokenizer
from llmtrain.errors import UserError
from llmtrain.prepare import main as prepare
from llmtrain.tokenizer import main
from tests.conftest import Call, is_one_clear_line
from tests.data.test_tokenizer import ANY_TEXT, FORGERIES, fitted, library_text

WORDS = st.lists(
    st.sampled_from(["import", " os", "\n\n", "    ", "return", "x²", "e\u0301", "٣", "<eos>", "\x1c", "_a"])
)
TEXTS = st.one_of(ANY_TEXT, WORDS.map("".join))


@cache
def exported(kind: str) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_str(tokenizer_json(fitted(kind)))
    library.encode_special_tokens = True  # or the spelling of a special token in a text would become it
    return library


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(text=TEXTS)
@example(text=FORGERIES.replace("\u2581", ""))
@example(text="   leading, trailing   ")
def test_the_library_gives_the_same_ids_and_the_same_text(kind: str, text: str) -> None:
    tokenizer, library = fitted(kind), exported(kind)
    assume("\u2581" not in text or kind not in ("bpe", "unigram"))
    if kind == "char":
        text = "".join(character for character in text if can_spell(character))
    if kind == "word":
        text = "".join(character for character in text if unicodedata.category(character) != "Cn")
    ids = tokenizer.encode(text).tolist()
    assert library.encode(text, add_special_tokens=False).ids == ids
    if tokenizer.unk_id is None or tokenizer.unk_id not in ids:
        assert library.decode(ids, skip_special_tokens=False) == text


@cache
def can_spell(character: str) -> bool:
    try:
        fitted("char").encode(character)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_text_and_the_special_tokens_are_the_same(kind: str) -> None:
    tokenizer, library = fitted(kind), exported(kind)
    for text in library_text()[:4]:
        text = text.replace("\u2581", "")  # noqa: PLW2901
        assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()
    assert library.get_vocab_size() == tokenizer.vocab_size
    specials = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
    assert {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id} - {None} <= specials
    assert library.decode([tokenizer.eos_id]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "unigram", "byte"])
def test_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(tokenizer_json(fitted(kind)), encoding="utf-8")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "import os  \n    x = 1\n"
    ids = fitted(kind).encode(text).tolist()
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("kind", ["char", "word"])
def test_what_is_unknown_becomes_the_same_id(kind: str) -> None:
    tokenizer = fit_tokenizer(kind, ["a b ab"], validation=["z"])
    library = tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer))
    ids, _ = tokenizer.encode_documents(["zz a!"])
    assert library.encode("zz a!").ids == ids[:-1].tolist()
    assert library.token_to_id("<unk>") == tokenizer.unk_id


def test_python_and_the_library_agree_on_what_a_word_is() -> None:
    # What is not assigned in Python's Unicode may be a letter in the library's, which is newer.
    every = "".join(c for c in map(chr, range(0x30000)) if unicodedata.category(c) not in ("Cs", "Cn"))
    tokenizer = fit_tokenizer("word", [" ".join(every)], vocab_size=None)
    split = tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer)).pre_tokenizer
    from llmtrain.data.tokenizer_table import WORD_PIECES

    for begin in range(0, len(every), 997):
        part = "a".join(every[begin : begin + 997])
        ours = WORD_PIECES.findall(part)
        theirs = [piece for piece, _ in split.pre_tokenize_str(part)]
        assert ours == theirs, next((a, b) for a, b in zip(ours, theirs, strict=False) if a != b)


def test_an_existing_file_is_handed_on_as_it_is(tmp_path: Path) -> None:
    fitted("bbpe").save(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    assert tokenizer_json(fit_tokenizer(str(tmp_path / "tokenizer.json"), [])) == content
    style = fit_tokenizer("bbpe", library_text()[:3], 300, pieces=Pieces("split", "split"))
    assert tokenizer_json(style) == style.content


def test_an_existing_sentencepiece_model_keeps_its_dummy_prefix(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    lines = [line for text in library_text()[:5] for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "their.model").write_bytes(model.getvalue())
    tokenizer = fit_tokenizer(str(tmp_path / "their.model"), [])
    library = tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer))
    for text in ("import os", "  x\n\n", "Größe"):
        ids = tokenizer.encode(text).tolist()
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert library.decode(ids) == tokenizer.decode(ids) == text


def test_no_tokenizer_has_no_file() -> None:
    with pytest.raises(UserError, match="no tokenizer is known"):
        tokenizer_json(NoTokenizer(10))


def ids_in(text: str, folder: Path) -> list[int]:
    tokenizer: Tokenizer = load_tokenizer(folder)
    return [int(token) for token in np.asarray(tokenizer.encode(text))]


def test_the_verb_shows_and_writes_the_tokenizer_of_data_and_of_a_run(
    tmp_path: Path, trained_run: Path, call: Call
) -> None:
    (tmp_path / "book.txt").write_text("import os\n" * 300)
    data, file = tmp_path / "data", tmp_path / "tokenizer.json"
    assert call(prepare, "--input", tmp_path / "book.txt", "--tokenizer", "unigram", "--out", data)[0] == 0
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    code, out, err = call(main, data, "--out", file, "--text", "import os\n\x1b", "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert b"".join(bytes.fromhex(token["hex"]) for token in shown["tokens"]) == b"import os\n\x1b"
    assert tokenizers.Tokenizer.from_file(str(file)).encode("import os\n").ids == ids_in(
        "import os\n", data / "tokenizer"
    )
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before, "the data stays as it was"
    assert call(main, data, "--out", file)[0] == 0, "the same again is no trouble"
    code, _, err = call(main, trained_run, "--out", file)
    assert code == 2 and is_one_clear_line(err) and "is another" in err
    code, out, _ = call(main, trained_run, "--text", "the\ncat")
    assert code == 0 and out.startswith("char, ") and "\n" in out and "\x1b" not in out
    code, out, _ = call(main, trained_run / "step-00000010")
    assert code == 0 and out.startswith("char, ")
    (tmp_path / "empty").mkdir()
    code, _, err = call(main, tmp_path / "empty")
    assert code == 2 and is_one_clear_line(err)
