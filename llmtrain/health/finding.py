"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, and, where it does not stand well, what to do."""

    status: Literal["ok", "warn", "FAIL"]
    name: str
    detail: str

    def line(self) -> str:
        """For the terminal."""
        return f"{self.status:<4}  {self.name:<14}  {self.detail}"


def ok(name: str, detail: str) -> Finding:
    """All is well."""
    return Finding("ok", name, detail)


def warn(name: str, detail: str) -> Finding:
    """Works, but not as well as it could."""
    return Finding("warn", name, detail)


def fail(name: str, detail: str) -> Finding:
    """Does not work."""
    return Finding("FAIL", name, detail)
