"""The pictures of a run: losses and learning rate over the steps, and losses over the epochs."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llmtrain.observe import formats
from llmtrain.observe.files import read_steps, replacing
from llmtrain.observe.metrics import RECORDS
from llmtrain.observe.series import Floats, thin

CURVE = "training_curve.png"
BY_EPOCH = "loss_by_epoch.png"

_TRAIN = "tab:blue"
_VAL = "tab:red"
_RATE = "tab:green"
_MAX_POINTS = 4000  # of one line: more than the picture has pixels
_MEANS = 300  # of the line through a band of points
_FEW = 60  # points up to which each one gets a marker


@dataclass
class _Line:
    """Points of one line; as arrays, since a long run has millions."""

    xs: array[float] = field(default_factory=lambda: array("d"))
    ys: array[float] = field(default_factory=lambda: array("d"))

    def add(self, x: float, y: float | None) -> None:
        if y is not None:  # null: not evaluated, or not finite
            self.xs.append(x)
            self.ys.append(y)

    def points(self) -> tuple[Floats, Floats]:
        """At most `_MAX_POINTS` of them."""
        return thin(np.asarray(self.xs), np.asarray(self.ys), _MAX_POINTS)


@dataclass
class _History:
    """What the pictures show of a run."""

    train: _Line = field(default_factory=_Line)
    val: _Line = field(default_factory=_Line)
    rate: _Line = field(default_factory=_Line)
    epoch_sums: dict[int, tuple[float, int]] = field(default_factory=dict)
    epoch_vals: dict[int, float] = field(default_factory=dict)

    def add(self, entry: dict[str, Any]) -> None:
        step, epoch, train, val = (entry.get(name) for name in ("step", "epoch", "train_loss", "val_loss"))
        if not isinstance(step, int) or not isinstance(epoch, int):
            return
        self.train.add(step, train)
        self.val.add(step, val)
        self.rate.add(step, entry.get("learning_rate"))
        if train is not None:
            total, records = self.epoch_sums.get(epoch, (0.0, 0))
            self.epoch_sums[epoch] = (total + train, records + 1)
        if val is not None:
            self.epoch_vals[epoch] = val


def plot_run(run_dir: Path, name: str | None = None) -> list[Path]:
    """Draw `training_curve.png` and `loss_by_epoch.png` from the records in `run_dir`.

    Args:
        run_dir: a run folder.
        name: what to call the run in the titles; default: the folder's name.

    Returns:
        The pictures drawn; none where there is no record yet.

    Raises:
        UserError: the disk is full or the folder read-only.
    """
    history = _History()
    if (run_dir / RECORDS).exists():
        for entry in read_steps(run_dir / RECORDS):
            history.add(entry)
    if not history.rate.xs:
        return []
    title = name or run_dir.resolve().name
    return [
        _save(_draw_curve(history, title), run_dir / CURVE),
        _save(_draw_epochs(history, title), run_dir / BY_EPOCH),
    ]


def _draw_curve(history: _History, title: str) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _plot_train(top, history.train)
    _plot_val(top, *history.val.points())
    _label_losses(top, title, _summary(history))
    _limit_losses(top, np.concatenate([history.train.ys, history.val.ys]))

    xs, ys = history.rate.points()
    bottom.plot(xs, ys, color=_RATE, linewidth=1.5, marker="o" if len(xs) <= 3 else "")
    _scale_rates(bottom, ys)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.set_xlim(0, 1.02 * history.rate.xs[-1])
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda step, _: formats.count(round(step))))
    _tidy(bottom)
    return figure


def _draw_epochs(history: _History, title: str) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    train, val = _Line(), _Line()
    for epoch, (total, records) in history.epoch_sums.items():
        train.add(epoch, total / records)
    for epoch, last in history.epoch_vals.items():
        val.add(epoch, last)
    xs, ys = train.points()
    axes.plot(
        xs, ys, color=_TRAIN, linewidth=1.5, marker=_marker(xs), markersize=5, label="training, mean of the epoch"
    )
    _plot_val(axes, *val.points(), label="validation, last of the epoch")
    _label_losses(axes, title, "loss by epoch")
    axes.set_xlabel("epoch (from 0)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _plot_train(axes: Axes, line: _Line) -> None:
    xs, ys = line.points()
    if len(xs) <= 3 * _MEANS:
        axes.plot(xs, ys, color=_TRAIN, linewidth=1.2, marker=_marker(xs), markersize=4, label="training")
        return
    # So many that they make a band: the band pale, and its middle as the line.
    axes.plot(xs, ys, color=_TRAIN, linewidth=0.8, alpha=0.35)
    middle_xs, middle_ys = (
        [part.mean() for part in np.array_split(np.asarray(values), _MEANS)] for values in (line.xs, line.ys)
    )
    axes.plot(middle_xs, middle_ys, color=_TRAIN, linewidth=1.6, label="training")


def _marker(xs: Floats) -> str:
    return "o" if len(xs) <= _FEW else ""


def _plot_val(axes: Axes, xs: Floats, ys: Floats, label: str = "validation") -> None:
    if len(xs):
        size = 5 if len(xs) <= _FEW else 2
        axes.plot(xs, ys, color=_VAL, linewidth=1.5, marker="o", markersize=size, label=label)


def _label_losses(axes: Axes, title: str, subtitle: str) -> None:
    # Names are the user's: a `$` in one must not start a formula.
    short = title if len(title) <= 50 else f"{title[:49]}…"
    axes.set_title(short, loc="left", fontweight="bold", parse_math=False)
    axes.set_title(subtitle, loc="right", fontsize="medium", color="dimgray")
    axes.set_ylabel("loss (nats per token)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    _tidy(axes)


def _summary(history: _History) -> str:
    parts = [f"step {formats.count(round(history.rate.xs[-1]))}"]
    if history.train.ys:
        parts.append(f"training {formats.loss(history.train.ys[-1])}")
    if history.val.ys:
        parts.append(f"validation {formats.loss(history.val.ys[-1])}, best {formats.loss(min(history.val.ys))}")
    return "   ".join(parts)


def _limit_losses(axes: Axes, losses: Floats) -> None:
    """Let a spike leave the picture where it would press everything else flat; the start of the run is no spike."""
    if not len(losses):
        return
    low, usual, high = np.quantile(losses, (0.0, 0.98, 1.0))
    height = max(usual, losses[0]) - low
    if high - low > 3 * height > 0:
        axes.set_ylim(low - 0.05 * height, low + 1.5 * height)


def _scale_rates(axes: Axes, rates: Floats) -> None:
    """A log axis with a linear foot, so that a rate of 0 (the start of a warmup) lies on its bottom line."""
    positive = rates[rates > 0]
    if not len(positive):
        axes.set_ylim(bottom=0)
        return
    # Three decades are what is worth seeing; the foot takes the rest.
    peak = positive.max()
    foot = max(positive.min(), peak / 1000)
    has_foot = bool((rates < foot).any())
    axes.set_yscale("symlog" if has_foot else "log", **({"linthresh": foot, "linscale": 0.3} if has_foot else {}))
    axes.set_ylim(0 if has_foot else foot / 1.5, 1.5 * peak)
    decades = 10.0 ** np.arange(math.floor(math.log10(foot)), math.ceil(math.log10(peak)) + 1)
    ticks = decades if len(decades) > 3 else np.outer(decades, (1, 2, 5)).ravel()
    inside = [float(tick) for tick in ticks if foot / 1.5 <= tick <= 1.5 * peak]
    shown = [0.0] * has_foot + (inside if len(inside) > 1 else sorted({foot, peak}))
    axes.set_yticks(shown, [formats.rate(tick) if tick else "0" for tick in shown])
    axes.minorticks_off()


def _tidy(axes: Axes) -> None:
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path
