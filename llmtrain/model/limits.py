"""Sizes up to which work is done in one: known to the code that does it and to the formulas that count its memory."""

from __future__ import annotations

MOST_LOGITS = 1 << 26  # that are held at once: 268 MB in float32, whatever the vocabulary
# Of these, so many pass through float32 together: as many as a core's cache holds, and on other devices as many as keep
# them busy.
CACHED_LOGITS, OTHER_LOGITS = 1 << 20, 1 << 24
BATCH_NUMEL = 1 << 24  # at most so many numbers go through Muon's products together, if it is more than one matrix


def tokens_at_once(vocab_size: int, most_logits: int = MOST_LOGITS) -> int:
    """For how many tokens the logits are made at once."""
    return max(1, most_logits // vocab_size)


def tokens_in_float32(vocab_size: int, device: str) -> int:
    """For how many tokens the logits are in float32 at once, where they are made in another type or in parts."""
    return tokens_at_once(vocab_size, CACHED_LOGITS if device == "cpu" else OTHER_LOGITS)


LONGEST_SHORT = 512  # positions of a sequence whose attention llmtrain/model/short_attention.py computes
MOST_SCORES = 1 << 21  # at most so many scores are made at once there, or those of one key-value head's queries
