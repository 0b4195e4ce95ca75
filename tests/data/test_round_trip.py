"""A tokenizer from elsewhere that changes the text is told of, once and with an example; no other is."""

from __future__ import annotations

import json
from itertools import chain, repeat
from pathlib import Path

import pytest
import tokenizers

from llmtrain.data.round_trip import first_change
from llmtrain.data.tokenizer import KINDS, fit_tokenizer
from llmtrain.prepare import main as prepare
from tests.conftest import Call
from tests.data.test_tokenizer import fitted, library_text

TEXT = "The Cat sat, on the Mat.\n\n    The ﬁsh  did not.\n"


def lossy(folder: Path, normalizer: object = None, exact: bool = True) -> Path:
    """Byte-level BPE, but for the normalizer; or words without their blanks."""
    library = tokenizers.Tokenizer.from_str(fitted("bbpe").content)
    if not exact:
        library = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        library.decoder = tokenizers.decoders.WordPiece()
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]", "</s>"], show_progress=False
        )
        library.train_from_iterator([TEXT.replace("ﬁ", "")], trainer)
    if normalizer is not None:
        library.normalizer = normalizer
    library.save(str(folder / "t.json"))
    return folder / "t.json"


@pytest.mark.parametrize(
    ("normalizer", "change"),
    [
        (None, None),
        (tokenizers.normalizers.Lowercase(), ("The Cat sat, on the ", "the cat sat, on the ")),
        (tokenizers.normalizers.NFKC(), ("\n\n    The ﬁsh  did not.\n", "\n\n    The fish  did not.\n")),
    ],
)
def test_the_first_change_is_shown_with_what_is_around_it(tmp_path, normalizer, change):
    tokenizer = fit_tokenizer(str(lossy(tmp_path, normalizer)), ())
    assert first_change(tokenizer, ["the cat", TEXT]) == change
    assert first_change(tokenizer, []) is None


def test_what_is_unknown_hides_no_other_change_and_is_none_itself(tmp_path):
    tokenizer = fit_tokenizer(str(lossy(tmp_path, exact=False)), ())
    assert first_change(tokenizer, ["☃", "The ☃", "The"]) is None
    assert first_change(tokenizer, ["☃\nThe  Cat ☃\nThe  Cat\n"]) == ("The  Cat\n", "The Cat")


def test_no_more_than_it_takes_is_read(tmp_path):
    tokenizer = fit_tokenizer(str(lossy(tmp_path, tokenizers.normalizers.Lowercase())), ())
    documents = chain(["small"] * 9, ["Large"], repeat("small"))
    assert first_change(tokenizer, documents) == ("Large", "large")
    assert next(documents) == "small"
    assert first_change(tokenizer, documents) is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_was_made_here_is_not_tried(kind):
    assert first_change(fitted(kind), (pytest.fail("read") for _ in range(1))) is None


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bbpe"])
def test_a_file_of_one_that_was_made_here_gives_all_text_back(kind, tmp_path):
    fitted(kind).save(tmp_path)
    existing = fit_tokenizer(str(tmp_path / ("tokenizer.json" if kind == "bbpe" else "tokenizer.model")), ())
    assert first_change(existing, [TEXT, *library_text()]) is None


@pytest.mark.parametrize("parts", [1, 2])
def test_prepare_warns_once_and_the_manifest_keeps_it(tmp_path: Path, call: Call, parts: int) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(40)))
    path = lossy(tmp_path, tokenizers.normalizers.Lowercase())
    command = ("--input", tmp_path / "a.jsonl", "--tokenizer", path, "--out", tmp_path / "out", "--json")
    told = ""
    for number in range(1, parts + 1):
        code, out, err = call(prepare, *command, *(() if parts == 1 else ("--part", f"{number}/{parts}")))
        told += err
        assert code == 0
    assert told.count("does not give the text back exactly") == 1
    assert f"{path}: this tokenizer does not give the text back exactly: 'The Cat" in told
    change = ["The Cat sat, on the ", "the cat sat, on the "]
    assert json.loads(out)["not_given_back"] == change
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]["not_given_back"] == change


def test_prepare_says_nothing_of_one_that_gives_the_text_back(tmp_path: Path, call: Call) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 20)
    command = ("--input", tmp_path / "a.txt", "--tokenizer", lossy(tmp_path), "--out", tmp_path / "out")
    assert call(prepare, *command)[::2] == (0, "")
    assert "not_given_back" not in json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
