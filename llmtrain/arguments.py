"""How every verb reads its command line: a bad flag ends like any other bad input, in one line and exit 2."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NoReturn

from llmtrain.errors import DEBUG, UserError
from llmtrain.storage.remote import path_or_url


class _Noted(argparse.Action):
    """A flag that `run_main` looks for itself: the verb sees nothing of it."""

    def __init__(self, option_strings: list[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, *_: object) -> None:
        """Store nothing."""


class VerbParser(argparse.ArgumentParser):
    """The parser of one verb.

    Args:
        verb: as the user types it.
        description: one line for `--help`.
        example: a whole command, shown at the end of `--help`.
        instead: how to write what people often write otherwise, said where there are arguments that are not known.
    """

    def __init__(self, verb: str, description: str, example: str, instead: str = ""):
        self.instead, self.takes_overrides = instead, False
        # Raw: a command that is wrapped cannot be pasted.
        super().__init__(
            prog=f"llmtrain {verb}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(DEBUG, action=_Noted, help="show where an error in the input was found, as a traceback")

    def read(self, arguments: list[str]) -> argparse.Namespace:
        """Parse a command line."""
        # Overrides may stand between flags; argparse takes sub-commands or such a mixture, not both.
        return self.parse_intermixed_args(arguments) if self.takes_overrides else self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage, which would be several lines."""
        hint = ""
        if message.startswith("unrecognized arguments: "):
            hint = f"; {self.instead}" if self.instead else ""
        raise UserError(f"{message}{hint} ({self.prog} --help explains the options)")


def add_config(parser: VerbParser, purpose: str) -> None:
    """Add `--config FILE section.key=value …` for what `load_config` reads."""
    parser.takes_overrides = True
    parser.add_argument("--config", type=Path, metavar="FILE", help=purpose)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")


def add_checkpoint(parser: VerbParser) -> None:
    """Add the PATH of the verbs that open a checkpoint: `args.path`, a Path or a URL."""
    parser.add_argument(
        "path",
        type=path_or_url,
        metavar="PATH",
        help="a run folder (its best checkpoint, else its latest) or a checkpoint; also a URL",
    )


def count(text: str) -> int:
    """Argparse type: a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, not '{text}'")
    return int(text)


def positive_int(text: str) -> int:
    """Argparse type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return int(text)


def id_number(text: str) -> int:
    """Argparse type: a token id."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a token id, a whole number from 0 on, not '{text}'")
    return int(text)


def seed_int(text: str) -> int:
    """Argparse type: what every random generator here takes as a seed."""
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^62, not '{text}'")
    return int(text)


def finite_float(text: str) -> float:
    """Argparse type: a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, not '{text}'")
    return value


def fraction(text: str) -> float:
    """Argparse type: a number from 0 on and under 1."""
    value = finite_float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and under 1, not {text}")
    return value


def temperature(text: str) -> float:
    """Argparse type: a number from 0 on."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 (greedy) or more, not {text}")
    return value


def probability(text: str) -> float:
    """Argparse type: a number over 0 and up to 1."""
    value = finite_float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be over 0 and at most 1, not {text}")
    return value
