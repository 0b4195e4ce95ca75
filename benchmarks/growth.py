"""How step time and peak memory grow with parameters, length and batch, each over a decade.

    python -m benchmarks.growth [--rounds 5]

Along each axis the rest stays. Time is that of real steps (float32, eager), all sizes in turns. Memory is counted
twice: the bytes of tensors at every operator (exact, on any machine), and the peak of a process of its own beyond what
it had before its model. An exponent is the slope of the straight line through log(measure) over log(axis): 1 is in
proportion, 2 quadratic. Its spread, `low` to `high`, is over the rounds for time, and leaving out one size at a time
for memory; `between` are the exponents between neighbouring sizes at the two ends of the axis, which differ where a sum
of two laws is no straight line. `formula` is the exponent of `flops_per_token` or `peak_memory` at the same sizes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import alternate, print_table, spread, write_result
from benchmarks.held import peak_bytes, step_config, stepper
from benchmarks.loss import peak_mb
from benchmarks.recompute import timed
from llmtrain.config import RunConfig
from llmtrain.engine.device import pick_device
from llmtrain.errors import run_main
from llmtrain.model.cost import flops_per_token, parameter_count
from llmtrain.model.peak import peak_of_run

VOCABULARY = 256  # small, so that parameters are those of blocks and memory is not that of logits
SMALL = {"dim": 128, "layers": 4, "heads": 4}
# By axis: its sizes, and what a step is at each of them: model, length, batch.
AXES: dict[str, dict[int, tuple[dict[str, int], int, int]]] = {
    "parameters": {
        dim: ({**SMALL, "dim": dim, "heads": dim // 32}, 256, 4) for dim in (128, 192, 256, 320, 416)
    },
    "length": {seq_len: (SMALL, seq_len, 4) for seq_len in (64, 128, 256, 512, 1024)},
    "batch": {batch: (SMALL, 128, batch) for batch in (2, 4, 8, 16, 32)},
}  # fmt: skip
POINTS = {(axis, size): step for axis, steps in AXES.items() for size, step in steps.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns that count, after one that does not")
    parser.add_argument("--steps", type=int, default=3, help="of which the median counts as one turn")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/growth.json")
    parser.add_argument("--process-peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.process_peak_of:
        axis, size = args.process_peak_of.split("=")
        print(process_peak_mb(made(axis, int(size))))
        return
    configs = {point: made(*point) for point in POINTS}
    turns = {name(point): timed(stepper(config), args.steps) for point, config in configs.items()}
    times = alternate(turns, args.rounds)
    points = [measured_point(point, configs[point], times[name(point)]) for point in POINTS]
    lines = [line for axis in AXES for line in fitted(axis, [row for row in points if row["axis"] == axis], times)]
    print_table([{key: value for key, value in row.items() if key != "ms max"} for row in points])
    print()
    print_table([{key: f"{v:.2f}" if isinstance(v, float) else v for key, v in row.items()} for row in lines])
    facts = {
        "device": str(pick_device()), "threads": torch.get_num_threads(), "precision": "fp32", "vocab_size": VOCABULARY,
        "rounds": args.rounds, "steps": args.steps,
    }  # fmt: skip
    write_result("growth", [*points, *lines, facts], ["llmtrain", "torch"], args.out)


def made(axis: str, size: int) -> RunConfig:
    model, seq_len, batch = POINTS[axis, size]
    return step_config({**model, "vocab_size": VOCABULARY}, seq_len, batch)


def name(point: tuple[str, int]) -> str:
    return f"{point[0]}={point[1]}"


def process_peak_mb(config: RunConfig) -> float:
    """Most memory of this process beyond what it had before the model, in MB; on a GPU of its allocator."""
    stepper(step_config({"dim": 64, "layers": 1, "heads": 2, "vocab_size": 64}, 64, 1))()  # what libraries take once

    def work() -> None:
        step = stepper(config)
        for _ in range(2):
            step()

    return peak_mb(work, warm=False)


def measured_point(point: tuple[str, int], config: RunConfig, times: Sequence[float]) -> dict[str, Any]:
    """One size: what it is, time, both memories, and what the formulas say."""
    axis, size = point
    model, seq_len, batch = config.model, config.data.seq_len, config.training.micro_batch_size
    command = [sys.executable, "-m", "benchmarks.growth", "--process-peak-of", name(point)]
    process = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    peak = peak_of_run(config, device=pick_device().type)
    parameters = parameter_count(model, seq_len)
    return {
        "axis": axis, "size": parameters if axis == "parameters" else size, "dim": model.dim, "length": seq_len,
        "batch": batch, **{f"ms {key}": value for key, value in spread(times).items()},
        "MB of tensors": peak_bytes(config) / 1e6, "MB formula": peak.bytes / 1e6, "MB of the process": process,
        "GFLOP": flops_per_token(model, seq_len) * seq_len * batch / 1e9,
    }  # fmt: skip


def fitted(axis: str, rows: Sequence[dict[str, Any]], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The exponents of time and of both memories along one axis."""
    sizes = [row["size"] for row in rows]
    by_round = zip(*(times[name((axis, size))] for size in AXES[axis]), strict=True)
    over_rounds = spread([exponent(sizes, values) for values in by_round])
    lines = []
    for measure, formula in (("ms median", "GFLOP"), ("MB of tensors", "MB formula"), ("MB of the process", "")):
        values = [row[measure] for row in rows]
        own = exponent(sizes, values)
        others = spread([exponent(*without(index, sizes, values)) for index in range(len(sizes))])
        found = over_rounds if measure == "ms median" else others
        lines.append(
            {
                "fit": f"{measure} over {axis}", "exponent": own, "low": found["min"], "high": found["max"],
                "between first": exponent(sizes[:2], values[:2]), "between last": exponent(sizes[-2:], values[-2:]),
                "formula": exponent(sizes, [row[formula] for row in rows]) if formula else None,
                "off the line, %": off_the_line(sizes, values),
            }
        )  # fmt: skip
    return lines


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def without(index: int, *lists: Sequence[float]) -> list[list[float]]:
    """The lists, each without one of its elements."""
    return [[value for at, value in enumerate(values) if at != index] for values in lists]


def off_the_line(sizes: Sequence[float], values: Sequence[float]) -> float:
    """By how much the sizes lie beside the line, as the root mean square of ratios, in percent."""
    slope, height = np.polyfit(np.log(sizes), np.log(values), 1)
    beside = np.log(values) - (slope * np.log(sizes) + height)
    return 100 * math.sqrt(statistics.mean(float(value) ** 2 for value in beside))


if __name__ == "__main__":
    sys.exit(run_main(main))
