"""Saving and loading the training state of two processes, each its own part, beside what their users do now, in turns.

    python -m benchmarks.checkpoint_ranks [--preset 350m] [--rounds 2] [--only cpu-zero3] [--folder DIR]

DDP is beside `accelerate.save_state` and DCP, ZeRO-3 beside DeepSpeed's own `save_checkpoint`, each over the very same
model and AdamW state (float32, random). A time is that of the slower process, from a barrier to a barrier. What the
columns mean is in benchmarks/checkpoint.py; `extra` is the most of any process, as a share of the part that it saves.

Every load is checked: what a process saves of the state is zero before, and after it as it was. Otherwise than in
benchmarks/checkpoint.py optimizers keep their tensors for a load, of which whoever replaces them holds two for a while.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import PeakMemory, dcp_contender, drop_from_cache, files
from benchmarks.common import ROOT, alternate, print_table, write_result
from benchmarks.synthetic import write_random_data
from llmtrain.assemble import Assembly, assemble
from llmtrain.checkpoint.folders import step_folder
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.restore import Restorer
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.config import CheckpointSection, make_config
from llmtrain.data.staging import sync_path
from llmtrain.engine import make_engine

LAUNCHES = ("cpu-ddp", "cpu-zero3")
OURS, OURS_ASYNC = "llmtrain", "llmtrain, async"
Action = Callable[[Path], float | None]  # of a save also how long it kept the loop
Both = tuple[Action, Action | None]


class Bench:
    """The state that all contenders save, and what a turn measures, in each of the processes."""

    def __init__(self, parts: Assembly, folder: Path):
        self.parts, self.engine, self.folder = parts, parts.engine, folder
        torch.manual_seed(1)
        for fragment in self.engine.to_fill():  # which makes the optimizer's state
            fragment.values.normal_().abs_() if fragment.shape else fragment.values.fill_(7.0)
        self.engine.publish()
        self.own_bytes = sum(fragment.values.nbytes for fragment in self.engine.fragments())
        self.sums = self._sums()
        self.turns: dict[str, list[dict[str, float]]] = {}

    def _sums(self) -> list[float]:
        return [float(fragment.values.sum(dtype=torch.float64)) for fragment in self.engine.fragments()]

    def turn(self, name: str, save: Action, load: Action | None) -> float:
        """One save and one load; what was written is deleted."""
        target = self.folder / "turn"
        with PeakMemory() as memory:
            began = self._together()
            stall = save(target)
            measured = {"save s": self._together() - began}
        if self.engine.rank == 0:
            for path in files(target):
                sync_path(path)
        measured["durable s"] = self._together() - began
        if stall is not None:
            measured["stall s"] = max(self.engine.gather(stall))
        measured["extra"] = max(self.engine.gather(memory.extra / self.own_bytes))
        if load:
            measured |= self._load(load, target)
        self._together()
        if self.engine.rank == 0:
            shutil.rmtree(target)
            print(f"  {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in measured.items()), flush=True)
        self._together()
        self.turns.setdefault(name, []).append(measured)
        return measured["durable s"]

    def _load(self, load: Action, target: Path) -> dict[str, float]:
        for fragment in self.engine.fragments():
            fragment.values.zero_()
        self.engine.publish()
        if self.engine.rank == 0:
            for path in files(target):
                drop_from_cache(path)
        with PeakMemory() as memory:
            began = self._together()
            load(target)
            seconds = self._together() - began
        if self._sums() != self.sums:
            raise RuntimeError("what was loaded is not what was saved")
        return {"load s": seconds, "extra, load": max(self.engine.gather(memory.extra / self.own_bytes))}

    def _together(self) -> float:
        self.engine.barrier()
        return time.perf_counter()


def llmtrain_contenders(bench: Bench) -> dict[str, Both]:
    """The store and the loading as a run uses them."""
    parts, steps = bench.parts, iter(range(1, 10**6))

    def saver(asynchronous: bool) -> Action:
        runs = bench.folder / f"run-{asynchronous}"
        store = CheckpointStore(runs, CheckpointSection(async_save=asynchronous), parts.config.to_yaml(), parts.data)
        store.expect_saves(bench.engine)
        if getting := store._snapshot._getting:
            getting.join()

        def save(folder: Path) -> float | None:
            step = next(steps)
            began = time.perf_counter()
            store.save(bench.engine, {"step": step}, ())
            stall = time.perf_counter() - began
            if failure := store.settle(bench.engine):
                raise RuntimeError(failure)
            if bench.engine.rank == 0:
                step_folder(runs, step).rename(folder)
            return stall if asynchronous else None

        return save

    def load(folder: Path) -> None:
        restorer = Restorer(bench.engine, 600.0, lambda: False, CheckpointReader)
        if not restorer.restore(lambda open_one: open_one(folder), lambda _: None):
            raise RuntimeError(f"{folder}: nothing was loaded")
        bench.engine.publish()

    return {OURS: (saver(False), load), OURS_ASYNC: (saver(True), None)}


def peers_of_ddp(bench: Bench) -> dict[str, Both]:
    """`save_state`, by which rank 0 writes all, and DCP."""
    model, optimizer, accelerator = bench.engine._bare, bench.engine._optimizer, bench.engine._accelerator
    accelerator.prepare_optimizer(optimizer)
    return {
        "accelerate": (
            lambda folder: accelerator.save_state(str(folder)) and None,
            lambda folder: accelerator.load_state(str(folder)),
        ),
        "DCP": dcp_contender(model, optimizer),
    }


def peers_of_zero(bench: Bench) -> dict[str, Both]:
    """What DeepSpeed's documentation shows."""
    zero = bench.engine._model
    return {
        "DeepSpeed": (
            lambda folder: zero.save_checkpoint(str(folder), tag="t") and None,
            lambda folder: zero.load_checkpoint(str(folder), tag="t") and None,
        )
    }


def work(launch: str, preset: str, rounds: int, folder: Path, out: str) -> None:
    """One of the processes."""
    config = make_config(
        {
            "run": {"dir": f"{folder}/run"},
            "data": {"path": f"{folder}/data", "seq_len": 128},
            "model": {"preset": preset},
            "training": {
                "max_steps": 1, "precision": "fp32", "compile": False, "eval_every": None, "micro_batch_size": 1,
                "global_batch_size": 2,
            },
        }
    )  # fmt: skip
    engine = make_engine(600.0)
    bench = Bench(assemble(config, engine), folder)
    contenders = {**llmtrain_contenders(bench), **(peers_of_ddp if launch == "cpu-ddp" else peers_of_zero)(bench)}
    alternate(
        {name: lambda name=name, both=both: bench.turn(name, *both) for name, both in contenders.items()},  # type: ignore[misc]
        rounds,
    )
    parts_gb = [size / 1e9 for size in engine.gather(bench.own_bytes)]
    if engine.rank == 0:
        Path(out).write_text(json.dumps({"turns": bench.turns, "GB of each process": parts_gb}))
    engine.close()


def measure(launch: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Launch the processes; one row for each contender."""
    out = folder / f"{launch}.json"
    worker = json.dumps([launch, args.preset, args.rounds, str(folder), str(out)])
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"launch/{launch}.yaml"),
        "--num_processes", "2", "--main_process_port", "0", "-m", "benchmarks.checkpoint_ranks", "--worker", worker,
    ]  # fmt: skip
    print(launch, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL if args.quiet else None, check=True)
    read = json.loads(out.read_text())
    rows = [row_of(launch, name, turns) for name, turns in read["turns"].items()]
    others = [row for row in rows if row["contender"] not in (OURS, OURS_ASYNC)]
    fastest = min(row["durable s"] for row in rows if row["contender"] != OURS_ASYNC)
    for row in rows:
        row["of the fastest peer"] = {
            key: row[key] / min(one[key] for one in others) for key in ("durable s", "load s") if row[key] is not None
        }
        if row["stall s"] is not None:
            row["stall of the fastest save"] = row["stall s"] / fastest
        row["turns, the first not counted"] = read["turns"][row["contender"]]
        row["GB of each process"] = read["GB of each process"]
    return rows


def row_of(launch: str, name: str, turns: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the turns that count; memory as its maximum over all turns."""
    row: dict[str, Any] = {"launch": launch, "contender": name}
    for key in ("save s", "durable s", "stall s", "load s"):
        row[key] = statistics.median(turn[key] for turn in turns[1:]) if key in turns[0] else None
    for key in ("extra", "extra, load"):
        row[f"{key} %"] = 100 * max(turn[key] for turn in turns) if key in turns[0] else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="350m")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each that count, after one that does not")
    parser.add_argument("--only", choices=LAUNCHES)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="file of the result; default: results/checkpoint_ranks.json")
    parser.add_argument("--quiet", action="store_true", help="leave out what the libraries say")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        launch, preset, rounds, folder, out = json.loads(args.worker)
        work(launch, preset, rounds, Path(folder), out)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        write_random_data(Path(name) / "data", tokens=100_000, vocab_size=50_304)
        for launch in [args.only] if args.only else LAUNCHES:
            rows += measure(launch, args, Path(name))
    shown = ("launch", "contender", "save s", "durable s", "stall s", "load s", "extra %", "extra, load %")
    print_table([{key: row[key] for key in shown} for row in rows])
    packages = ["llmtrain", "torch", "accelerate", "deepspeed", "safetensors"]
    write_result("checkpoint_ranks", [*rows, {"preset": args.preset, "rounds": args.rounds}], packages, args.out)


if __name__ == "__main__":
    main()
