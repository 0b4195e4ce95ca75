"""How long a user waits: `llmtrain --help`, `llmtrain train --help`, and from launch to the first optimizer step.

    python -m benchmarks.startup [--rounds 5] [--out FILE]

The first step is taken from the time stamp of its record (`logging.every=1`), with `configs/debug.yaml` over a small
corpus, so opening the data, building the model and the step itself are in it. So short a run compiles nothing unless it
is told to: that is measured with torch's cache of compiled code empty, and then with what the run before left there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import alternate, print_table, spread, write_result
from benchmarks.synthetic import write_random_data

ROOT = Path(__file__).parents[1]
MODULE = [sys.executable, "-m", "llmtrain"]


def seconds_of(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([*MODULE, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def seconds_to_first_step(data: Path, run: Path, *overrides: str, cache: Path | None = None) -> float:
    settings = [f"data.path={data}", f"run.dir={run}", "training.max_steps=1", "training.eval_every=null"]
    settings += ["logging.plots=false", "checkpoint.save_every=null", "logging.every=1"]
    began = time.time()
    command = [*MODULE, "train", "--config", str(ROOT / "configs/debug.yaml"), *settings, *overrides]
    caching = {"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {}
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **caching})
    record = json.loads((run / "metrics.jsonl").read_text())
    return record["time"] - began


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: results/startup.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        data = write_random_data(Path(name) / "data", 1_000_000, 259)
        runs, cache = (Path(name) / f"run{number}" for number in range(1000)), Path(name) / "cache"

        def compiled(is_cached: bool) -> float:
            if not is_cached:
                shutil.rmtree(cache, ignore_errors=True)
            return seconds_to_first_step(data, next(runs), "training.compile=true", cache=cache)

        measures = alternate(
            {
                "llmtrain --help": lambda: seconds_of("--help"),
                "llmtrain train --help": lambda: seconds_of("train", "--help"),
                "launch to first step": lambda: seconds_to_first_step(data, next(runs)),
                "launch to first step, compiled": lambda: compiled(False),
                "launch to first step, compiled, from the cache": lambda: compiled(True),
                "import torch": lambda: seconds_of_python("import torch"),
            },
            args.rounds,
        )
    rows = [
        {"wait": what, **{f"ms {k}": 1000 * v for k, v in spread(values).items()}} for what, values in measures.items()
    ]
    print_table(rows)
    print(write_result("startup", rows, ["llmtrain", "torch", "accelerate"], args.out))


def seconds_of_python(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
