"""What a power cut at any moment could take from a run folder, by a trace of all that its processes asked the kernel.

Only what an fsync has promised counts as on the disk: the bytes of a file from an fsync of that file, begun after they
were written; a name from an fsync of its folder, begun after the name was made or changed. (ext4 and xfs do better than
that, other file systems do not.)

A trace by one strace of all processes keeps causes before effects: a process that has seen what another did runs later
than the end of that call, which strace had to pass on first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llmtrain.checkpoint.format import MARKER

# -y: descriptors with their paths; -s 0: no contents, while paths are always whole.
STRACE = (
    "strace", "-f", "-y", "-s", "0", "--seccomp-bpf", "-e",
    "trace=?open,openat,?creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,fallocate,?rename,renameat,renameat2,"
    "?unlink,unlinkat,?rmdir,?mkdir,mkdirat,?symlink,symlinkat,fsync,fdatasync", "-o",
)  # fmt: skip
_CALL = re.compile(r"(\d+) +(\w+)\((.*?)(?: <unfinished \.\.\.>|\) += (.*))$")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*?)\) += (.*)$")
_PATH = re.compile(r'"([^"]*)"|(?:AT_FDCWD|\d+)<([^>]*)>')
_RENAMES = {"rename", "renameat", "renameat2"}
_SYNCS = {"fsync", "fdatasync"}
_WRITES = {"write", "pwrite64", "writev", "pwritev", "pwritev2", "ftruncate", "fallocate"}
LINKS = ("latest", "best", "final")


@dataclass(frozen=True)
class Event:
    """The begin or the end of one call, with whole paths: of a rename from and to, of a link where it leads and it."""

    moment: Literal["begin", "end"]
    process: int
    name: str
    paths: tuple[str, ...]
    flags: str = ""
    is_ok: bool = True


def events_of(trace: Path, folder: Path) -> list[Event]:
    """All events that concern a folder and what is in it, in order."""
    found: list[Event] = []
    begun: dict[int, Event] = {}
    for line in trace.read_text(errors="replace").splitlines():
        if match := _CALL.match(line):
            process, name, arguments, result = int(match[1]), match[2], match[3], match[4]
            begin = Event("begin", process, name, _paths(name, arguments), arguments)
            found.append(begin)
            begun[process] = begin
        elif match := _RESUMED.match(line):
            process, result = int(match[1]), match[4]
        else:
            continue
        if result is not None:
            found.append(_ended(begun.pop(process), result))
    return [event for event in found if any(_is_in(path, str(folder)) for path in event.paths)]


def _ended(begin: Event, result: str) -> Event:
    return replace(begin, moment="end", is_ok=not result.startswith(("-", "?")))


def _paths(name: str, arguments: str) -> tuple[str, ...]:
    """The paths in the arguments of a call; a relative one belongs to the descriptor before it."""
    if name in ("symlink", "symlinkat"):
        target, *rest = re.findall(r'"([^"]*)"', arguments)
        return (target, *rest)
    if name in _WRITES | _SYNCS:
        return tuple(re.findall(r"^\d+<([^>]*)>", arguments))
    paths: list[str] = []
    folder = ""
    for quoted, of_descriptor in _PATH.findall(arguments):
        if of_descriptor:
            folder = of_descriptor
            continue
        paths.append(quoted if quoted.startswith("/") else f"{folder}/{quoted}")
    return tuple(paths[: 2 if name in _RENAMES else 1])


class Disk:
    """What is written and named, and which part of that no fsync has promised yet."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}  # of files: when they were written last
        self._names: dict[str, int] = {}
        self._clock = 0
        self._under_way: dict[int, tuple[dict[str, int], dict[str, int]]] = {}
        self.known: set[str] = set()

    def see(self, event: Event) -> None:
        """Take an event in."""
        self._clock += 1
        path = event.paths[0]
        if event.name in _WRITES:  # at its end as well: an fsync that begins in the middle promises nothing
            self._bytes[path] = self._clock
        elif event.name in _SYNCS:
            self._sync(event, path)
        elif event.moment == "end" and event.is_ok:
            self._change(event)

    def _change(self, event: Event) -> None:
        path = event.paths[-1]
        if event.name in ("open", "openat", "creat"):
            if "O_CREAT" in event.flags and path not in self.known:
                self._make(path)
            if "O_TRUNC" in event.flags:
                self._bytes[path] = self._clock
        elif event.name in _RENAMES:
            for old in [name for name in self.known if _is_in(name, event.paths[0])]:
                new = path + old.removeprefix(event.paths[0])
                self._move(old, new)
            self._make(path)
        elif event.name in ("unlink", "unlinkat", "rmdir"):
            self._forget(path)
        else:  # mkdir, symlink
            self._make(path)

    def _make(self, path: str) -> None:
        self.known.add(path)
        self._names[path] = self._clock

    def _move(self, old: str, new: str) -> None:
        self._forget(new)
        for when in (self._bytes, self._names):
            if old in when:
                when[new] = when.pop(old)
        self.known = (self.known - {old}) | {new}

    def _forget(self, path: str) -> None:
        self.known.discard(path)
        self._bytes.pop(path, None)
        self._names.pop(path, None)

    def _sync(self, event: Event, path: str) -> None:
        if event.moment == "begin":
            names = {name: when for name, when in self._names.items() if str(Path(name).parent) == path}
            self._under_way[event.process] = ({p: w for p, w in self._bytes.items() if p == path}, names)
        elif event.is_ok:
            for now, then in zip((self._bytes, self._names), self._under_way.pop(event.process), strict=True):
                for name, when in then.items():
                    if now.get(name) == when:
                        del now[name]

    def at_risk(self, folder: str) -> list[str]:
        """What a power cut now could take of a folder and all in it."""
        return sorted(
            [f"the bytes of {path}" for path in self._bytes if _is_in(path, folder)]
            + [f"the name of {path}" for path in self._names if _is_in(path, folder)]
        )


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


@dataclass
class Seen:
    """What was checked, so that a test can tell that there was something to check."""

    commits: list[set[str]]  # the files of each step at its marker, relative to the run folder
    links: int = 0
    deletions: int = 0  # of committed checkpoints


def broken_promises(events: list[Event], run_dir: Path, *, waits: bool) -> tuple[list[str], Seen]:
    """What could be lost, or seen too early, at the moments that matter; and what those moments were.

    At the rename that makes a marker: all else of its step, of every rank, is on the disk, and, where the loop `waits`
    for a save and so writes no newer ones, all records are. At a link to a step and at the deletion of an older one:
    marker and folder are on the disk as well. A deletion takes the marker first, and only where a newer step is linked
    as `latest`.
    """
    disk, seen = Disk(), Seen([])
    leads: dict[str, str] = {}  # a link, and where it leads
    committed: set[str] = set()
    problems: list[str] = []

    def require(what: str, at_risk: list[str]) -> None:
        problems.extend(f"{what}: {one} is not on the disk" for one in at_risk)

    for event in events:
        target = event.paths[-1]
        step = next((part for part in Path(target).parts if re.fullmatch(r"step-\d{8}", part)), "")
        folder = f"{run_dir}/{step}"
        if event.moment == "begin" and event.name in _RENAMES and target == f"{folder}/{MARKER}":
            staged = f"{folder}/.{MARKER}"
            require(f"{step} commits", [r for r in disk.at_risk(folder) if r not in _not_yet(staged, folder)])
            if waits:
                require(f"{step} commits", [r for r in disk.at_risk(f"{run_dir}/metrics.jsonl") if "bytes" in r])
            seen.commits.append({path.removeprefix(f"{run_dir}/") for path in disk.known if _is_in(path, folder)})
            committed.add(folder)
        elif event.moment == "begin" and event.name in _RENAMES and Path(target).name in LINKS:
            to = f"{run_dir}/{leads[event.paths[0]]}"
            require(f"{Path(target).name} leads to {Path(to).name}", [*disk.at_risk(to), *_above(disk, run_dir)])
            seen.links += 1
        elif event.moment == "begin" and event.name.startswith(("unlink", "rmdir")) and folder in committed:
            newest, latest = max(committed), leads.get(f"{run_dir}/latest", "")
            if target != f"{folder}/{MARKER}":
                problems.append(f"{target} is deleted before the marker of {step}")
            if folder == newest or f"{run_dir}/{latest}" != newest:
                problems.append(f"{step} is deleted while latest leads to {latest}")
            require(f"{step} is deleted", disk.at_risk(newest))
            committed.remove(folder)
            seen.deletions += 1
        if event.moment == "end" and event.is_ok:
            if event.name in ("symlink", "symlinkat"):
                leads[target] = event.paths[0]
            elif event.name in _RENAMES and event.paths[0] in leads:
                leads[target] = leads.pop(event.paths[0])
        disk.see(event)
    return problems, seen


def _not_yet(staged: str, folder: str) -> set[str]:
    """What is promised only after the marker has its name."""
    return {f"the name of {staged}", f"the name of {folder}"}


def _above(disk: Disk, run_dir: Path) -> Iterator[str]:
    names = {f"the name of {path}" for path in (run_dir, *run_dir.parents)}
    return (risk for risk in disk.at_risk("") if risk in names)


def without(events: list[Event], path: str) -> list[Event]:
    """The same as if nothing had ever asked for `path` to be on the disk."""
    return [event for event in events if not (event.name in _SYNCS and event.paths[0] == path)]
