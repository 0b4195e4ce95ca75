"""Make the pictures of runs, and the table of report.md: `python docs/report_pictures.py WORK_FOLDER`.

diagnosis.png and report.png are of real runs, each trained from one recipe with one thing wrong: a minute on two
cores, and a Chromium for the second. Without a folder only the table is written. Tests hold what `report` says of runs
like these (tests/health/test_diagnosis.py).
"""

from __future__ import annotations

import copy
import email
import inspect
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmtrain.health import diagnosis, pace_diagnosis

GUIDE = Path(__file__).with_name("report.md")
PICTURE, PAGE = GUIDE.with_name("diagnosis.png"), GUIDE.with_name("report.png")
BEGIN, END = "<!-- rules: python docs/report_pictures.py -->\n", "<!-- end of rules -->\n"
VAL_BYTES = 20_000
Config = dict[str, Any]

BASE: Config = {
    "data": {"seq_len": 64},
    "model": {"dim": 48, "layers": 2, "heads": 2},
    "optimizer": {"lr": 3e-3},
    "schedule": {"warmup_steps": 20, "min_lr": 0.0},
    "training": {
        "micro_batch_size": 16, "global_batch_size": 16, "max_steps": 400, "eval_every": 20, "eval_batches": 8,
        "compile": False, "precision": "fp32", "sample_every": 100, "sample_tokens": 120, "sample_prompts": ["def "],
    },
    "checkpoint": {"save_every": None},
    "logging": {"every": 2, "csv": False, "plots": False},
}  # fmt: skip
# What is wrong with a run, and how many bytes of text it has; None: all.
RECIPES: dict[str, tuple[Config, int | None]] = {
    "healthy": ({}, None),
    "learning rate too high": (
        {"optimizer": {"lr": 0.5}, "schedule": {"name": "constant"}, "health": {"spike_z": None}},
        None,
    ),
    "learning rate too low": ({"optimizer": {"lr": 3e-6}}, None),
    "overfitting": ({}, 3_000),
}


def merged(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """The config with some keys of its sections changed."""
    result = copy.deepcopy(config)
    for section, values in changes.items():
        result.setdefault(section, {}).update(values)
    return result


def prepare_text(work: Path, size: int | None) -> Path:
    """The source of Python's json and email packages as bytes, `size` of it for training; the end is for validation."""
    from llmtrain.prepare import main as prepare

    out = work / f"data-{size}"
    if not out.exists():
        files = sorted(file for package in (json, email) for file in Path(package.__path__[0]).glob("*.py"))
        text = np.frombuffer(b"".join(file.read_bytes() for file in files), "u1").astype("<u2")
        tokens = work / f"tokens-{size}"
        tokens.mkdir(parents=True)
        text[:-VAL_BYTES][:size].tofile(tokens / "train.bin")
        text[-VAL_BYTES:].tofile(tokens / "val.bin")
        prepare(["--input", str(tokens), "--tokenizer", "byte", "--out", str(out)])
    return out


def train_recipe(work: Path, name: str) -> Path:
    """Train one of the recipes, unless that is done; return its run folder."""
    from llmtrain.train import main as train

    changes, size = RECIPES[name]
    folder = work / name.replace(" ", "-")
    places = {"run": {"dir": str(folder), "name": name}, "data": {"path": str(prepare_text(work, size))}}
    config = work / f"{folder.name}.yaml"
    config.write_text(yaml.safe_dump(merged(merged(BASE, changes), places)))
    train(["--config", str(config)])
    return folder


def draw(folders: Mapping[str, Path], picture: Path) -> None:
    """The losses of each run on the same axes, the healthy one's behind the others, under what `report` says of it."""
    from matplotlib.figure import Figure

    from llmtrain.observe.run_facts import facts_of
    from llmtrain.observe.run_folder import read_run

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    healthy = read_run(folders["healthy"]).points("train_loss")
    for axes, (name, folder) in zip(panels.flat, folders.items(), strict=True):
        run = read_run(folder)
        if name != "healthy":
            axes.plot(*healthy, color="0.7", linewidth=1.2, label="training, healthy run")
        axes.plot(*run.points("train_loss"), color="tab:blue", linewidth=1.2, label="training")
        axes.plot(*run.points("val_loss"), color="tab:red", linewidth=1.2, marker="o", markersize=3, label="validation")
        said = [remark["name"] for remark in facts_of(run)["diagnosis"] if remark["name"] in diagnosis.RULES]
        axes.set_title(f"{name}\nreport: {', '.join(said) or 'nothing'}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.label_outer()
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("loss, nats per byte", fontsize=10)
    panels[1, 1].legend(frameon=False, fontsize=9)
    figure.savefig(picture, dpi=80)
    shrink(picture)


def photograph(folders: Mapping[str, Path], work: Path, picture: Path) -> None:
    """The page of `report --html` of three of the runs, with the pointer on a curve."""
    from playwright.sync_api import sync_playwright

    from llmtrain.report import main as report

    page = work / "report.html"
    shown = ("healthy", "learning rate too high", "overfitting")
    report([*(str(folders[name]) for name in shown), "--html", str(page)])
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1100, "height": 690})
        view.goto(page.resolve().as_uri())
        view.mouse.move(655, 600)
        view.screenshot(path=picture)
        browser.close()
    shrink(picture)


def shrink(picture: Path) -> None:
    """To 64 colours, a third of the bytes."""
    from PIL import Image

    with Image.open(picture) as image:
        smaller = image.convert("RGB").quantize(64)
    smaller.save(picture, optimize=True)


def table() -> str:
    """Markdown: what each rule says, and when, out of the rules themselves."""
    lines = ["| it says | when |", "|---|---|"]
    for rules in (diagnosis.WITHOUT_SHAPE, diagnosis.RULES, pace_diagnosis.RULES):
        for name, rule in rules.items():
            when = " ".join(str(inspect.getdoc(rule)).split()).replace("|", "\\|")
            lines.append(f"| {name} | {when} |")
    return "\n".join(lines) + "\n"


def with_table(guide: str) -> str:
    """The guide with the table that is due."""
    before, rest = guide.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if sys.argv[1:]:
        runs = {name: train_recipe(Path(sys.argv[1]), name) for name in RECIPES}
        draw(runs, PICTURE)
        photograph(runs, Path(sys.argv[1]), PAGE)
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
