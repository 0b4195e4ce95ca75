"""Where what is fetched, or made once for a machine, lies on it."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


def cache_folder(kind: str, key: str) -> Path:
    """`$LLMTRAIN_CACHE/KIND/HASH OF KEY`, by default in `~/.cache/llmtrain`; whoever needs it makes it."""
    return _root() / kind / hashlib.sha256(key.encode()).hexdigest()[:16]


def cache_folders(kind: str) -> list[Path]:
    """All there are of a kind."""
    return sorted(path for path in (_root() / kind).glob("*") if len(path.name) == 16 and path.is_dir())


def _root() -> Path:
    root = os.environ.get("LLMTRAIN_CACHE") or Path.home() / ".cache" / "llmtrain"
    return Path(root).absolute()


def say(line: str) -> None:
    """Tell the user one line."""
    print(f"llmtrain: {line}", file=sys.stderr, flush=True)
