"""Shared by the benchmarks: what they ran on, how repeats are taken, where results go."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Measure = TypeVar("Measure")
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine: CPU model, cores this process may use, GPUs with driver, operating system, Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": _cpu_model(), "cores": cores, "system": platform.platform(), "python": platform.python_version()}
    gpus = _gpus()
    return {**found, "gpus": gpus} if gpus else found


def versions(*distributions: str) -> dict[str, str | None]:
    """The installed versions of the named distributions; None for those that are missing."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in distributions}


def alternate(
    contenders: Mapping[str, Callable[[], Measure]], repeats: int = 3, warm_up: int = 1
) -> dict[str, list[Measure]]:
    """Measure every contender once per round, so that a slow minute of the machine falls on all of them alike.

    The order turns round with each round, so that none gains by always coming first.

    Args:
        contenders: by name, a function that does the work once and returns its measure.
        repeats: number of rounds.
        warm_up: number of rounds that are run first and thrown away.

    Returns:
        By name, one measure per round.
    """
    measures: dict[str, list[Measure]] = {name: [] for name in contenders}
    for round_number in range(-warm_up, repeats):
        turn = list(contenders.items())
        for name, measure in turn if round_number % 2 else reversed(turn):
            value = measure()
            if round_number >= 0:
                measures[name].append(value)
    return measures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def commit() -> str | None:
    """Of the checkout that was measured, with `+` where files differ from it; None: it is no checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    if found.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    return found.stdout.strip() + ("+" if changed else "")


def write_result(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    distributions: Sequence[str] = ("llmtrain",),
    path: Path | None = None,
) -> Path:
    """Write `results/NAME.json`, or `path`: rows of measurements with machine, date and versions; return its path."""
    content = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(*distributions),
        "commit": commit(),
        "rows": list(rows),
    }
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def train_records(
    arguments: list[str], run: Path, *, on_cpu: bool, limit_s: float | None
) -> tuple[list[dict[str, Any]], str]:
    """`llmtrain train` in a process of its own: its records, and how it ended."""
    command = [sys.executable, "-m", "llmtrain", "train", *arguments]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=limit_s
        )
        said = f"exit code {ended.returncode}: {(ended.stderr.strip().splitlines() or ['nothing was said'])[-1]}"
    except subprocess.TimeoutExpired:
        said = f"not done after {limit_s:g} s"
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [], said


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal keys as an aligned table."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "" if value is None else str(value)


def _gpus() -> list[str]:
    """Name, memory and driver version of each NVIDIA GPU; empty where the driver's tool is missing or finds none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return []
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def arguments_without_places(args: argparse.Namespace) -> dict[str, str]:
    """What a benchmark was called with, without where things lie on this machine."""
    return {
        name: str(value)
        for name, value in vars(args).items()
        if name not in ("nanogpt", "megatron", "peers_python", "scratch", "out")
    }
