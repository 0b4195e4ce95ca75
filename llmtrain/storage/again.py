"""Reading from storage that fails for a moment: a server that is back soon must not cost a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
WAITS_S = (1.0, 4.0)  # before each further try
_ANSWERS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def again(read: Callable[[], Result]) -> Result:
    """Do what reads; where the storage gives no answer, up to two times more, after a while.

    Raises:
        OSError: of the last try, or of the first, where it is an answer: not there, not open to us.
    """
    for wait_s in WAITS_S:
        try:
            return read()
        except _ANSWERS:
            raise
        except OSError:
            time.sleep(wait_s)
    return read()
