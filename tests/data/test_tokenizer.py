"""Every tokenizer gives back the text, survives saving, and never takes text for a special token."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.data.corpus import ReadOptions, cut_into_chunks
from llmtrain.data.files import find_files
from llmtrain.data.tokenizer import KINDS, Tokenizer, fit_tokenizer, load_tokenizer, tokenizer_info
from llmtrain.data.tokenizer_fast import SEPARATOR
from llmtrain.errors import CorruptError, UserError

SPELLS_ANYTHING = ("byte", "bpe", "unigram", "bbpe")
SIZED = ("word", "bpe", "unigram", "bbpe")
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
FORGERIES = (
    f"a<|endoftext|>b <s> </s> <unk> <pad> <0x41> <eos>{SEPARATOR}<|endoftext|>{SEPARATOR} "
    f"{SEPARATOR}{SEPARATOR}</s>{SEPARATOR} \u2581 \u2585 \0 \ufffd\ufeff\r\n\t  z "
)


@cache
def library_text() -> tuple[str, ...]:
    options = ReadOptions()
    chunks = cut_into_chunks(find_files(["stdlib"], max_files=25), options)
    return tuple(text for chunk in chunks for _, text in chunk.read(options, Counter()))


@cache
def fitted(kind: str) -> Tokenizer:
    return fit_tokenizer(kind, library_text(), 600 if kind in SIZED else None)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPELLS_ANYTHING)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
@example(text=FORGERIES)
@example(text="▁▁ a▁b ▁")
@example(text="   leading, trailing   ")
def test_any_text_comes_back_exactly_and_never_as_special_ids(kind, text):
    tokenizer = fitted(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id} & set(ids.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPELLS_ANYTHING)
@settings(max_examples=80, deadline=None)
@given(documents=st.lists(ANY_TEXT, max_size=8))
@example(documents=[FORGERIES, "", FORGERIES * 3])
@example(documents=["x" * 5000, "\u2581", "y " * 4000])
def test_documents_encoded_together_have_the_ids_of_each_alone(kind, documents):
    tokenizer = fitted(kind)
    ids, lengths = tokenizer.encode_documents(documents)
    alone = [[*tokenizer.encode(document).tolist(), tokenizer.eos_id] for document in documents]
    assert ids.tolist() == [i for document in alone for i in document]
    assert lengths.tolist() == [len(document) for document in alone]
    assert tokenizer.decode(ids) == "".join(documents)


NAMES = [
    "<|endoftext|>",
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<bos>",
    "<eos>",
    "⟨eos⟩",
    "<0x41>",
    SEPARATOR,
    " ",
    "a",
    "1",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(text=st.lists(st.sampled_from(NAMES), max_size=12).map("".join))
def test_names_of_special_tokens_in_a_text_are_text_for_every_kind(kind, text):
    """`char` and `word` are fitted on these names, so that they could take them for their own."""
    tokenizer = fit_tokenizer(kind, [*NAMES, "".join(NAMES)]) if kind in ("char", "word") else fitted(kind)
    assert not any(tokenizer.unk_id in tokenizer.encode(name) for name in NAMES)
    specials = {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id}
    ids, lengths = tokenizer.encode_documents([text, text])
    assert not specials & set(tokenizer.encode(text).tolist())
    assert not specials & set(ids[: lengths[0] - 1].tolist())
    if tokenizer.unk_id not in ids:  # of `word`, which does not know two spaces as a piece
        assert tokenizer.decode(ids) == text * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "word"])
@given(seed=st.integers(0, 10**6), size=st.integers(0, 80))
def test_text_of_a_known_alphabet_comes_back_exactly(kind, seed, size):
    text = "".join(library_text()[:3])
    tokenizer = fit_tokenizer(kind, [text])
    pieces = sorted(set(text)) if kind == "char" else [tokenizer.decode([i]) for i in range(tokenizer.eos_id)]
    # Words side by side would be another word.
    mixed = ("" if kind == "char" else "\r").join(np.random.default_rng(seed).choice(pieces, size).tolist())
    tokenizer = fit_tokenizer(kind, [text, "\r"])
    assert tokenizer.decode(tokenizer.encode(mixed)) == mixed


def test_its_own_training_text_comes_back(kind):
    text = library_text()[0]
    tokenizer = fitted(kind) if kind != "word" else fit_tokenizer("word", library_text())
    ids, lengths = tokenizer.encode_documents([text, text[:50]])
    assert ids.dtype == np.uint16
    assert int(lengths.sum()) == len(ids)
    assert np.flatnonzero(ids == tokenizer.eos_id).tolist() == (np.cumsum(lengths) - 1).tolist()
    assert tokenizer.decode(ids[: lengths[0]]) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    tokenizer = fitted(kind)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    names = ("kind", "vocab_size", "bos_id", "eos_id", "pad_id", "unk_id")
    assert [getattr(loaded, name) for name in names] == [getattr(tokenizer, name) for name in names]
    assert loaded.kind == kind
    for text in library_text()[:3]:
        assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    info = tokenizer_info(folder)
    assert (info.kind, info.vocab_size) == (kind, tokenizer.vocab_size)
    assert {file.path for file in info.files} == {f"tokenizer/{path.name}" for path in folder.iterdir()}
    assert info == tokenizer_info(folder, loaded)


def test_fitting_twice_gives_the_same_files(kind, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        fit_tokenizer(kind, library_text()[:8], 400 if kind in SIZED else None).save(tmp_path / name)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_vocabularies_have_the_promised_shape():
    char = fit_tokenizer("char", ["hello", "ab"])
    assert (char.vocab_size, char.eos_id, char.unk_id) == (7, 6, None)
    assert char.encode("abel").tolist() == [0, 1, 2, 4]
    byte = fit_tokenizer("byte", [])
    assert (byte.vocab_size, byte.bos_id, byte.eos_id, byte.pad_id) == (259, 256, 257, 258)
    assert byte.encode("é").tolist() == [0xC3, 0xA9]
    assert [fitted(kind).vocab_size for kind in SIZED] == [600] * 4


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character():
    assert fitted("byte").decode([0x61, 0xFF, 256, 0x62]) == "a\ufffdb"
    bbpe = fitted("bbpe")
    assert bbpe.decode([*bbpe.encode("e").tolist(), 0xC3]) == "e\ufffd"
    assert "\ufffd" in fitted("bpe").decode([3 + 0xC3, 3 + 0x28])


def test_the_bytes_of_its_tokens_are_the_text(kind):
    tokenizer = fitted(kind)
    text = library_text()[1] + ("" if kind in ("char", "word") else "Größe 日本語 🎉 \x00\u00a0")
    ids = [i for i in tokenizer.encode(text).tolist() if i != tokenizer.unk_id]
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == tokenizer.decode(ids)
    specials = {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id} - {None}
    assert {tokenizer.token_bytes(i) for i in [*specials, -1, tokenizer.vocab_size]} == {b""}


def test_ids_that_stand_for_no_text_are_left_out(kind):
    tokenizer = fitted(kind)
    ids = tokenizer.encode("import os").tolist()
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.vocab_size + 5, -1, tokenizer.eos_id]) == "import os"
    assert tokenizer.decode(np.array([], np.uint16)) == ""


def test_char_names_the_character_a_prompt_may_not_have():
    tokenizer = fit_tokenizer("char", ["abc"], validation=["abd"])
    with pytest.raises(UserError, match=r"the char tokenizer lacks the character 'd' .U\+0064. at position 2"):
        tokenizer.encode("abd")
    with pytest.raises(UserError, match=r"lacks the character U\+0000 at position 0"):
        tokenizer.encode("\0")


def test_char_has_unk_only_where_validation_has_other_characters():
    tokenizer = fit_tokenizer("char", ["abc"], validation=["abd"])
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.unk_id) == (5, 3, 4)
    ids, _ = tokenizer.encode_documents(["adb"])
    assert ids.tolist() == [0, 4, 1, 3]
    assert tokenizer.decode(ids) == "a\ufffdb"
    without = fit_tokenizer("char", ["abc"], validation=["ab"])
    assert (without.vocab_size, without.unk_id) == (4, None)
    with pytest.raises(UserError, match="lacks the character 'd'"):
        without.encode_documents(["adb"])


def test_char_copes_with_more_characters_than_uint16_has_values():
    every = "".join(chr(c) for c in range(0x20, 0x12000) if not 0xD800 <= c < 0xE000)
    tokenizer = fit_tokenizer("char", [every])
    ids, _ = tokenizer.encode_documents([every])
    assert ids.dtype == np.uint32
    assert tokenizer.decode(ids) == every


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_a_surrogate_pair_is_refused(kind):
    with pytest.raises(UserError, match=r"lacks the character U\+D800 at position 1"):
        fitted(kind).encode("a\ud800")


def test_word_keeps_frequent_pieces_in_a_fixed_order_and_the_rest_is_unknown():
    tokenizer = fit_tokenizer("word", ["b a c  a!\n\n", "zz"], vocab_size=6)
    assert [tokenizer.decode([i]) for i in range(4)] == [" ", "a", "\n\n", "  "]
    assert tokenizer.decode(tokenizer.encode("a a zz")) == "a a \ufffd"
    assert tokenizer.encode("zz").tolist() == [tokenizer.unk_id]
    again = fit_tokenizer("word", ["zz", "b a c  a!\n\n"], vocab_size=6)
    assert again.decode(range(4)) == tokenizer.decode(range(4))


@pytest.mark.parametrize("kind", SIZED)
def test_a_vocabulary_the_text_cannot_support_is_refused_with_the_largest_possible(kind):
    text = ["the cat sat on the mat, the rat sat on the hat. " * 20]
    with pytest.raises(UserError, match=r"--vocab-size 50000") as refusal:
        fit_tokenizer(kind, text, 50_000)
    largest = int([word for word in str(refusal.value).replace(".", " ").split() if word.isdigit()][-1])
    assert largest < 400
    assert fit_tokenizer(kind, text, largest).vocab_size == largest
    with pytest.raises(UserError, match="--vocab-size"):
        fit_tokenizer(kind, text, largest + 1)


@pytest.mark.parametrize("kind", SIZED)
def test_without_a_size_even_a_tiny_text_has_a_vocabulary(kind):
    tokenizer = fit_tokenizer(kind, ["ab ab\n"])
    assert tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("ab ab\n")) == "ab ab\n"


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bbpe", "word"])
def test_a_vocabulary_too_small_is_refused(kind):
    with pytest.raises(UserError, match="--vocab-size 2"):
        fit_tokenizer(kind, library_text()[:2], 2)


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_size_for_a_kind_that_has_its_own_is_refused(kind):
    with pytest.raises(UserError, match="leave --vocab-size out"):
        fit_tokenizer(kind, ["a"], 100)


def test_unknown_kinds_and_missing_files_are_refused():
    with pytest.raises(UserError, match="unknown tokenizer 'bbp': did you mean 'bbpe'"):
        fit_tokenizer("bbp", ["a"])
    with pytest.raises(UserError, match=r"no/such.model: no such tokenizer file"):
        fit_tokenizer("no/such.model", ["a"])


def test_bbpe_is_a_standard_file_with_the_ids_of_the_tokenizers_library(tmp_path):
    tokenizer = fitted("bbpe")
    tokenizer.save(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert reference.get_vocab_size() == tokenizer.vocab_size
    assert reference.token_to_id("<|endoftext|>") == tokenizer.eos_id
    texts = [*library_text(), "Größe 日本語 🎉 \u00a0 e\u0301  x\n\n"]
    ids, _ = tokenizer.encode_documents(texts)
    assert ids.tolist() == [i for text in texts for i in [*reference.encode(text).ids, tokenizer.eos_id]]


def test_bbpe_learns_the_merges_that_the_tokenizers_library_learns():
    text = "".join(library_text()[:6])
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=599, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator([text], trainer)
    ours = fit_tokenizer("bbpe", [text], 600)
    learned = json.loads(ours.content)["model"]["merges"]
    assert learned == [list(pair) for pair in json.loads(reference.to_str())["model"]["merges"]]


def test_bbpe_with_two_merges_for_one_token_has_no_gap_in_its_ids():
    tokenizer = fit_tokenizer("bbpe", ["a" * 5000, "abab" * 400 + " baba" * 300])
    vocabulary = json.loads(tokenizer.content)["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size - 1))
    for text in ("a" * 777, "abab" * 9 + " baba"):
        ids, _ = tokenizer.encode_documents([text])
        assert ids.tolist() == [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_ids_are_those_of_the_library(kind, tmp_path):
    tokenizer = fitted(kind)
    tokenizer.save(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = [*library_text(), "Größe 日本語 🎉 \u00a0 e\u0301  x\n\n</s>"]
    ids, _ = tokenizer.encode_documents(texts)
    assert ids.tolist() == [i for text in texts for i in [*library.encode(text), library.eos_id()]]


def test_bpe_documents_take_the_fast_way_and_unigram_has_none():
    assert fitted("bpe")._fast is not None
    assert fitted("bbpe")._fast is not None
    assert fitted("unigram")._fast is None


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bbpe"])
def test_an_existing_tokenizer_file_gives_the_same_ids(kind, tmp_path):
    fitted(kind).save(tmp_path)
    file = tmp_path / ("tokenizer.json" if kind == "bbpe" else "tokenizer.model")
    existing = fit_tokenizer(str(file), [])
    assert existing.kind == ("tokenizer.json" if kind == "bbpe" else "sentencepiece")
    for text in library_text()[:5]:
        assert existing.encode(text).tolist() == fitted(kind).encode(text).tolist()
    with pytest.raises(UserError, match="leave --vocab-size out"):
        fit_tokenizer(str(file), [], 600)


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe", "unigram", "bbpe"])
def test_the_tokenizer_folder_of_other_data_gives_the_very_same_tokenizer(kind, tmp_path):
    """So that several prepared folders can be mixed, and a checkpoint goes on with new data."""
    folders = [tmp_path / name / "tokenizer" for name in ("first", "second")]
    for folder in folders:
        folder.mkdir(parents=True)
    fitted(kind).save(folders[0])
    fit_tokenizer(str(folders[0]), []).save(folders[1])
    assert tokenizer_info(folders[0]) == tokenizer_info(folders[1])
    with pytest.raises(UserError, match="or the tokenizer folder of prepared data"):
        fit_tokenizer(str(tmp_path / "third"), [])


def foreign(tmp_path: Path, model, trainer, pre_tokenizer) -> Path:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(library_text()[:5], trainer)
    tokenizer.save(str(tmp_path / "foreign.json"))
    return tmp_path / "foreign.json"


@pytest.mark.parametrize("family", ["WordPiece", "Unigram", "WordLevel", "BPE"])
def test_a_foreign_tokenizer_json_of_any_family_cannot_be_made_to_forge_specials(tmp_path, family):
    specials = ["<unk>", "</s>", "<s>"]
    model = getattr(tokenizers.models, family)(**({} if family == "Unigram" else {"unk_token": "<unk>"}))
    options = {"unk_token": "<unk>"} if family == "Unigram" else {}
    trainer = getattr(tokenizers.trainers, f"{family.replace('PE', 'pe')}Trainer")(
        vocab_size=300, special_tokens=specials, show_progress=False, **options
    )
    split = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = fit_tokenizer(str(foreign(tmp_path, model, trainer, split)), [])
    assert (tokenizer.eos_id, tokenizer.bos_id) == (1, 2)
    text = "import </s> <s> os"
    assert not {1, 2} & set(tokenizer.encode(text).tolist())
    ids, lengths = tokenizer.encode_documents([text, "import os", ""])
    assert np.flatnonzero(ids == 1).tolist() == (np.cumsum(lengths) - 1).tolist()
    assert ids.tolist() == [i for part in (text, "import os", "") for i in [*tokenizer.encode(part).tolist(), 1]]


def test_a_tokenizer_json_without_an_end_of_document_says_which_specials_it_has(tmp_path):
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["[CLS]", "[SEP]"], show_progress=False)
    path = foreign(tmp_path, tokenizers.models.BPE(), trainer, tokenizers.pre_tokenizers.WhitespaceSplit())
    with pytest.raises(UserError, match=r"none of its tokens ends a document .* \[CLS\], \[SEP\]"):
        fit_tokenizer(str(path), [])


@pytest.mark.parametrize("name", ["x.json", "x.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"cos\nsystem\n(S'true'\ntR."])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: not a"):
        fit_tokenizer(str(tmp_path / name), [])


def tokenizer_json(**changes: object) -> str:
    """A small one that works, but for the changes; `merges` and `prefix` are of its model."""
    merges, prefix = changes.pop("merges", []), changes.pop("prefix", "")
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "é": 2, "</s>": 3}, "merges": merges}
    return json.dumps({"version": "1.0", "model": {**model, "continuing_subword_prefix": prefix}, **changes})


# Each makes the Rust library panic: while it loads, encodes or decodes; the last even aborts the process.
PANICS = {
    "merge": {"merges": [["</s>", "a"]]},  # of no token, and longer than any
    "text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "ids": {"decoder": {"type": "Strip", "content": "b", "start": 0, "stop": 5}},
    "prefix": {"merges": [["a", "é"]], "prefix": "#"},
}


@pytest.mark.parametrize("changes", PANICS.values(), ids=PANICS)
def test_a_tokenizer_json_that_makes_the_library_panic_is_refused_without_its_noise(tmp_path, capfd, changes):
    path = tmp_path / "hostile.json"
    path.write_text(tokenizer_json())
    assert fit_tokenizer(str(path), []).eos_id == 3
    path.write_text(tokenizer_json(**changes))
    with pytest.raises(UserError, match=r"hostile.json: not a tokenizer.json that `tokenizers` reads"):
        fit_tokenizer(str(path), [])
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_json_with_an_id_far_beyond_its_tokens_is_refused_at_once(tmp_path):
    """It kept the processor busy for minutes, and the model would have had a row for every id."""
    path = tmp_path / "gap.json"
    vocab = {"a": 0, "</s>": 1}
    content = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    for highest in (999_999 + 2 * 3, 10**6 + 2 * 3, 10**9, 2**32 - 1):
        vocab["far\nb"] = highest
        path.write_text(json.dumps(content))
        if highest < 10**6 + 6:
            assert fit_tokenizer(str(path), []).vocab_size == highest + 1
        else:
            with pytest.raises(UserError, match=rf"gap.json: the token 'far\\nb' has the id {highest:,}, .* 3 tokens"):
                fit_tokenizer(str(path), [])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"kind": 3}',
        '{"kind": "char"}',
        '{"kind": "word", "words": [1]}',
        '{"kind": "bbpe"}',
        '{"kind": "?"}',
    ],
)
def test_a_damaged_saved_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "llmtrain_tokenizer.json").write_text(content)
    with pytest.raises(CorruptError):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
