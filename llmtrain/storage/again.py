"""Reading from storage that fails for a moment: a server that is back soon must not cost a checkpoint."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
WAITS_S = (1.0, 4.0)  # before each further try
# An answer, and not the lack of one: not there, not yours, not that.
_ANSWERS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EACCES, errno.EPERM,
}  # fmt: skip


def again(read: Callable[[], Result]) -> Result:
    """Do what reads; where the storage gives no answer, up to two times more, after a while.

    Raises:
        OSError: of the last try, or of the first, where it is an answer: not there, not open to us.
    """
    for wait_s in WAITS_S:
        try:
            return read()
        except OSError as error:
            if error.errno in _ANSWERS:
                raise
            time.sleep(wait_s)
    return read()
