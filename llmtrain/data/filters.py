"""Quality filters: small functions that look at one document and say whether to keep it.

To add one, write a function of (text, value) and put its name, its default value and one line over it, below or in a
file of your own (`prepare --filter-module FILE`); it is then known to `prepare --filter NAME[=VALUE]`. It must be pure:
its answer may depend on nothing but its arguments, or the result would depend on how the work is dealt out.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.errors import UserError, nearest

Keeps = Callable[[str, float], bool]
CODE_POINTS = 0x110000


@dataclass(frozen=True)
class Filter:
    """One filter: what it keeps, the value it has if none is given, what that means, and the file if it is a user's."""

    keeps: Keeps
    default: float
    about: str
    file: str | None = None


FILTERS: dict[str, Filter] = {}


def quality_filter(name: str, default: float, about: str) -> Callable[[Keeps], Keeps]:
    """Register a function under a name."""

    def register(keeps: Keeps) -> Keeps:
        FILTERS[name] = Filter(keeps, default, about)
        return keeps

    return register


@quality_filter("letters", 0.25, "at least this share of the characters are letters, of whatever script")
def letters(text: str, least: float) -> bool:
    """Tables of numbers, encoded data and line noise have few letters; 99 of 100 files of Python have over 0.42."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return int(np.count_nonzero(_is_letter()[points])) >= least * len(points)


@quality_filter("line-length", 200, "lines have at most this many characters on average")
def line_length(text: str, most: float) -> bool:
    """Minified code and data are a few very long lines. For prose with one line a paragraph this has to be larger."""
    return len(text) <= most * (text.rstrip("\n").count("\n") + 1)


@quality_filter("repeated-lines", 0.3, "at most this share of the lines that are not blank came before in the document")
def repeated_lines(text: str, most: float) -> bool:
    """Boilerplate and what a crawler got stuck in repeat themselves (0.3: Gopher, Rae et al. 2021)."""
    lines = [line for line in text.splitlines() if line and not line.isspace()]
    return len(lines) - len(set(lines)) <= most * len(lines)


def parse_filter(text: str) -> tuple[str, float]:
    """Read `NAME[=VALUE]`.

    Raises:
        UserError: there is no such filter, or the value is no number.
    """
    name, equals, value = text.partition("=")
    if name not in FILTERS:
        raise UserError(f"--filter {text}: no filter '{name}'; {nearest(name, list(FILTERS))}")
    try:
        number = float(value) if equals else FILTERS[name].default
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise UserError(f"--filter {text}: '{value}' is no number")
    return name, number


def code_digest(names: Iterable[str]) -> str | None:
    """SHA-256 over the modules that filters are written in, helpers and all; None of no filter."""
    modules = {FILTERS[name].file or inspect.getfile(FILTERS[name].keeps) for name in names}
    # By what they hold, as on another machine they may lie elsewhere.
    content = b"\0".join(sorted(Path(module).read_bytes() for module in modules))
    return hashlib.sha256(content).hexdigest() if modules else None


@cache
def _is_letter() -> npt.NDArray[Any]:
    return np.fromiter((chr(point).isalpha() for point in range(CODE_POINTS)), bool, CODE_POINTS)
