"""The facts of runs on a terminal: what became of each, its curves, what they say, and how several compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmtrain.health.diagnosis import FEW
from llmtrain.observe import formats
from llmtrain.observe.run_facts import Facts
from llmtrain.observe.run_folder import RunFolder
from llmtrain.observe.run_words import STATE_WORDS, config_differences, rows_of
from llmtrain.observe.series import Floats
from llmtrain.observe.text_curve import means, plot, sparkline

COLORS = ("blue", "red", "green", "magenta", "cyan", "yellow")
_HEIGHT = 8  # lines of a curve
_SHOWN = 12  # epochs and config keys
_LEVELS = {"problem": "bold red", "hint": "yellow"}
_STATES = {"done": "green", "running": "bold blue", "stopped": "yellow", "?": "dim"}


def show_runs(runs: list[RunFolder], facts: list[Facts], console: Console | None = None) -> None:
    """Print the report of each run, and how they compare if they are several."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    for run, of_run in zip(runs, facts, strict=True):
        _section(console, _title(of_run), _table_of(rows_of(of_run)))
        if len(run):
            _section(console, "loss", _curves(run, console.width - 4))
        if len(of_run["epochs"]) > 1:
            _section(console, "epochs", _epochs(of_run["epochs"]))
        _section(console, "diagnosis", _diagnosis(of_run))
    if len(runs) > 1:
        _section(console, f"{len(runs)} runs beside each other", _beside(facts))
        _section(console, "training loss", _over_each_other(runs, console.width - 4))
        _section(console, "where their configs differ", _differences(runs))


def _section(console: Console, title: str | Text, body: RenderableType) -> None:
    console.print(Text(title, "bold") if isinstance(title, str) else title)
    console.print(Padding(body, (0, 0, 0, 2), expand=False))
    console.print()


def _title(facts: Facts) -> Text:
    name, state = str(facts["name"]), str(facts["state"])
    said = STATE_WORDS.get(state, state)
    text = Text.assemble((name, "bold"), " · ", (said, _STATES.get(state, "bold red")))
    if facts["run"] != name:
        text.append(f" · {facts['run']}", "dim")
    return text


def _table_of(rows: Iterator[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _curves(run: RunFolder, width: int) -> RenderableType:
    train, val = run.points("train_loss"), run.points("val_loss")
    lines: list[RenderableType] = [_plot([train, val], width, ("blue", "red"))]
    legend = Text.assemble(("training", "blue"))
    if len(val[0]):
        legend.append_text(Text.assemble(" · ", ("validation", "red")))
    lines.append(legend)
    for name, column in (
        ("learning rate", "learning_rate"),
        ("gradient norm", "grad_norm"),
        ("tokens/s", "tokens_per_sec"),
    ):
        steps, values = run.points(column)
        if len(steps) > 1:
            line = sparkline(means(steps, values, min(48, width - 36, len(steps))))
            ends = f"{formats.norm(float(values.min()))} to {formats.norm(float(values.max()))}"
            lines.append(Text.assemble((f"{name:<14}", "dim"), line, ("  " + ends, "dim")))
    return Group(*lines)


def _plot(curves: list[tuple[Floats, Floats]], width: int, colors: tuple[str, ...]) -> RenderableType:
    """The curves with their scales; each colour is that of the curve of the same number."""
    shown = [_clipped(curve) for curve in curves]
    values = np.concatenate([ys for _, ys in shown])
    steps = np.concatenate([xs for xs, _ in shown])
    if len(steps) < 2:
        return Text("too few records for a curve", "dim")
    top, bottom = formats.loss(float(values.max())), formats.loss(float(values.min()))
    margin = max(len(top), len(bottom))
    lines = []
    for number, line in enumerate(plot(shown, max(10, width - margin - 2), _HEIGHT)):
        label = top if number == 0 else bottom if number == _HEIGHT - 1 else ""
        text = Text(f"{label:>{margin}} ", "dim")
        for character, owner in line:
            text.append(character, None if owner is None else colors[owner % len(colors)])
        lines.append(text)
    first, last = formats.count(int(steps.min())), f"step {formats.count(int(steps.max()))}"
    lines.append(Text(f"{'':>{margin}} {first}{last:>{max(1, width - margin - 2 - len(first))}}", "dim"))
    return Group(*lines)


def _clipped(curve: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Without what a few spikes would make of the scale: values over the first one and the 99th percentile are cut."""
    xs, ys = curve
    if len(ys) < 3:
        return curve
    return xs, np.minimum(ys, max(float(ys[0]), float(np.percentile(ys, 99))))


def _epochs(epochs: list[Facts]) -> Group:
    table = _numbers("epoch", "training, mean", "validation, last")
    for row in epochs if len(epochs) <= _SHOWN else [*epochs[: _SHOWN // 2], *epochs[-_SHOWN // 2 :]]:
        table.add_row(str(row["epoch"] + 1), _or_dash(row["train_loss"]), _or_dash(row["val_loss"]))
    more = [Text(f"the first and the last of {len(epochs):,}", "dim")] if len(epochs) > _SHOWN else []
    return Group(table, *more)


def _diagnosis(facts: Facts) -> RenderableType:
    if not facts["diagnosis"]:
        few = "too few records to say anything yet" if facts["records"] < FEW else "healthy: nothing stands out"
        return Text(few, "dim" if facts["records"] < FEW else "green")
    lines = []
    for remark in facts["diagnosis"]:
        lines.append(Text.assemble((remark["name"], _LEVELS[remark["level"]]), f": {remark['detail']}"))
        lines.append(Padding(Text(f"→ {remark['advice']}"), (0, 0, 0, 2), expand=False))  # type: ignore[arg-type]
    return Group(*lines)


def _numbers(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    return table


def _beside(facts: list[Facts]) -> Table:
    table = _numbers("run", "steps", "train", "best val", "tokens", "tok/s", "time", "state")
    for number, of_run in enumerate(facts):
        train, val, speed = of_run["loss"]["train"], of_run["loss"]["val"], of_run["tokens_per_sec"]
        table.add_row(
            Text(of_run["name"], COLORS[number % len(COLORS)]),
            formats.count(of_run["steps"]["done"]),
            _or_dash(train and train["final"]),
            _or_dash(val and val["best"]),
            formats.compact(of_run["tokens"]) if of_run["tokens"] is not None else "–",
            formats.compact(speed["median"]) if speed else "–",
            formats.duration(of_run["seconds"]["whole"]) if of_run["seconds"]["whole"] else "–",
            of_run["state"],
        )
    return table


def _over_each_other(runs: list[RunFolder], width: int) -> RenderableType:
    legend = Text(" · ").join(Text(run.name, COLORS[number % len(COLORS)]) for number, run in enumerate(runs))
    return Group(_plot([run.points("train_loss") for run in runs], width, COLORS), legend)


def _differences(runs: list[RunFolder]) -> RenderableType:
    differing = config_differences(runs)
    if not differing:
        return Text("nowhere: the same config", "dim")
    table = _numbers("key", *(run.name for run in runs))
    for key, values in differing.items():
        table.add_row(Text(key), *(Text(_config_value(value)) for value in values))
    return table


def _config_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else formats.printable(str(value))


def _or_dash(value: float | None) -> str:
    return "–" if value is None else formats.loss(value)
