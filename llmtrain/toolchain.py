"""Whether torch can compile for a device here."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path

import torch


def why_not_compiled(kind: str) -> str | None:
    """Why what is compiled for a kind of device (`cpu`, `cuda`) does not run here; None: it does.

    Seconds the first time on a machine; torch keeps what it has made.
    """
    return (lacking_to_compile() if kind == "cpu" else None) or _failure(kind)


@cache
def _failure(kind: str) -> str | None:
    """Compile something small: that all is there does not say that it works."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=kind))
    except Exception as error:  # whatever its compiler, that one's files or the folder of its cache have
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no reason given')}"
    return None


def lacking_to_compile() -> str | None:
    """What `torch.compile` would need for a CPU and does not find (torch/_inductor/config.py, `cxx`)."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}); install it, or name another by CXX"
    if not Path(headers := sysconfig.get_path("include"), "Python.h").is_file():
        return f"no headers of this Python in {headers}; install them (Debian: python3-dev)"
    return None
