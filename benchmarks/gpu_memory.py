"""Peak memory of a GPU's allocator beside what the formulas predict, by engine, size, precision and recomputation.

    python -m benchmarks.gpu_memory [--ranks 2]
    python -m benchmarks.cuda_standin --gpus 2 python -m benchmarks.gpu_memory

Each row is a launch that takes a few steps of the real engine; the most that torch's allocator held in the last two is
compared with `peak_memory`. Since no value matters for that, it may run where there is no GPU, see cuda_standin.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, print_table, write_result
from benchmarks.held import engine_stepper, step_config
from llmtrain.config import RunConfig
from llmtrain.engine import make_engine
from llmtrain.errors import UserError, run_main
from llmtrain.model.peak import peak_of_run

VOCAB_SIZE = 50_304
WARM_UP, STEPS = 3, 2  # ZeRO-3 learns the order of modules in the first
LIMIT_S = 300
SEQ_LEN = 1024
# By size: micro-batch.
SIZES = {"124m": 16, "350m": 4, "1.3b": 2}


def rows(ranks: int) -> Iterator[dict[str, Any]]:
    """What is measured: on one device every kind of step, under the other engines the usual ones."""
    for size in SIZES:
        for compiled in (False, True):
            for checkpointing in ("none", "selective", "full"):
                yield {"size": size, "checkpointing": checkpointing, "compiled": compiled}
    for more in ({"precision": "fp32"}, {"optimizer": "muon"}, {"accumulation": 1}):
        yield {"size": "350m", **more}
    if ranks > 1:
        for engine in ("ddp", "zero1", "zero2", "zero3"):
            for accumulation in (1, 2):
                yield {"size": "350m", "engine": engine, "accumulation": accumulation}
        for compiled in (False, True):
            yield {"size": "1.3b", "engine": "zero3", "checkpointing": "selective", "compiled": compiled}


DEFAULTS = {
    "engine": "single", "precision": "bf16", "optimizer": "adamw", "checkpointing": "none", "compiled": False,
    "accumulation": 2,
}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="of the engines that have several; default: the GPUs there are")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/gpu_memory.json")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("there is no GPU; python -m benchmarks.cuda_standin COMMAND ... runs it without")
    if args.worker:
        work(args.worker, args.told)
        return
    ranks = args.ranks or torch.cuda.device_count()
    table = []
    for row in rows(ranks):
        table.append(measured({**DEFAULTS, **row}, ranks))
        print(json.dumps(table[-1]), flush=True)
    print_table(table)
    device = {"device": torch.cuda.get_device_name(), "driver": _driver(), "ranks": ranks}
    write_result("gpu_memory", [*table, device], ["llmtrain", "torch", "deepspeed", "triton"], args.out)
    if failed := [row for row in table if row["problem"]]:
        raise UserError(f"{len(failed)} rows did not run to the end; the lines above say why")


def measured(row: dict[str, Any], ranks: int) -> dict[str, Any]:
    """A launch of its own: what it held, and what is predicted."""
    processes = 1 if row["engine"] == "single" else ranks
    with tempfile.TemporaryDirectory() as name:
        told = Path(name) / "told.json"
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            str(ROOT / f"launch/{row['engine']}.yaml"), "--num_processes", str(processes), "--main_process_port", "0",
            "-m", "benchmarks.gpu_memory", "--worker", json.dumps(row), "--told", str(told),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_S)
            problem = None if done.returncode == 0 else done.stderr[-2000:]
        except subprocess.TimeoutExpired:
            problem = f"took longer than {LIMIT_S} s"
        numbers = json.loads(told.read_text()) if problem is None else {}
    return {**row, "ranks": processes, **numbers, "problem": problem}


def config_of(row: dict[str, Any], ranks: int) -> RunConfig:
    """What a row's launch trains."""
    model = {"preset": row["size"], "vocab_size": VOCAB_SIZE}
    return step_config(
        model, SEQ_LEN, SIZES[row["size"]], row["accumulation"], world_size=ranks, optimizer=row["optimizer"],
        precision=row["precision"], compile=row["compiled"], activation_checkpointing=row["checkpointing"],
    )  # fmt: skip


def work(row: dict[str, Any], told: Path) -> None:
    """A rank of a launch."""
    engine = make_engine(timeout_s=LIMIT_S)
    config = config_of(row, engine.world_size)
    step = engine_stepper(engine, config)
    for _ in range(WARM_UP):
        step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        step()
    held = torch.cuda.max_memory_allocated()
    predicted = peak_of_run(config, engine=row["engine"], world_size=engine.world_size)
    if engine.rank == 0:
        numbers = {
            "peak GB": held / 1e9, "predicted GB": predicted.bytes / 1e9, "of predicted": held / predicted.bytes,
            "at": predicted.moment,
        }  # fmt: skip
        told.write_text(json.dumps(numbers))
    engine.close()


def _driver() -> str:
    """Of the GPU; of the stand-in, which has no nvidia-smi, that."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except OSError:
        return "none: benchmarks.cuda_standin"


if __name__ == "__main__":
    sys.exit(run_main(main))
