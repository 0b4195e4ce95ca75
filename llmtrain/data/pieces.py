"""What may be in one piece of a fitted vocabulary: several digits, several blanks.

`bbpe` and SentencePiece differ in what they do by themselves: runs of blanks become tokens of `bbpe` (GPT-2's splitting
of text), of SentencePiece each blank is one. Digits are joined by both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llmtrain.errors import UserError

BLANK = r"[ \t\n\r\x0b\x0c]"
KINDS = ("bpe", "unigram", "bbpe")  # that know these choices


@dataclass(frozen=True)
class Pieces:
    """The options `--digits` and `--whitespace` of `prepare`; None is what the kind does by itself.

    Args:
        digits: `split`: each of 0 to 9 is a token of its own, so that numbers of equal length have equal shapes (as in
            PaLM and Llama 2); `join`: frequent numbers are tokens.
        whitespace: `split`: each blank is a token, or the start of one; `join`: runs of blanks are tokens, which makes
            indented text short.
    """

    digits: Literal["join", "split"] | None = None
    whitespace: Literal["join", "split"] | None = None

    def check(self, kind: str) -> None:
        """Raise UserError where something is chosen that a kind of tokenizer has no choice in."""
        for flag, value in {"--digits": self.digits, "--whitespace": self.whitespace}.items():
            if value is not None and kind not in KINDS:
                raise UserError(f"{flag} {value}: for {', '.join(KINDS)}, which are fitted; '{kind}' is as it is")

    def cuts(self) -> str | None:
        """A regular expression for what byte-level text is cut around, before it is cut into words; None: nothing."""
        parts = [r"[0-9]"] * (self.digits == "split") + [f"{BLANK}(?={BLANK})"] * (self.whitespace == "split")
        return "|".join(parts) or None


AS_USUAL = Pieces()
CHOICES = [Pieces(digits, whitespace) for digits in (None, "split") for whitespace in (None, "split")]


def cut_bytes(text: bytes, cuts: str | None, separator: bytes) -> bytes:
    """Put a separator between all that `Pieces.cuts` matches and what is around it."""
    if cuts is None:
        return text
    return separator.join(filter(None, re.split(f"({cuts})".encode(), text)))
