"""Prepares killed at every change of their folder, gone on with, killed again somewhere, and run to the end.

    python -m tests.faults.killed_prepares FOLDER INPUT PART

PART is empty for the whole, `2/3` and the like for a part, `join` for what joins three that are done. What became of
each is a line of JSON on stdout. Each prepare is a process of its own, forked from this one, which has all imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from llmtrain.data.corpus import cut_into_chunks
from llmtrain.data.encode import encode_to_shards  # noqa: F401 -- imported once, here
from llmtrain.data.parts import _Parts
from llmtrain.data.staging import JOURNAL, is_begun
from llmtrain.data.survey import survey
from llmtrain.errors import run_main
from llmtrain.prepare import main
from tests.faults.file_events import FileEvents


def main_of_test(folder: Path, source: str, part: str) -> None:
    """Kill at event 1, 2, … of a prepare until one survives."""
    cut_into_chunks.__defaults__ = survey.__defaults__ = (2000,)  # as many chunks as a large input has
    out, lots = folder / "out", random.Random(part)
    command = ["--input", source, "--tokenizer", "byte", "--shard-tokens", "1500", "--workers", "1"]
    command += ["--out", str(out)]
    if part == "join":
        make_parts(command, folder)
        command.append("--join")
    elif part:
        command += ["--part", part]
    at, events = 0, 100
    while True:
        if part == "join":
            shutil.copytree(folder.with_name("made"), folder / "out.parts")
        at += 1
        first = run(command, at)
        kept = finished(folder)
        if first != -signal.SIGKILL:
            break
        second = run(command, lots.randint(1, events)) if at % 3 == 0 else None
        kept |= finished(folder)
        last = run(command, None)
        remade = [name for name, was in kept.items() if finished(folder, name) not in ({name: was}, {})]
        answer = {"at": at, "kept": len(kept), "second": second, "last": last, "remade": remade}
        print(json.dumps({**answer, "left": left(folder), "content": digest(folder)}), flush=True)
        events = max(events, at)
        for path in folder.iterdir():
            shutil.rmtree(path)
    print(json.dumps({"at": None, "last": first, "left": left(folder), "content": digest(folder)}), flush=True)


def make_parts(command: list[str], folder: Path) -> None:
    """All three of three, in the folder `made` beside the other, without joining them."""
    for number in (1, 2, 3):
        if (child := os.fork()) == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _Parts.join = lambda *_: os._exit(0)  # type: ignore[assignment, method-assign, return-value]
            run_main(main, [*command, "--part", f"{number}/3"])
            os._exit(0)
        os.waitpid(child, 0)
    (folder / "out.parts").rename(folder.with_name("made"))


def run(command: list[str], at: int | None) -> int:
    """Prepare in another process, killed at its change `at`; return its exit code."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        FileEvents(Path(command[command.index("--out") + 1]), at)
        os._exit(run_main(main, command))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finished(folder: Path, name: str | None = None) -> dict[str, Any]:
    """The shards that a journal calls finished (or where one of them is now), and which files they are."""
    found = {}
    for journal in folder.glob(f"out.parts/*/{JOURNAL}"):
        if not is_begun(journal.parent):
            continue
        for line in journal.read_text().splitlines(keepends=True):
            told = json.loads(line) if line.endswith("\n") else {}
            shards = [shard for state in told.get("splits", {}).values() for shard in state["shards"]]
            shards += [told["shard"]] if "shard" in told else []
            for file in (shard[what]["path"] for shard in shards for what in ("ids", "ends")):
                found[file] = which(journal.parent / "data" / file)
    if name is None:
        return found
    places = [*folder.glob(f"out/{name}"), *folder.glob(f"out.parts/*/{name}")]
    return {name: which(places[0])} if places else {}


def which(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def left(folder: Path) -> list[str]:
    """What stands in the folder, and beside the data."""
    paths = (*folder.iterdir(), *folder.glob("out.parts/*"))
    # Of a part that was renamed to what it is by then, the folder above it may still be there until all is joined.
    return sorted(str(path.relative_to(folder)) for path in paths if ".partial-" not in path.name or is_begun(path))


def digest(folder: Path) -> str:
    """Of all files of the data, or of a part."""
    total = hashlib.sha256()
    for root in (folder / "out", *sorted(folder.glob("out.parts/part-*-of-?????"))):
        for path in sorted(root.rglob("*")):
            if path.is_file():
                total.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + path.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    main_of_test(Path(sys.argv[1]), *sys.argv[2:])
