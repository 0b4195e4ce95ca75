"""Where fetched files lie on this machine."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


def cache_folder(kind: str, key: str) -> Path:
    """`$LLMTRAIN_CACHE/KIND/HASH OF KEY`, by default in `~/.cache/llmtrain`; whoever needs it makes it."""
    root = os.environ.get("LLMTRAIN_CACHE") or Path.home() / ".cache" / "llmtrain"
    return Path(root).absolute() / kind / hashlib.sha256(key.encode()).hexdigest()[:16]


def say(line: str) -> None:
    """Tell the user one line."""
    print(f"llmtrain: {line}", file=sys.stderr, flush=True)
