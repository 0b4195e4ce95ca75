"""What can go wrong, each with the exit code of the public contract, and the one place that turns it into that code.

A message says what, where, why and what to do, on one line. Anything else that escapes is a bug of ours and keeps its
traceback.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable


class LlmtrainError(Exception):
    """An end of the program that we foresaw: its message is for the user, its exit code for scripts."""

    exit_code = 1


class UserError(LlmtrainError):
    """Bad input or configuration; nothing was lost."""

    exit_code = 2


class DivergedError(LlmtrainError):
    """Training diverged and the policy gave up."""

    exit_code = 3


class CorruptError(LlmtrainError):
    """Data or a checkpoint is damaged and nothing good is left."""

    exit_code = 4


class Stopped(LlmtrainError):  # noqa: N818 -- not an error: the run was told to stop and has been saved
    """Told to stop; a checkpoint is saved and the same command goes on."""

    exit_code = 75


def run_main(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run a verb; return its exit code, with one clear line on stderr for every end that was foreseen."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an encoding without some character costs only that character
    try:
        main(sys.argv[1:] if argv is None else argv)
    except LlmtrainError as error:
        prefix = "llmtrain" if isinstance(error, Stopped) else "llmtrain: error"
        # What we quote (a library, a file name) may have lines of its own.
        message = " ".join(line.strip() for line in str(error).splitlines())
        print(f"{prefix}: {message}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not an error, and nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("llmtrain: interrupted", file=sys.stderr)
        return 130
    return 0


def nearest(name: str, known: list[str]) -> str:
    """Say which known name was probably meant: `` (did you mean 'x'?)``, or list them all."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"
