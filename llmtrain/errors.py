"""What can go wrong, each with the exit code of the public contract, and the one place that turns it into that code.

A message says what, where, why and what to do, on one line. Anything else that escapes is a bug of ours and keeps its
traceback.
"""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import platform
import re
import select
import sys
import threading
import traceback
from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path
from typing import NoReturn, TextIO

from llmtrain import __version__

DEBUG = "--debug"  # shows tracebacks of foreseen ends, too; every verb takes it
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_LAST_WORDS_S = 5.0
_NAMED = 20
NO_ANSWER = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # of storage, which may be there again later
_WHAT_TO_DO = {  # about an error of the file system that nobody closer to it has made a line of
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that is open to you, or open it"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, and run the same command again"),
    **dict.fromkeys(NO_ANSWER, "mend the storage, and run the same command again"),
}
# As torch says it of a GPU, of the host, and of cuBLAS.
_NO_MEMORY = "CUDA[^\n]*out of memory|out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
_LESS_MEMORY = (
    "to train in less: a smaller training.micro_batch_size (the losses stay), then "
    "training.activation_checkpointing=selective, then launch/zero3.yaml; llmtrain plan says what fits"
)


class LlmtrainError(Exception):
    """An end of the program that we foresaw: its message is for the user, its exit code for scripts.

    Where all ranks of a launch end by the same one, `is_everywhere` says so; see `end_everywhere`.
    """

    exit_code = 1
    is_everywhere = False
    is_said = False  # to the user
    is_at_once = False  # what goes on in threads is left behind, and not waited for by the interpreter


class UserError(LlmtrainError):
    """Bad input or configuration; nothing was lost."""

    exit_code = 2


class DivergedError(LlmtrainError):
    """Training diverged and the policy gave up."""

    exit_code = 3
    is_everywhere = True


class CorruptError(LlmtrainError):
    """Data or a checkpoint is damaged and nothing good is left."""

    exit_code = 4


class StuckError(CorruptError):
    """Storage gave nothing for a long time: as good as damaged, but to look again takes as long again."""


class PeerLostError(LlmtrainError):
    """Another rank is gone, cut off or stuck, and this one cannot go on without it; or this one itself is stuck."""

    exit_code = 5


class Stopped(LlmtrainError):  # noqa: N818 -- not an error: the run was told to stop and has been saved
    """Told to stop; a checkpoint is saved and the same command goes on."""

    exit_code = 75
    is_everywhere = True


def run_main(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run a verb; return its exit code, with one clear line on stderr for every end that was foreseen.

    Where the environment has LLMTRAIN_EXIT_CODE_FILE, the first process of each machine leaves its exit code there too:
    the launcher between us and a script does not hand it on.

    A process that a launcher started, whose peer is lost, or that is interrupted does not come back from here, but ends
    at once. The usual way out passes through libraries with threads of their own, which may wait for half an exchange,
    or not survive the interpreter: with all work done, one launch of two processes in 25 aborted there (torch 2.13,
    gloo, a busy machine). And the interpreter waits for a save that is under way, however long that takes.
    """
    # Or the interpreter looks for garbage among all there is, for a second after a run. What only that would close, a
    # file in a cycle, is not closed, as where a launcher started the process.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an encoding without some character costs only that character
    code = 1  # what Python answers to an exception that nobody foresaw
    try:
        code = _run(main, sys.argv[1:] if argv is None else argv)
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
        raise
    except Exception as error:
        error.add_note(f"This is a fault of llmtrain {__version__}; please report it, with the lines above.")
        if "LOCAL_RANK" not in os.environ:
            raise
        sys.excepthook(*sys.exc_info())
    finally:
        _leave_exit_code(code)
    if "LOCAL_RANK" in os.environ or code in (PeerLostError.exit_code, _INTERRUPTED):
        _end(code)
    return code


def _run(main: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        main(argv)
    except LlmtrainError as error:
        if DEBUG in argv:
            traceback.print_exception(error)
        if not error.is_said:
            _say(error)
        if error.is_at_once:
            _leave_exit_code(error.exit_code)
            _end(error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout):
            raise  # a connection
        # The reader of our output (head, less) has gone: not an error, and nothing more can be said to it.
        silence(sys.stdout)
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        foreseen = of_storage(error) if isinstance(error, OSError) else of_memory(error)
        if foreseen is None:
            raise
        if DEBUG in argv:
            traceback.print_exception(error)
        rank = f" (rank {os.environ['RANK']} on {platform.node()})" if "RANK" in os.environ else ""
        _say(UserError(f"{foreseen}{rank}"))
        return UserError.exit_code
    except KeyboardInterrupt:
        tell("llmtrain: interrupted", sys.stderr)
        return _INTERRUPTED
    return 0


def of_storage(error: OSError) -> UserError | None:
    """What a user is told of an error of the file system that nobody closer to it has made a line of; None: a bug."""
    what_to_do = _WHAT_TO_DO.get(error.errno or 0)
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # told by a write, which knows no name
    if what_to_do is None or (error.filename is None and not is_full):
        return None
    return UserError(f"{error.filename or 'a file'}: {error.strerror}; {what_to_do}")


def of_memory(error: MemoryError | RuntimeError) -> UserError | None:
    """What a user is told where a device or the machine has no memory left; None: something else."""
    said = str(error)
    found = re.search(rf"({_NO_MEMORY})(.*? is free|[^\n]*)", said, re.DOTALL)  # then torch has advice on its allocator
    if found is None and not isinstance(error, MemoryError):
        return None
    cause = shortened(found[0] if found else said, 200)
    return UserError(f"out of memory{cause and ': '}{cause}; {_LESS_MEMORY}")


def tell(text: str, stream: TextIO) -> None:
    """Print a line that nothing depends on: where nobody reads it any more, or its disk is full, go on in silence.

    Ctrl-C ends the `tee` behind a pipe, too: the run before it must still save, and leave with its own exit code.
    """
    try:
        print(text, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Write nothing more to it; what is in its buffer would fail once more when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _end(code: int) -> NoReturn:
    """End the process at once, with what it has printed; not with 0 where that is lost."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)


def _has_lost_its_reader(output: TextIO) -> bool:
    poll = select.poll()
    poll.register(output, 0)  # for what is told unasked
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def end_everywhere(error: LlmtrainError, rank: int, barrier: Callable[[], None]) -> None:
    """All ranks end by this error: rank 0 says it, once for all.

    A launcher ends the others as soon as it sees one end, so none may before it is said, and the exit code left.
    """
    if rank == 0:
        _say(error)
    _leave_exit_code(error.exit_code)
    error.is_said = True
    barrier()


def end_at_once(error: LlmtrainError) -> NoReturn:
    """End the process from a thread beside the one that hangs: no clean-up can be waited for.

    Nor, for long, that it is said and noted: what hangs may be where that is written.
    """

    def tell() -> None:
        _say(error)
        _leave_exit_code(error.exit_code)

    telling = threading.Thread(target=tell, name="last words", daemon=True)
    telling.start()
    telling.join(_LAST_WORDS_S)
    os._exit(error.exit_code)


def end_within(seconds: float, error: LlmtrainError) -> None:
    """End the process by this error even if what it does until then hangs, on a disk that does not answer."""
    timer = threading.Timer(seconds, end_at_once, [error])
    timer.daemon = True
    timer.start()


def _say(error: LlmtrainError) -> None:
    prefix = "llmtrain" if isinstance(error, Stopped) else "llmtrain: error"
    # What we quote (a library, a file name) may have lines of its own.
    message = " ".join(line.strip() for line in str(error).splitlines())
    tell(f"{prefix}: {message}", sys.stderr)


def _leave_exit_code(code: int) -> None:
    """Write the exit code where the environment asks for it: whole, or not at all."""
    path = os.environ.get("LLMTRAIN_EXIT_CODE_FILE")
    if not path or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    staged = f"{path}.{os.getpid()}"
    try:
        Path(staged).write_text(f"{code}\n")
        Path(staged).replace(path)
    except OSError as error:
        tell(f"llmtrain: warning: LLMTRAIN_EXIT_CODE_FILE={path} cannot be written: {error}", sys.stderr)


def shortened(text: str, most: int = 80) -> str:
    """A text of others, to be quoted: if it is longer than so many characters, its beginning."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(names: Collection[str]) -> str:
    """Name what is there: the first twenty, for there may be as many as someone else's file has."""
    named = ", ".join(shortened(name) for name in islice(names, _NAMED))
    left = len(names) - _NAMED
    return f"{named}, … and {left:,} more" if left > 0 else named or "none"


def require_utf8(text: str, what: str = "") -> None:
    """Refuse a name that cannot be recorded: of a file it may hold any bytes, in JSON it may not.

    Args:
        text: as Python has it from the command line or a folder: a surrogate for each byte that is not UTF-8.
        what: the flag that gave it, where it is no path.

    Raises:
        UserError: there is such a byte in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        told = f"{what} {text.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')}".strip()
        what_to_do = "give it in UTF-8" if what else "rename it, or, where it is text, give the folder it lies in"
        raise UserError(f"{told}: not UTF-8, so the manifest cannot name it; {what_to_do}") from None


def nearest(name: str, known: list[str]) -> str:
    """Say which known name was probably meant: `` (did you mean 'x'?)``, or list them all."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"
