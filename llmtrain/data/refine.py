"""What is done to a document once it is read: one form of Unicode, limits of length, filters, no copies of others."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmtrain.data.filter_module import FilterModule
from llmtrain.data.filters import FILTERS
from llmtrain.errors import UserError

# Counted like what is left out, but these documents stay.
NORMALIZED = "normalized documents"
Form = Literal["nfc", "nfkc"]
_FORMS: dict[Form, Literal["NFC", "NFKC"]] = {"nfc": "NFC", "nfkc": "NFKC"}


@dataclass(frozen=True)
class Refinement:
    """A pure function of one document.

    Args:
        normalize: the Unicode form that text is brought into before anything else looks at it.
        min_chars: shorter documents are left out.
        max_chars: longer documents are left out.
        filters: (name, value) of `filters.FILTERS`, in the order in which they look.
        module: the user's file that some of them are in.
    """

    normalize: Form | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    filters: tuple[tuple[str, float], ...] = ()
    module: FilterModule | None = None

    def __post_init__(self) -> None:
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise UserError(f"--min-chars {self.min_chars} is over --max-chars {self.max_chars}; nothing would be left")

    def __call__(self, text: str, counts: Counter[str]) -> str | None:
        """Return the text to be used; None where the document is left out, with the first reason counted."""
        changed = False
        if self.normalize is not None:
            before, text = text, unicodedata.normalize(_FORMS[self.normalize], text)
            changed = text != before
        if (reason := self._reason(text)) is not None:
            counts[reason] += 1
            return None
        counts[NORMALIZED] += changed
        return text

    def _reason(self, text: str) -> str | None:
        if self.min_chars is not None and len(text) < self.min_chars:
            return "documents under --min-chars"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "documents over --max-chars"
        if self.module is not None:
            self.module.load()  # a worker has not yet
        for name, value in self.filters:
            if not self._keeps(name, text, value):
                return f"documents by filter {name}"
        return None

    def _keeps(self, name: str, text: str, value: float) -> bool:
        try:
            return FILTERS[name].keeps(text, value)
        except Exception as error:
            if self.module is None or FILTERS[name].file is None:
                raise
            raise UserError(
                f"--filter {name}: fails on a document ({self.module.told(error)}): {text[:60]!r}"
            ) from error


NO_CHANGE = Refinement()


class Copies:
    """Says which documents are copies of earlier ones, by the file that `dedup.find_duplicates` wrote."""

    def __init__(self, path: Path):
        self._path = path
        self._marks: npt.NDArray[np.uint8] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Copies, (self._path,)  # each process maps the file by itself

    def __contains__(self, ordinal: int) -> bool:
        if self._marks is None:
            is_empty = self._path.stat().st_size == 0
            self._marks = np.empty(0, np.uint8) if is_empty else np.asarray(np.memmap(self._path, np.uint8, "r"))
        return ordinal < len(self._marks) and bool(self._marks[ordinal])
