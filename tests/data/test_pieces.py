"""--digits and --whitespace: tokens are cut where they say, text still comes back, and a resume knows them."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.data.pieces import Pieces
from llmtrain.data.shards import TokenDataset
from llmtrain.data.tokenizer import Tokenizer, fit_tokenizer, load_tokenizer
from llmtrain.data.tokenizer_fast import CUT, SEPARATOR
from llmtrain.errors import UserError
from llmtrain.prepare import main as prepare
from tests.conftest import Call, is_one_clear_line
from tests.data.test_tokenizer import ANY_TEXT, FORGERIES, library_text

NUMBERS = "".join(
    f"def f{i}(x):\n        if x == {i * 2000 + 1970}:\n                return  {i}{i}  # 2024 2025\n\n\n\t\tpass\n"
    for i in range(300)
)


@cache
def text_of_all() -> str:
    """Numbers, runs of blanks, and enough else to learn from."""
    return NUMBERS + "".join(library_text()[:4])


STYLES = [Pieces("split"), Pieces("join", "split"), Pieces("split", "split"), Pieces("split", "join")]
FITTED = [(kind, style) for kind in ("bbpe", "bpe", "unigram") for style in STYLES]
BLANKS_AND_DIGITS = st.lists(st.sampled_from("01 \n\tax. é٣²")).map("".join)
NUMBER, RUN = re.compile("[0-9]{2}"), re.compile(r"[ \t\n\r\x0b\x0c]{2}")


@cache
def fitted(kind: str, style: Pieces) -> Tokenizer:
    return fit_tokenizer(kind, [text_of_all()], 350, pieces=style)


def texts_of(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in range(tokenizer.vocab_size)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "style"), FITTED)
@settings(max_examples=60)
@given(text=st.one_of(ANY_TEXT, BLANKS_AND_DIGITS))
@example(text=f"{FORGERIES}{CUT}12{CUT}  {CUT}")
@example(text="1 22  333   \n\n4444\t\t5 ")
def test_any_text_comes_back_cut_where_it_was_asked_for(kind: str, style: Pieces, text: str) -> None:
    tokenizer = fitted(kind, style)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    together, _ = tokenizer.encode_documents([text, "", text * 40])
    alone = [tokenizer.encode(document).tolist() for document in (text, "", text * 40)]
    assert together.tolist() == [token for document in alone for token in [*document, tokenizer.eos_id]]


@pytest.mark.parametrize("kind", ["bbpe", "bpe", "unigram"])
def test_vocabularies_join_and_split_as_they_are_told(kind: str) -> None:
    by_itself = {"digits": True, "whitespace": kind == "bbpe"}  # as the help says
    for style in [Pieces(), *STYLES]:
        texts = texts_of(fitted(kind, style))
        for name, pattern in {"digits": NUMBER, "whitespace": RUN}.items():
            expected = {"join": True, "split": False, None: by_itself[name]}[getattr(style, name)]
            assert any(map(pattern.search, texts)) == expected, (style, name)


def test_saying_what_a_kind_does_anyway_changes_nothing(tmp_path: Path) -> None:
    for kind, style in {"bbpe": Pieces("join", "join"), "bpe": Pieces("join", "split")}.items():
        files = []
        for number, pieces in enumerate((Pieces(), style)):
            folder = tmp_path / f"{kind}{number}"
            folder.mkdir()
            fit_tokenizer(kind, [text_of_all()], 350, pieces=pieces).save(folder)
            files.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert files[0] == files[1]


@pytest.mark.parametrize("style", STYLES)
def test_cut_documents_take_the_fast_way_with_the_ids_of_the_library(style: Pieces, tmp_path: Path) -> None:
    tokenizer = fitted("bbpe", style)
    assert tokenizer._fast is not None
    tokenizer.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    documents = [text_of_all(), "x  12 ٣٤ ²\r\n", "", f"{SEPARATOR}1", f"12{CUT}34"]
    ids, lengths = load_tokenizer(tmp_path).encode_documents(documents)
    assert ids.dtype == np.uint16 and int(lengths.sum()) == len(ids)
    assert ids.tolist() == [i for text in documents for i in [*library.encode(text).ids, tokenizer.eos_id]]


@pytest.mark.parametrize("kind", ["char", "byte", "word"])
def test_a_kind_without_the_choice_refuses_it(kind: str, tmp_path: Path, call: Call) -> None:
    with pytest.raises(UserError, match="--digits split: for bpe, unigram, bbpe"):
        fit_tokenizer(kind, ["a"], pieces=Pieces("split"))
    code, out, err = call(prepare, "--tokenizer", kind, "--whitespace", "join", "--out", tmp_path / "out")
    assert (code, out) == (2, "") and is_one_clear_line(err) and "--whitespace join" in err
    assert not (tmp_path / "out").exists()


def test_prepare_writes_the_choice_down_and_other_choices_are_other_data(tmp_path: Path, call: Call) -> None:
    book, out = tmp_path / "book.txt", tmp_path / "out"
    book.write_text(text_of_all())
    usual = ["--input", book, "--vocab-size", "350", "--out", out]
    run = [*usual, "--digits", "split", "--whitespace", "split"]
    assert call(prepare, *run)[0] == 0
    request = TokenDataset(out).manifest.recipe["request"]
    assert (request["digits"], request["whitespace"]) == ("split", "split")
    tokenizer = load_tokenizer(out / "tokenizer")
    assert not any(NUMBER.search(text) or RUN.search(text) for text in texts_of(tokenizer))
    code, printed, _ = call(prepare, *run, "--json")
    assert code == 0 and json.loads(printed)["already_prepared"]
    for other in (usual, [*usual, "--digits", "split"]):
        code, _, err = call(prepare, *other)
        assert code == 2 and is_one_clear_line(err) and "other input or options" in err
    assert call(prepare, *usual[:-1], tmp_path / "usual")[0] == 0
    assert "digits" not in TokenDataset(tmp_path / "usual").manifest.recipe["request"]
