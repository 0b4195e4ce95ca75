"""Tokenizers that only the slow library can do encode many documents at once: the same ids, on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.data import tokenizer_hf
from llmtrain.data.tokenizer_hf import HuggingFaceTokenizer
from llmtrain.errors import UserError
from tests.data.test_tokenizer import ANY_TEXT, FORGERIES, library_text

BYTES = "byte-level BPE without some bytes"
FAMILIES = ("WordPiece", "WordLevel", "Unigram", "BPE", BYTES)
PIECES = st.lists(st.sampled_from(["import", " os", "\n\n", "self.", "\u0301", "é", "</s>", "<call>", "x" * 40, " "]))
TEXTS = st.one_of(ANY_TEXT, PIECES.map("".join))


@cache
def slow(family: str) -> HuggingFaceTokenizer:
    """One that is fitted on code, and that gigatoken does not do."""
    name, options = family, {"unk_token": "<unk>"}
    if family == BYTES:
        name, library = "BPE", tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        library = tokenizers.Tokenizer(getattr(tokenizers.models, name)(**({} if name == "Unigram" else options)))
        library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = getattr(tokenizers.trainers, f"{name.replace('PE', 'pe')}Trainer")(
        vocab_size=600, special_tokens=["<unk>", "</s>"], show_progress=False,
        **(options if name == "Unigram" else {}),
    )  # fmt: skip
    library.train_from_iterator(library_text()[:5], trainer)
    library.add_tokens(["<call>"])
    return HuggingFaceTokenizer(library.to_str())


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(documents=st.lists(TEXTS, max_size=8), room=st.sampled_from([1, 30, 10**6]))
@example(documents=[FORGERIES, "", FORGERIES * 3], room=100)
@example(documents=["", "", ""], room=1)
def test_documents_in_batches_have_the_ids_of_each_alone(family: str, documents: list[str], room: int) -> None:
    tokenizer = slow(family)
    assert tokenizer._fast is None
    try:
        alone = [[*tokenizer.encode(document).tolist(), tokenizer.eos_id] for document in documents]
    except UserError as error:
        refusal = str(error)
        with pytest.raises(UserError) as refused:
            tokenizer.encode_documents(documents)
        assert str(refused.value) == refusal
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_hf, "BATCH_CHARACTERS", room)
        ids, lengths = tokenizer.encode_documents(documents)
    assert ids.tolist() == [i for document in alone for i in document]
    assert lengths.tolist() == [len(document) for document in alone]
    assert ids.dtype == tokenizer.encode("").dtype


def test_half_of_a_surrogate_pair_among_documents_is_refused() -> None:
    with pytest.raises(UserError, match=r"lacks the character U\+D800 at position 1"):
        slow("WordPiece").encode_documents(["a", "a\ud800"])


def test_batches_are_of_bounded_size_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_hf, "BATCH_CHARACTERS", 10)
    batches = list(tokenizer_hf._batches(["aaaa", "bbbbbb", "c", "d" * 30, "", "e"]))
    assert batches == [["aaaa", "bbbbbb"], ["c"], ["d" * 30], ["", "e"]]
    assert list(tokenizer_hf._batches([])) == []


COUNTING = """
import os, sys
from pathlib import Path
from llmtrain.data.tokenizer import fit_tokenizer
tokenizer = fit_tokenizer(sys.argv[1], ())
before = len(os.listdir("/proc/self/task"))
tokenizer.encode_documents(["import os and more"] * 500)
print(len(os.listdir("/proc/self/task")) - before, os.environ.get("TOKENIZERS_PARALLELISM"))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads of a process")
@pytest.mark.parametrize("setting", [None, "true"])
def test_it_takes_one_thread_and_leaves_the_setting_as_it_was(tmp_path: Path, setting: str | None) -> None:
    (tmp_path / "t.json").write_text(slow("WordPiece").content)
    environment = {name: value for name, value in os.environ.items() if name != tokenizer_hf.THREADS}
    if setting is not None:
        environment[tokenizer_hf.THREADS] = setting
    command = [sys.executable, "-c", COUNTING, str(tmp_path / "t.json")]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"0 {setting}\n"
