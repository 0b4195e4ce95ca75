"""Whether a tokenizer from elsewhere gives back the very text it is given: many lower-case it, or join its blanks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from llmtrain.data.tokenizer import KINDS, Tokenizer
from llmtrain.errors import UserError

DOCUMENTS, BEGINNING = 250, 2000  # so many, and characters of each, are tried: a tenth of a second or two
MOST_READ = 1 << 24  # characters, after which no further document is read for it
BEFORE, BEHIND = 10, 20  # characters that are shown around the first difference


def first_change(tokenizer: Tokenizer, documents: Iterable[str]) -> tuple[str, str] | None:
    """Try a tokenizer on the beginnings of documents; what becomes unknown is left out, for it is counted.

    Args:
        tokenizer: one that was made here is not tried: all that it can spell comes back.
        documents: as many are taken as it takes.

    Returns:
        A few characters around the first that does not come back, and what they come back as; None if all do.
    """
    if tokenizer.kind in KINDS:
        return None
    read = 0
    for document in islice(documents, DOCUMENTS):
        text, read = document[:BEGINNING], read + len(document)
        if (back := _there_and_back(tokenizer, text)) is None:
            pairs = [(line, _there_and_back(tokenizer, line)) for line in text.splitlines(keepends=True)]
        else:
            pairs = [(text, back)]
        for given, got in pairs:
            if got is not None and got != given:
                both = enumerate(zip(given, got, strict=False))
                place = next((i for i, (one, other) in both if one != other), min(len(given), len(got)))
                shown = slice(max(0, place - BEFORE), place + BEHIND)
                return given[shown], got[shown]
        if read > MOST_READ:
            break
    return None


def _there_and_back(tokenizer: Tokenizer, text: str) -> str | None:
    """What a text comes back as; None if some of it is unknown."""
    try:
        ids = tokenizer.encode(text)
    except UserError:  # which `prepare` refuses or leaves out where it comes to it
        return None
    return None if tokenizer.unk_id is not None and tokenizer.unk_id in ids else tokenizer.decode(ids)
