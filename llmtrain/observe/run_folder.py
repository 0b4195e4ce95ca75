"""What is in a run folder, read for people: of a run that is over, that is going on, or that was killed.

Nothing here trusts a file to be there or whole. `metrics.jsonl` may end in a torn line, and steps may come twice where
a run went back while it was read; whatever cannot be read is named in `problems`, and the rest is shown.
"""

from __future__ import annotations

import json
import math
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmtrain.checkpoint.folders import BEST, FINAL, LATEST, committed_steps, is_committed, pointed, step_folder
from llmtrain.data.lock import is_locked
from llmtrain.errors import UserError
from llmtrain.observe.files import LAUNCHES, SAMPLES, SKIPPED, read_steps
from llmtrain.observe.formats import printable
from llmtrain.observe.metrics import ARRAYS, RECORDS
from llmtrain.observe.record import COLUMNS
from llmtrain.observe.series import Floats

CONFIG = "config.yaml"
_MARKS = (LAUNCHES, RECORDS, ARRAYS)  # one of them, and a folder is a run


@dataclass(frozen=True)
class Launch:
    """One start of the run; times are Unix seconds."""

    started: float | None
    ended: float | None
    how: str | None  # it ended; None: without a word, or not yet
    why: str | None
    after_step: int | None
    total_steps: int | None
    world_size: int | None
    device: str | None


@dataclass(frozen=True)
class Checkpoint:
    """A committed step."""

    step: int
    time: float  # Unix seconds
    bytes: int


@dataclass
class RunFolder:
    """A run as its files tell it. Arrays are float64 and equally long, one entry for each record; NaN: null."""

    path: Path
    columns: dict[str, Floats]
    config: dict[str, Any] = field(default_factory=dict)  # by `section.key`
    launches: list[Launch] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)  # of the last launch, as run.json has it
    skipped: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)  # validation by source: steps, losses
    checkpoints: list[Checkpoint] = field(default_factory=list)
    pointers: dict[str, int] = field(default_factory=dict)  # best, latest, final → step
    is_locked: bool | None = None
    read_at: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of records."""
        return len(self.columns["step"])

    def points(self, name: str) -> tuple[Floats, Floats]:
        """Steps and values of a column where it has a value."""
        values = self.columns[name]
        known = np.isfinite(values)
        return self.columns["step"][known], values[known]

    @property
    def name(self) -> str:
        """What people call it; nothing in it commands a terminal."""
        return printable(str(self.config.get("run.name") or self.path.resolve().name))

    @property
    def last_step(self) -> int:
        """Of the last record, or of the newest checkpoint if that is later (a stop between records); 0: of neither."""
        recorded = int(self.columns["step"][-1]) if len(self) else 0
        return max(recorded, *(checkpoint.step for checkpoint in self.checkpoints[-1:]), 0)

    @property
    def total_steps(self) -> int | None:
        """At which the run will be done, if that is known."""
        known = [launch.total_steps for launch in self.launches if launch.total_steps]
        return known[-1] if known else self.config.get("training.max_steps")

    def state(self) -> str:
        """How the run stands.

        The lock says whether it runs; how its last launch ended, `run.json`. A launch that wrote no end, and does not
        run, was killed. Where the lock cannot be seen (a copy on another machine), what it is stays open.
        """
        last = self.launches[-1].how if self.launches else None
        if self.is_locked:
            return "running"
        if last:
            return last  # a word of `provenance.ending`
        if self.pointers.get(FINAL, -1) >= max(self.last_step, 0) and FINAL in self.pointers:
            return "done"
        return "killed" if self.is_locked is False else "?"


def is_run(path: Path) -> bool:
    """Whether the folder is one of a run, with or without checkpoints."""
    return any((path / name).is_file() for name in _MARKS)


def read_run(path: Path, now: Callable[[], float] = time.time) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: it is a checkpoint, or no run at all.
    """
    if is_committed(path):
        raise UserError(f"{path}: a checkpoint; name the folder of its run ({path.resolve().parent})")
    if not is_run(path):
        raise UserError(f"{path}: neither a run nor prepared data")
    run = RunFolder(path, {name: np.empty(0) for name in COLUMNS}, read_at=now())
    _attempt(run, RECORDS, _read_records)
    if not len(run):
        _attempt(run, ARRAYS, _read_arrays)
    _attempt(run, CONFIG, _read_config)
    _attempt(run, LAUNCHES, _read_launches)
    run.skipped = _lines(run, SKIPPED)
    run.samples = [entry for entry in _lines(run, SAMPLES) if isinstance(entry.get("text"), str)]
    _attempt(run, "step-*", _read_checkpoints)
    run.is_locked = is_locked(path / ".lock")
    return run


def _attempt(run: RunFolder, name: str, read: Callable[[RunFolder, Path], None]) -> None:
    """Read a file if it is there; say so if that is not possible. A live run may replace or remove any meanwhile."""
    try:
        read(run, run.path / name)
    except FileNotFoundError:
        if name in (RECORDS, CONFIG):
            run.problems.append(f"{name} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        run.problems.append(f"{name} cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:100]})")


def _lines(run: RunFolder, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    _attempt(run, name, lambda _, path: found.extend(read_steps(path)))
    return found


def _read_records(run: RunFolder, path: Path) -> None:
    columns = {name: array("d") for name in COLUMNS}
    sources: dict[str, tuple[list[float], list[float]]] = {}
    for entry in read_steps(path):
        while columns["step"] and entry["step"] <= columns["step"][-1]:  # the run went back
            for column in columns.values():
                column.pop()
        for name, column in columns.items():
            column.append(_number(entry.get(name)))
        of_sources = entry.get("sources")
        for source, values in of_sources.items() if isinstance(of_sources, dict) else ():
            loss = _number(values.get("val_loss")) if isinstance(values, dict) else math.nan
            if math.isfinite(loss):
                steps, losses = sources.setdefault(source, ([], []))
                steps.append(entry["step"])
                losses.append(loss)
    run.columns = {name: np.array(column) for name, column in columns.items()}
    run.sources = {name: (np.array(steps), np.array(losses)) for name, (steps, losses) in sources.items()}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _read_arrays(run: RunFolder, path: Path) -> None:
    arrays = json.loads(path.read_bytes())
    names = {"steps": "step", "epochs": "epoch"}
    values = {names.get(name, name): np.array([_number(x) for x in column]) for name, column in arrays.items()}
    length = len(values["step"])
    if any(len(column) != length for column in values.values()):
        raise ValueError("arrays of different lengths")
    run.columns = {name: values.get(name, np.full(length, math.nan)) for name in COLUMNS}


def _read_config(run: RunFolder, path: Path) -> None:
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    run.config = {
        f"{section}.{key}": value for section, values in sections.items() for key, value in (values or {}).items()
    }


def _read_launches(run: RunFolder, path: Path) -> None:
    launches = json.loads(path.read_bytes())["launches"]
    run.launches = [_launch(entry) for entry in launches]
    run.provenance = launches[-1] if launches else {}


def _launch(entry: dict[str, Any]) -> Launch:
    end, launch, hardware = entry.get("ended") or {}, entry.get("launch") or {}, entry.get("hardware") or {}
    return Launch(
        started=datetime.fromisoformat(entry["started"]).timestamp() if "started" in entry else None,
        ended=end.get("time"),
        how=end.get("how"),
        why=end.get("why"),
        after_step=launch.get("after_step"),
        total_steps=launch.get("total_steps"),
        world_size=launch.get("world_size"),
        device=hardware.get("device_name") or hardware.get("device"),
    )


def _read_checkpoints(run: RunFolder, _: Path) -> None:
    for step in committed_steps(run.path):
        folder = step_folder(run.path, step)
        try:
            files = [path.stat() for path in folder.rglob("*") if path.is_file()]
            run.checkpoints.append(
                Checkpoint(step, max(file.st_mtime for file in files), sum(f.st_size for f in files))
            )
        except (OSError, ValueError):  # a live run deletes old ones
            continue
    for name in (BEST, LATEST, FINAL):
        if target := pointed(run.path, name):
            run.pointers[name] = int(target.name.removeprefix("step-"))
