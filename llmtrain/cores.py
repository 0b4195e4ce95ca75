"""The cores that this process may run on."""

from __future__ import annotations

import os


def usable_cores() -> frozenset[int]:
    """Their numbers, where the system tells which; else those of all."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
