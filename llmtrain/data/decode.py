"""Ids to text while they are being chosen: only whole characters, cut exactly at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrain.data.tokenizer_base import Tokenizer

# What decoders write for bytes that are no character (yet).
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class IncrementalDecoder:
    """Turns one id after another into text that never changes afterwards.

    A character may take several ids, so text that ends in a replacement character is held back until it is complete.
    How an id is spelled may depend on those before it (SentencePiece drops spaces at the start of a text), so each is
    decoded together with the last ids that made text.

    Args:
        tokenizer: of the ids.
        context: ids that stand before the first one; their text is not given out.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._told = len(self._ids)  # ids whose text was given out

    def add(self, token: int) -> str:
        """Take the next id; return the text that it completes, often none."""
        self._ids.append(token)
        new = self._untold()
        if not new or new.endswith(INCOMPLETE):
            return ""
        if not new.isspace():  # spaces alone would be dropped as the start of a text, so they need what is before them
            self._ids = self._ids[self._told :]
        self._told = len(self._ids)
        return new

    def finish(self) -> str:
        """Return what was held back: bytes that never became a character, as replacement characters."""
        return self._untold()

    def _untold(self) -> str:
        told = self._tokenizer.decode(self._ids[: self._told])
        return self._tokenizer.decode(self._ids)[len(told) :]


class StopStrings:
    """Passes text on up to the first stop string, whichever pieces the text comes in.

    First is the one that is complete first, and of several that end together the longest.

    Args:
        stops: not empty strings.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""  # the start of a stop string, perhaps
        self.found = False

    def add(self, text: str) -> str:
        """Take the next piece; return what is certainly before any stop string."""
        self._held += text
        places = [(begin + len(stop), begin) for stop in self._stops if (begin := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            passed, self._held = self._held[: min(places)[1]], ""
            return passed
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def finish(self) -> str:
        """Return what was held back and has not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text with which `stop` begins."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)
