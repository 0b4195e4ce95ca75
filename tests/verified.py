"""Checkpoints as `llmtrain verify` looks at them: every hash, nothing loaded."""

from __future__ import annotations

from pathlib import Path

from llmtrain.checkpoint import format as fmt
from llmtrain.errors import CorruptError


def open_verified(folder: Path) -> fmt.CheckpointReader:
    """Open a checkpoint and check every hash.

    Raises:
        CorruptError: something differs; the first problem is named.
    """
    reader = fmt.CheckpointReader(folder)
    problems = reader.verify()
    if problems:
        raise CorruptError("; ".join(problems[:3]))
    return reader
