"""The report of runs as one web page, which holds everything it shows and loads nothing.

The page is `page/report.html` with its style, its script and the data put in. What comes out of a run (names, samples,
config) is data for the script, which puts it into the page as text; in the file nothing of it can end the element
that holds it. The page's own policy (CSP) forbids the network and every script and style but these two, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.health.diagnosis import FEW
from llmtrain.observe import formats
from llmtrain.observe.files import replacing
from llmtrain.observe.run_facts import Facts
from llmtrain.observe.run_folder import RunFolder
from llmtrain.observe.run_words import STATE_WORDS, config_differences, rows_of
from llmtrain.observe.series import Floats, thin

_POINTS = 4000  # of one curve
_SAMPLES = 400  # of one run
_CHARTS: tuple[dict[str, Any], ...] = (
    {"title": "Loss, nats per token", "columns": ["train_loss", "val_loss"], "wide": True},
    {"title": "Learning rate", "columns": ["learning_rate"]},
    {"title": "Gradient norm, before clipping", "columns": ["grad_norm"]},
    {"title": "Tokens per second", "columns": ["tokens_per_sec"]},
    {"title": "Validation accuracy", "columns": ["val_accuracy"]},
    {"title": "Parameter norm", "columns": ["param_norm"]},
    {"title": "Model FLOPs utilization, share of the peak", "columns": ["mfu"]},
    {"title": "Time of a step, s", "columns": ["step_time_s", "data_time_s"]},
)
_WORDS = {
    "train_loss": "training", "val_loss": "validation", "learning_rate": "learning rate", "grad_norm": "gradient norm",
    "tokens_per_sec": "tokens/s", "val_accuracy": "validation accuracy", "param_norm": "parameter norm", "mfu": "MFU",
    "step_time_s": "whole step", "data_time_s": "of it, waiting for data",
}  # fmt: skip


def write_page(runs: list[RunFolder], facts: list[Facts], path: Path) -> None:
    """Write the page of these runs.

    Raises:
        UserError: the disk is full or the folder read-only.
    """
    with replacing(path) as file:
        file.write(page_of(runs, facts).encode())


def page_of(runs: list[RunFolder], facts: list[Facts]) -> str:
    """The page as text; `facts` are `run_facts.facts_of` each run."""
    page = files("llmtrain.observe") / "page"
    template, style, script = ((page / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(f"llmtrain report · {', '.join(run.name for run in runs)}"),
        "style": style,
        "script": script,
        "data": _inert(_content(runs, facts)),
    }
    return re.sub(r"{{(\w+)}}", lambda mark: parts[mark[1]], template)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _inert(content: dict[str, Any]) -> str:
    """JSON in which no character can end or begin an element, whatever its texts hold."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _content(runs: list[RunFolder], facts: list[Facts]) -> dict[str, Any]:
    rows = [dict(rows_of(of_run)) for of_run in facts]
    names = list(dict.fromkeys(name for of_run in rows for name in of_run))
    written = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(max(run.read_at for run in runs)))
    return {
        "written": f"As of {written}. Everything is in this file.",
        "charts": _CHARTS,
        "columns": _WORDS,
        "runs": [_run(run, of_run) for run, of_run in zip(runs, facts, strict=True)],
        "summary": [[name, [of_run.get(name) for of_run in rows]] for name in names],
        "differences": {key: list(map(_plain, values)) for key, values in config_differences(runs).items()},
    }


def _run(run: RunFolder, facts: Facts) -> dict[str, Any]:
    train = facts["loss"]["train"]
    headline = f"step {formats.count(run.last_step)}" + (f", loss {formats.loss(train['final'])}" if train else "")
    diagnosis = facts["diagnosis"] or [
        {"name": "too early", "level": "hint", "detail": "there are too few records to say anything yet"}
        if facts["records"] < FEW
        else {"name": "healthy", "level": "healthy", "detail": "nothing stands out"}
    ]
    columns = [name for chart in _CHARTS for name in chart["columns"]]
    return {
        "name": run.name,
        "state": facts["state"],
        "said": STATE_WORDS.get(facts["state"], facts["state"]),
        "headline": headline,
        "axes": _axes(run),
        "series": {name: _series(run, name) for name in columns},
        "launches": [launch.after_step for launch in run.launches if launch.after_step is not None],
        "samples": _samples(run),
        "diagnosis": diagnosis,
        "config": {key: _plain(value) for key, value in run.config.items()},
    }


def _axes(run: RunFolder) -> dict[str, list[float]]:
    """Steps, and what tokens and hours they are, for at most `_POINTS` records; what is not known is empty."""
    count = len(run)
    kept = np.unique(np.linspace(0, max(0, count - 1), min(count, _POINTS)).astype(np.int64))
    axes = {"step": run.columns["step"], "tokens": run.columns["tokens"], "hours": hours(run)}
    return {name: _short(values[kept]) if count and np.isfinite(values).all() else [] for name, values in axes.items()}


def hours(run: RunFolder) -> Floats:
    """Hours from the start of the run to each record, without the time between launches."""
    times = run.columns["time"]
    if not len(times):
        return times
    gaps = np.diff(times, prepend=times[0])
    starts = [launch.started for launch in run.launches if launch.started is not None]
    for started in starts[1:]:
        after = int(np.searchsorted(times, started))
        if 0 < after < len(times):
            gaps[after] = min(gaps[after], times[after] - started)
    first = max(0.0, float(times[0] - starts[0])) if starts else 0.0
    return (first + np.cumsum(np.maximum(gaps, 0.0))) / 3600


def _series(run: RunFolder, name: str) -> dict[str, list[float]] | None:
    steps, values = thin(*run.points(name), _POINTS)
    return {"steps": [int(step) for step in steps], "values": _short(values)} if len(steps) else None


def _short(values: Floats) -> list[float]:
    """Six digits: more than a screen shows."""
    return [float(f"{value:.6g}") if value != round(value) else int(value) for value in values.tolist()]


def _samples(run: RunFolder) -> list[dict[str, Any]]:
    """Evenly over the run where there are too many."""
    found = [
        {"step": entry["step"], "prompt": str(entry.get("prompt", "")), "text": entry["text"]} for entry in run.samples
    ]
    steps = sorted({entry["step"] for entry in found})
    every = max(1, -(-len(found) // _SAMPLES))
    kept = {*steps[::every], *steps[-1:]}
    return [entry for entry in found if entry["step"] in kept]


def _plain(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, default=str)
