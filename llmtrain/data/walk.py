"""Going through folders and globs: each file once, in a fixed order, and nothing is left out without being counted."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from llmtrain.errors import UserError

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


@dataclass
class Walked:
    """What was met: files, links that lead nowhere, and how much else, by reason."""

    files: list[Path] = field(default_factory=list)
    dead_links: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path) -> None:
        """Take what was met for what it is; folders are of no account.

        Raises:
            UserError: that cannot be seen.
        """
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from error
            if path.is_symlink():  # else it was removed just now
                self.dead_links.append(path)
            return
        if stat.S_ISREG(mode):
            self.files.append(path)
        elif not stat.S_ISDIR(mode):
            self.left_out["special files"] += 1

    def visible(self, names: Iterable[str], kind: str) -> list[str]:
        """The names that are not hidden; the others are counted."""
        seen = list[str]()
        for name in names:
            if name.startswith("."):
                self.left_out[f"hidden {kind}"] += 1
            else:
                seen.append(name)
        return seen


def walk(folder: Path) -> Walked:
    """All files below a folder, sorted by path; hidden files and folders are left out, as a glob leaves them out.

    Links to folders are followed, but each folder is taken once, by its own path where it has one: links may lead in
    circles, and text that comes twice would be trained on twice.

    Raises:
        UserError: something cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    walked, seen, waiting = Walked(), set[Path](), [folder]
    while waiting:
        links = []
        for start in sorted(waiting):
            for parent, folders, names in os.walk(start, onerror=refuse):
                if (real := Path(parent).resolve()) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = walked.visible(folders, "folders")
                links += [path for name in folders if (path := Path(parent, name)).is_symlink()]
                for name in walked.visible(names, "files"):
                    walked.add(Path(parent, name))
        waiting = links
    walked.files.sort()
    return walked


def matches(pattern: str) -> Walked:
    """The files that a glob matches, sorted; what is hidden it does not match.

    Each is taken by one of its paths, the first of the shortest: links that lead in circles make longer ones.
    """
    walked, met, paths, real = Walked(), set[Path](), dict[Path, Path](), cache(Path.resolve)
    found = map(Path, glob.iglob(pattern, recursive=True))  # noqa: PTH207 -- may be absolute
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        # Around a circle a path becomes so long that nothing is found by it, though it is there by a shorter one.
        if (own := real(path.parent) / path.name) not in met:
            met.add(own)
            walked.add(path)
    for path in walked.files:
        paths.setdefault(path.resolve(), path)
    walked.files = sorted(paths.values())
    return walked
