"""What a CPU gains from threads, large pages and torch.compile: a step of llmtrain with each.

    python -m benchmarks.cpu [--size tiny 10m] [--precision fp32] [--steps 12] [--repeats 3] [--out FILE]

Each turn is a process, for compiled code keeps the number of threads that it was made for. It takes `--steps` steps of
the real engine (no records, no data): `first s` is the first, which compiles where that is asked for, with nothing in
the cache of compiled code; `ms/step` is the median of those after the first third. `pays after`: so many steps until
compiling has paid for itself. Numbers of threads: 1, the cores that this process may use, twice as many; with the
second, which torch takes by itself, also in pages of 4 KB, as it was before `engine/device.py` asked for larger ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate, print_table, spread, write_result
from benchmarks.contenders import SIZES
from benchmarks.held import step_config, stepper

_SMALL, _LARGE = "4 KB", "2 MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny", "10m"])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--steps", type=int, default=12, help="of a turn, at least 6")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    parser.add_argument("--out", type=Path, help="default: results/cpu.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a turn is to do, as JSON
    args = parser.parse_args()
    if args.one:
        print(json.dumps(turn(**json.loads(args.one))))
        return
    rows: list[dict[str, Any]] = []
    for size in args.size:
        for precision in args.precision:
            rows += measured(size, precision, args.steps, args.repeats)
    print_table(rows)
    facts = {"arguments": {"steps": args.steps, "repeats": args.repeats}, "threads by torch": torch.get_num_threads()}
    print(write_result("cpu", [*rows, facts], ["llmtrain", "torch"], args.out))


def turn(size: str, precision: str, threads: int, compiled: bool, steps: int) -> dict[str, float]:
    """In a process of its own: seconds of the first step, milliseconds of the later ones."""
    torch.set_num_threads(threads)
    shape = SIZES[size]
    model = {"dim": shape.dim, "layers": shape.layers, "heads": shape.heads, "vocab_size": shape.vocab_size}
    step = stepper(step_config(model, shape.seq_len, shape.batch, precision=precision, compile=compiled))
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {"first s": seconds[0], "ms/step": 1000 * statistics.median(seconds[max(2, steps // 3) :])}


def measured(size: str, precision: str, steps: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each number of threads, eager and compiled, and one in small pages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kinds = [
        (threads, pages, compiled)
        for threads in sorted({1, cores, 2 * cores})
        for pages, compiled in ((_SMALL, False), (_LARGE, False), (_LARGE, True))
        if pages == _LARGE or threads == cores
    ]
    asked = {}
    for threads, pages, compiled in kinds:
        turn_of = {"size": size, "precision": precision, "threads": threads, "compiled": compiled, "steps": steps}
        asked[str((threads, pages, compiled))] = partial(_in_a_process, pages, turn_of)
    turns = alternate(asked, repeats, 0)
    rows: list[dict[str, Any]] = []
    for threads, pages, compiled in kinds:
        own = turns[str((threads, pages, compiled))]
        row: dict[str, Any] = {"size": size, "precision": precision, "threads": threads, "pages": pages}
        row["compiled"] = compiled
        row |= {f"ms/step {name}": value for name, value in spread([one["ms/step"] for one in own]).items()}
        row["first s"] = statistics.median(one["first s"] for one in own)
        row["pays after"] = None
        if compiled:
            eager = rows[-1]
            gained_s = (eager["ms/step median"] - row["ms/step median"]) / 1000
            row["pays after"] = round((row["first s"] - eager["first s"]) / gained_s) if gained_s > 0 else None
        rows.append(row)
    return rows


def _in_a_process(pages: str, asked: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        # Nothing but torch itself may have been compiled before.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "CUDA_VISIBLE_DEVICES": ""}
        environment["THP_MEM_ALLOC_ENABLE"] = str(int(pages == _LARGE))
        command = [sys.executable, "-m", "benchmarks.cpu", "--one", json.dumps(asked)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    main()
