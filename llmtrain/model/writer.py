"""One text while a model writes it: ids become text, up to a stop string or the end of the document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmtrain.data.decode import IncrementalDecoder, StopStrings
from llmtrain.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """What the model wrote after the prompt."""

    text: str  # without the stop string
    tokens: int  # that it chose, the end-of-document id not counted
    ended: Literal["length", "stop", "eos"]
    seed: int  # with which it comes alone, too


class Writer:
    """One sample while it is written."""

    def __init__(self, tokenizer: Tokenizer, start: Sequence[int], stops: Sequence[str], seed: int):
        self._decoder = IncrementalDecoder(tokenizer, start)
        self._stops = StopStrings(stops)
        self._eos_id = tokenizer.eos_id
        self._seed = seed
        self._pieces: list[str] = []
        self._tokens = 0
        self.ended: Literal["length", "stop", "eos"] | None = None

    def add(self, token: int) -> str:
        """Take the next id; return the text that is certain now."""
        if token == self._eos_id:
            return self._end("eos")
        self._tokens += 1
        text = self._stops.add(self._decoder.add(token))
        if self._stops.found:
            self.ended = "stop"
        self._pieces.append(text)
        return text

    def out_of_length(self) -> str:
        """End the sample, unless it has ended; return the text that was held back."""
        return "" if self.ended else self._end("length")

    def _end(self, reason: Literal["length", "eos"]) -> str:
        text = self._stops.add(self._decoder.finish())
        self.ended = "stop" if self._stops.found else reason
        text += self._stops.finish()
        self._pieces.append(text)
        return text

    def sample(self) -> Sample:
        """The finished sample."""
        assert self.ended is not None
        return Sample("".join(self._pieces), self._tokens, self.ended, self._seed)
