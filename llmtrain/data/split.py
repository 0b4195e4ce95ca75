"""Which part of the text is for training and which for validation, and the altered copies that training may get.

Both are pure functions of (seed, ordinal of the document), so they need no memory and no order of work.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

PUNCTUATION = re.compile(r"[^\w\s]")
BLANKS = re.compile(r"\s+")
FLIP_CASE_OF = 0.1  # of the letters
DROP = 0.5  # of the punctuation marks
CHANGE_BLANKS = 0.3  # of the runs of blanks
OTHER_BLANKS = (" ", "  ", "\n", "\t")
AUGMENTATIONS = ("case", "punctuation", "whitespace")


def stable_hash(*parts: object) -> int:
    """64 bits that depend on nothing but the parts: no hash seed, machine or version."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Picker:
    """Picks a fraction of the numbers 0, 1, 2, …: one, drawn by lot, out of each stretch of 1/fraction numbers.

    Lots over each stretch, not over each number, keep the share exact from the first stretch on.
    """

    fraction: float
    seed: int

    def picks(self, number: int) -> bool:
        """Say whether `number` is picked."""
        if self.fraction <= 0:
            return False
        share = _exactly(self.fraction)
        stretch = number * share.numerator // share.denominator
        return number == self._lot(stretch, share)

    @functools.lru_cache(maxsize=64)  # noqa: B019 -- keyed by value: a Picker is frozen
    def _lot(self, stretch: int, share: Fraction) -> int:
        first, end = (-(-s * share.denominator // share.numerator) for s in (stretch, stretch + 1))
        return first + stable_hash("pick", self.seed, stretch) % (end - first)


@functools.cache
def _exactly(fraction: float) -> Fraction:
    return Fraction(str(fraction))  # what the user wrote, 1/20, and not the binary number nearest to it


@dataclass(frozen=True)
class Splitter:
    """Divides documents into a training and a validation part, whole (`document`) or each at its end (`tail`)."""

    fraction: float
    by: Literal["document", "tail"]
    seed: int

    def divide(self, ordinal: int, text: str) -> tuple[str, str]:
        """Return the training and the validation part of a document; either may be empty."""
        if self.fraction <= 0:
            return text, ""
        if self.by == "document":
            return ("", text) if Picker(self.fraction, self.seed).picks(ordinal) else (text, "")
        # At least one character on either side, where there are two.
        cut = min(max(1, int(len(text) * (1 - self.fraction))), max(1, len(text) - 1))
        return text[:cut], text[cut:]


def augmented(text: str, kinds: tuple[str, ...], seed: int, ordinal: int) -> list[str]:
    """Return one altered copy of a document per kind of change (`AUGMENTATIONS`)."""
    return [_alter(text, kind, random.Random(stable_hash(kind, seed, ordinal))) for kind in kinds]


def _alter(text: str, kind: str, lots: random.Random) -> str:
    if kind == "case":
        return "".join(c.swapcase() if c.isalpha() and lots.random() < FLIP_CASE_OF else c for c in text)
    if kind == "punctuation":
        return PUNCTUATION.sub(lambda mark: "" if lots.random() < DROP else mark[0], text)

    def other_blanks(run: re.Match[str]) -> str:
        return OTHER_BLANKS[int(lots.random() * len(OTHER_BLANKS))] if lots.random() < CHANGE_BLANKS else run[0]

    return BLANKS.sub(other_blanks, text)
