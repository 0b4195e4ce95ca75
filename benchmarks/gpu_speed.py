"""Tokens per second, MFU and peak memory of training as shipped, by size, on the one GPU that is there.

    python -m benchmarks.gpu_speed [--sizes 124m 1.3b 7b] [--steps 40] [--repeats 2] [--cpu] [-- training.fp8=true ...]

Each turn is `llmtrain train` in a process of its own over random ids; sizes by turns, and two rows for each: `shipped`,
with `precision` and `compile` as they are, and `eager`, once and for few steps, for the formulas of memory have a form
for each. A step's time is the median of a turn's records but the first three, which compile and warm up. What follows
the last step is not measured: a disk too small for the last checkpoint costs nothing. MFU counts causal attention as
causal; `PaLM` is the same in the form of that paper, which counts all positions. Peak memory is the allocator's, beside
the predicted one. Goals: MFU of 50 % at 1.3b (length 2048), 45 % at 7b with recomputation, as shipped, and a predicted
peak within 10 %; `goals` says which are reached. Without a GPU, or with --cpu, all is small and there are none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import print_table, spread, train_records, write_result
from benchmarks.synthetic import write_random_data
from llmtrain.config import load_config
from llmtrain.errors import UserError, run_main
from llmtrain.model.peak import peak_of_run

VOCAB_SIZE = 50_304


class Layout(NamedTuple):
    """How a size is trained; `accumulation`: micro-batches of a step, over which an update spreads its cost."""

    seq_len: int
    micro_batch: int
    accumulation: int
    checkpointing: str


# What fits into 141 GB by `peak_memory`, and there is about the fastest by `llmtrain plan`.
LARGE = {
    "124m": Layout(1024, 32, 4, "none"),
    "1.3b": Layout(2048, 16, 4, "none"),
    "7b": Layout(2048, 4, 1, "selective"),
}
SMALL = {name: layout._replace(seq_len=64, micro_batch=2) for name, layout in LARGE.items()}
MFU_GOALS = {"1.3b": 50, "7b": 45}
SHIPPED, EAGER = "shipped", "eager"
WAYS: dict[str, list[str]] = {SHIPPED: [], EAGER: ["training.compile=false"]}
EVERY, LEFT_OUT = 4, 3  # steps from one record to the next; records


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(LARGE), default=list(LARGE))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2, help="turns of each size")
    parser.add_argument("--limit-s", type=float, default=600.0, help="of a turn, in seconds")
    parser.add_argument("--cpu", action="store_true", help="small, on the CPU; so too where there is no GPU")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/gpu_speed.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every row")
    args = parser.parse_args(argv)
    if args.steps < EVERY * (LEFT_OUT + 1):
        raise UserError(
            f"--steps {args.steps}: {EVERY * LEFT_OUT} warm up; at least {EVERY * (LEFT_OUT + 1)} are needed"
        )
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: at least 1 is needed")
    on_cpu = args.cpu or not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        data = write_random_data(Path(name) / "data", 20_000_000, VOCAB_SIZE if not on_cpu else 259)
        turns: dict[tuple[str, str], list[dict[str, Any]]] = {(size, way): [] for size in args.sizes for way in WAYS}
        for number, (size, way) in itertools.product(range(args.repeats), turns):
            if way == EAGER and number:
                continue  # memory is the same each time
            run = Path(name) / f"{size}-{way}-{number}"
            steps = args.steps if way == SHIPPED else EVERY * (LEFT_OUT + 1)
            settings = [*_settings(size, steps, on_cpu, data, run), *WAYS[way], *args.overrides]
            turns[size, way].append(turn(settings, run, steps, on_cpu, args.limit_s))
            shutil.rmtree(run, ignore_errors=True)
            print(json.dumps({"size": size, "way": way, **turns[size, way][-1]}), flush=True)
            rows = [row(*of, found, on_cpu) for of, found in turns.items() if found]
            write_result("gpu_speed", [*rows, {"arguments": argv}], ["llmtrain", "torch", "triton"], args.out)
    print()
    print_table([{key: _printed(value) for key, value in line.items() if key != "settings"} for line in rows])
    if failed := [f"{line['size']} {line['way']}" for line in rows if line["problem"]]:
        raise UserError(f"{', '.join(failed)}: did not run to the end; the lines above say why")


def _settings(size: str, steps: int, on_cpu: bool, data: Path, run: Path) -> list[str]:
    seq_len, rows, accumulation, checkpointing = (SMALL if on_cpu else LARGE)[size]
    model = ["model.preset=1m"] if on_cpu else [f"model.preset={size}"]
    return [
        *model, f"data.path={data}", f"run.dir={run}",
        f"data.seq_len={seq_len}", f"training.micro_batch_size={rows}",
        f"training.global_batch_size={rows * accumulation}", f"training.activation_checkpointing={checkpointing}",
        f"training.max_steps={steps}", f"logging.every={EVERY}", "training.eval_every=null", "logging.plots=false",
        "checkpoint.save_every=null", "checkpoint.async_save=false", "optimizer.lr=1e-5", "schedule.min_lr=0",
    ]  # fmt: skip


def turn(settings: list[str], run: Path, steps: int, on_cpu: bool, limit_s: float) -> dict[str, Any]:
    """Train one size once; what it measured, or in `problem` why it did not."""
    empty = run.with_suffix(".yaml")
    empty.write_text("{}\n")
    records, said = train_records(["--config", str(empty), *settings], run, on_cpu=on_cpu, limit_s=limit_s)
    about: dict[str, Any] = {"settings": settings, "problem": None}
    if not records or records[-1]["step"] < steps // EVERY * EVERY:
        return about | {"problem": said}
    config, records = load_config(run / "config.yaml"), records[LEFT_OUT:]
    seconds = statistics.median(record["step_time_s"] for record in records)
    return about | {
        "ms/step": 1000 * seconds,
        "tokens/s": config.training.global_batch_size * config.data.seq_len / seconds,
        "MFU %": _percent(record["mfu"] for record in records),
        "PaLM MFU %": _percent(record["mfu_palm"] for record in records),
        "peak GB": records[-1]["memory_gb"],
        "predicted GB": None if on_cpu else peak_of_run(config).bytes / 1e9,
    }


def _percent(shares: Iterable[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return 100 * statistics.median(known) if known else None


def row(size: str, way: str, turns: list[dict[str, Any]], on_cpu: bool) -> dict[str, Any]:
    """The spread over the turns of a size and way, what was predicted, and which goals are reached."""
    whole = [turn for turn in turns if turn["problem"] is None]
    problems = [turn["problem"] for turn in turns if turn["problem"]]
    line = {"size": size, "way": way, "settings": turns[0]["settings"], "problem": problems[0] if problems else None}
    if not whole:
        return line
    for name in ("ms/step", "tokens/s", "MFU %", "PaLM MFU %", "peak GB"):
        values = [turn[name] for turn in whole]
        line[name] = None if None in values else spread(values)
    line["predicted GB"] = predicted = whole[0]["predicted GB"]
    if on_cpu:
        return line | {"goals": None}
    goals = {"peak within 10 %": abs(line["peak GB"]["median"] / predicted - 1) <= 0.1}
    if way == SHIPPED and line["MFU %"] and size in MFU_GOALS:
        goals[f"MFU of {MFU_GOALS[size]} %"] = line["MFU %"]["median"] >= MFU_GOALS[size]
    return line | {"goals": goals}


def _printed(value: Any) -> Any:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.1f} ({value['min']:.1f} to {value['max']:.1f})"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {'yes' if is_reached else 'no'}" for name, is_reached in value.items())
    return value


if __name__ == "__main__":
    sys.exit(run_main(main))
