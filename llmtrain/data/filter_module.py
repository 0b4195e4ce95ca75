"""Filters in a file of the user's own: `prepare --filter-module FILE`.

The file is run by every process that reads documents, and its SHA-256 is part of the request. Only what stands in this
one file is: the folder it lies in cannot be imported from.
"""

from __future__ import annotations

import hashlib
import runpy
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.data.filters import FILTERS, Filter
from llmtrain.errors import UserError

FLAG = "--filter-module"
_loaded = dict[Path, str]()  # in this process: what they were


@dataclass(frozen=True)
class FilterModule:
    """A file that registers filters, as it was when the command began."""

    path: Path  # absolute
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FilterModule:
        """Run a file.

        Raises:
            UserError: it cannot be read or run, or registers no filter or one that there is.
        """
        module = cls(path.absolute(), _sha256(path))
        module._run()
        return module

    def load(self) -> None:
        """Run it in this process, too, unless that was done.

        Raises:
            UserError: it is another by now: documents would be judged by both.
        """
        if _loaded.get(self.path) != self.sha256:
            if _sha256(self.path) != self.sha256:
                raise UserError(f"{FLAG} {self.path}: was changed while it was used; run the same command again")
            self._run()

    def names(self) -> list[str]:
        """Of its filters."""
        return [name for name, filter_ in FILTERS.items() if filter_.file == str(self.path)]

    def told(self, error: BaseException) -> str:
        """Name an error in its code, with the line."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)]
        number = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        what = error.msg if isinstance(error, SyntaxError) else error
        return f"{self.path}{f', line {number}' if number else ''}: {type(error).__name__}: {what}"

    def _run(self) -> None:
        before = dict(FILTERS)
        try:
            runpy.run_path(str(self.path))
            found = {name: filter_ for name, filter_ in FILTERS.items() if before.get(name) is not filter_}
            if not found:
                raise UserError(
                    f"{FLAG} {self.path}: registers no filter; put @quality_filter(NAME, DEFAULT, ABOUT), of"
                    " llmtrain.data.filters, over a function of (text, value)"
                )
            if taken := [name for name in found if name in before and before[name].file is None]:
                raise UserError(f"{FLAG} {self.path}: there is a filter '{taken[0]}' already; call it otherwise")
        except UserError:
            self._forget(before)
            raise
        except (Exception, SystemExit) as error:  # whatever that code may raise
            self._forget(before)
            raise UserError(f"{FLAG} {self.told(error)}") from error
        for name, filter_ in found.items():
            FILTERS[name] = replace(filter_, file=str(self.path))
        _loaded[self.path] = self.sha256

    def _forget(self, before: dict[str, Filter]) -> None:
        FILTERS.clear()
        FILTERS.update(before)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{FLAG} {path}: cannot be read ({error.strerror})") from error
