"""The tokenizer of token files whose real one is not known: a number of ids, and nothing to read or write them with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.data.tokenizer_base import IDENTITY, Ids, Lengths, write_identity
from llmtrain.errors import CorruptError, UserError


class NoTokenizer:
    """Knows how many ids there are and, perhaps, which one closes a document."""

    kind = "none"
    bos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None

    def __init__(self, vocab_size: int, eos_id: int | None = None):
        self.vocab_size = vocab_size
        self._eos_id = eos_id
        self.eos_id = -1 if eos_id is None else eos_id  # -1 is no id, so nothing is taken for an end

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> NoTokenizer:
        """Make the one that was saved.

        Raises:
            CorruptError: that is not what was saved.
        """
        size, eos_id = content.get("vocab_size"), content.get("eos_id")
        if not isinstance(size, int) or size < 1 or not (eos_id is None or isinstance(eos_id, int)):
            raise CorruptError(f"{IDENTITY}: not the size of a vocabulary; prepare the data again")
        return cls(size, eos_id)

    def encode(self, text: str) -> Ids:
        """Raise UserError: there is no way from text to ids."""
        raise UserError(
            f"no tokenizer is known: the data was prepared from token files with --vocab-size {self.vocab_size} alone,"
            " so there is no way from text to ids and back; prepare with --tokenizer FILE and train from that"
        )

    def encode_documents(self, documents: Sequence[str]) -> tuple[Ids, Lengths]:
        """Raise UserError as `encode` does."""
        raise UserError("no tokenizer is known")

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Write each id as its number, for reports that show what is in a batch."""
        return "".join(f"<{int(token)}>" for token in ids)

    def token_bytes(self, token: int) -> bytes:
        """Return nothing: which text an id stands for is not known."""
        return b""

    def save(self, folder: Path) -> None:
        """Write what there is."""
        write_identity(folder, self.kind, vocab_size=self.vocab_size, eos_id=self._eos_id)
