"""What is decided before the text is encoded, by reading it: which part is for validation, and the tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from llmtrain.data.corpus import ReadOptions, cut_into_chunks, read_documents, told
from llmtrain.data.encode import Division, SplitName
from llmtrain.data.files import SourceFile
from llmtrain.data.pieces import AS_USUAL, Pieces
from llmtrain.data.split import Picker, Splitter
from llmtrain.data.tokenizer import Tokenizer, fit_tokenizer
from llmtrain.errors import UserError

ENOUGH_DOCUMENTS = 20  # from here on `val_by: auto` sets whole documents aside
# Tokenizers learn from at most so much text, taken evenly from the whole input; `char` must see every character.
SAMPLE_BYTES = {"char": None, "word": 200 << 20, "bbpe": 200 << 20, "bpe": 50 << 20, "unigram": 50 << 20}


def choose_splitter(
    source: str,
    files: Sequence[SourceFile],
    reading: ReadOptions,
    *,
    val_split: float,
    val_by: Literal["auto", "document", "tail"],
    seed: int,
) -> Splitter:
    """Decide how the share `val_split` of the text is set aside, reading no more documents than that takes.

    `source` is what errors call the input.

    Raises:
        UserError: there is no text, or there are too few documents to set whole ones aside, as was asked for.
    """
    by_document = Splitter(val_split, "document", seed)
    by_tail = Splitter(val_split, "tail", seed)
    enough = ENOUGH_DOCUMENTS if val_by == "auto" else 1
    count, sides = 0, set()
    skipped: Counter[str] = Counter()
    for chunk in cut_into_chunks(files, reading):
        for ordinal, text in read_documents(chunk, reading, skipped):
            if val_split == 0 or val_by == "tail":
                return by_tail
            count += 1
            sides.add(by_document.divide(ordinal, text)[0] == "")
            if count >= enough and len(sides) == 2:
                return by_document
    if count == 0:
        raise _no_text(source, files, skipped)
    if val_by == "auto":
        return by_tail
    raise UserError(
        f"{count} documents are too few to set {val_split:g} of them aside; use --val-by tail or a larger --val-split"
    )


def _no_text(source: str, files: Sequence[SourceFile], skipped: Counter[str]) -> UserError:
    if skipped and not {"empty documents", "bad lines"} & skipped.keys():
        what_to_do = "name files of text, or leave less out"
    elif all(file.is_text for file in files):
        what_to_do = "name other files"
    else:
        what_to_do = "name the field that has it by --text-field, or other files"
    return UserError(f"{source}: no text in it{f' ({told(skipped)})' if skipped else ''}; {what_to_do}")


def fit(
    files: Sequence[SourceFile], division: Division, kind: str, vocab_size: int | None, pieces: Pieces = AS_USUAL
) -> Tokenizer:
    """Fit a tokenizer on (a sample of) the training documents of an input; see `fit_tokenizer`."""

    def documents(split: SplitName) -> Iterator[str]:
        return division.documents(cut_into_chunks(files, division.reading), split)

    limit = SAMPLE_BYTES.get(kind)
    training = documents("train") if limit is None else _sample(files, division, limit)
    return fit_tokenizer(kind, training, vocab_size, documents("val"), pieces)


def _sample(files: Sequence[SourceFile], division: Division, limit: int) -> Iterator[str]:
    """Yield training documents of at most `limit` characters together, from chunks spread over the whole input."""
    picker = Picker(min(1.0, limit / max(1, sum(file.bytes for file in files))), division.seed)
    chunks = enumerate(cut_into_chunks(files, division.reading))
    picked = (chunk for index, chunk in chunks if picker.picks(index))
    empty = True
    for document in _at_most(division.documents(picked, "train"), limit):
        empty = False
        yield document
    if empty:  # few chunks, and none with training text was picked
        yield from _at_most(division.documents(cut_into_chunks(files, division.reading), "train"), limit)


def _at_most(documents: Iterator[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document[:characters]
        characters -= len(document)
        if characters <= 0:
            return
