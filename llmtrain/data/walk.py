"""Going through folders and globs: each file once, in a fixed order, and nothing is left out without being counted."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from llmtrain.data.shards import MANIFEST
from llmtrain.errors import UserError

PREPARED = "folders of prepared data"
_OURS = re.compile(rb'\s*\{\s*"format"\s*:\s*"llmtrain-tokens"')  # so begins the manifest
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


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared data, or what is unfinished of it: text that nobody wrote to be read."""
    try:
        if folder.suffix == ".parts":
            return (folder / "plan.lock").is_file()
        with (folder / MANIFEST).open("rb") as file:
            return _OURS.match(file.read(200)) is not None
    except OSError:
        return False


def made_for(out: Path | None) -> set[Path]:
    """The folders that the command for OUT makes: no part of its own input.

    They are left out without being counted: else the count would depend on how often the command was begun.
    """
    if out is None:
        return set()
    real = Path(os.path.realpath(out))  # which a link in a circle does not spoil: that is told where OUT is looked at
    return {real, real.with_name(f"{real.name}.parts")}


def walk(folder: Path, own: Iterable[Path] = ()) -> Walked:
    """All files below a folder, sorted by path; hidden files and folders are left out, as a glob leaves them out.
    So are folders of prepared data, and those of `own` (real paths).

    Links to folders are followed, but each folder is taken once, by its own path where it has one: links may lead in
    circles, and text that comes twice would be trained on twice.

    Raises:
        UserError: something cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    walked, seen, waiting = Walked(), {*own} - {folder.resolve()}, [folder]
    while waiting:
        links = []
        for start in sorted(waiting):
            for parent, folders, names in os.walk(start, onerror=refuse):
                if (real := Path(parent).resolve()) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                here = Path(parent)
                if here != folder and (MANIFEST in names or here.suffix == ".parts") and is_prepared(here):
                    walked.left_out[PREPARED] += 1
                    folders.clear()
                    continue
                folders[:] = walked.visible(folders, "folders")
                links += [path for name in folders if (path := here / name).is_symlink()]
                for name in walked.visible(names, "files"):
                    walked.add(here / name)
        waiting = links
    walked.files.sort()
    return walked


def matches(pattern: str, base: Path, own: Iterable[Path] = ()) -> Walked:
    """The files that a glob matches, sorted; what is hidden it does not match.

    Each is taken by one of its paths, the first of the shortest: links that lead in circles make longer ones. Folders
    of prepared data below `base`, where the pattern begins, are left out, and those of `own` (real paths).
    """
    walked, met, paths, real = Walked(), set[Path](), dict[Path, Path](), cache(Path.resolve)
    left_out = set[Path]()

    @cache
    def is_no_input(folder: Path) -> bool:
        if folder in (base, folder.parent):
            return False
        if is_no_input(folder.parent):
            return True
        if is_prepared(folder):
            left_out.add(real(folder))
        return real(folder) in left_out or real(folder) in own

    found = map(Path, glob.iglob(pattern, recursive=True))  # noqa: PTH207 -- may be absolute
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        # Around a circle a path becomes so long that nothing is found by it, though it is there by a shorter one.
        if (of_one := real(path.parent) / path.name) not in met and not is_no_input(path.parent):
            met.add(of_one)
            walked.add(path)
    if counted := left_out.difference(own):
        walked.left_out[PREPARED] = len(counted)
    for path in walked.files:
        paths.setdefault(path.resolve(), path)
    walked.files = sorted(paths.values())
    return walked
