"""How much memory there is, and documents that are larger."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.errors import UserError

# A document is there as bytes, as text in up to three forms, and as ids of two bytes each, as many as bytes at
# most. Measured, of ASCII; one character beyond U+FFFF makes each of a text four bytes in memory.
COPIES = 7
LOOKED_AFTER = 64 << 20  # bytes of one document after which it is asked whether there is memory for it
_CGROUP = Path("/sys/fs/cgroup")


def free_host_memory() -> int:
    """Bytes that a new process can take, of the machine and of the limit it runs under."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free = int(match[1]) * 1024 if match else sys.maxsize
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # no system tells more everywhere
    return min(free, _container_limit())


def _container_limit() -> int:
    """What a container (cgroup v2) still allows; a huge number where there is none.

    Pages of files count as used there, but the kernel takes them back when something else needs them.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        of_files = re.findall(r"^(?:active|inactive)_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):
        return sys.maxsize
    return int(limit) - used + sum(map(int, of_files)) if limit.isdecimal() else sys.maxsize


def require_room(document: str, size: int, where_to: str) -> None:
    """Refuse a long document of so many bytes, or of more, if it does not fit into memory: better than to be killed.

    Raises:
        UserError: names it; `where_to` says how such a one can be left out.
    """
    if size <= LOOKED_AFTER:
        return
    free = free_host_memory()
    if COPIES * size > free:
        raise UserError(
            f"{document}: a document of {size / 1e9:.3g} GB or more does not fit into memory ({free / 1e9:.3g} GB are "
            f"free, and it takes {COPIES} times its size); split it into several documents{where_to}"
        )


@contextmanager
def told_of_memory(source: object) -> Iterator[None]:
    """If memory ends while an input is read, that is about the input; Arrow's error is a MemoryError, too.

    Raises:
        UserError: names it.
    """
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"{source}: to read it takes more memory than there is ({free_host_memory() / 1e9:.3g} GB are free); split "
            "its longest documents or row groups, or give this process more"
        ) from error
