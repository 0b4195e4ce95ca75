"""Saving and loading a training state: llmtrain against accelerate, DeepSpeed and DCP, in turns.

    python -m benchmarks.checkpoint [--preset 350m] [--rounds 2] [--folder DIR]

One process, one model with its AdamW state (float32, random), and every contender saves and loads that same state.
A turn is a save, a flush to disk, and a load with the files out of the page cache of this machine (a virtual disk may
have another cache behind it); then the folder is deleted.

- `save s`: until the call returns, as shipped. `durable s`: until fsync on every file has returned too. Of the peers
  only DCP flushes by itself; llmtrain always does, and it alone hashes what it writes and checks that when it loads.
- `load s`: until the state is back in the model and an optimizer that has none yet; llmtrain's parts stand beside it.
- `stall s`: how long an asynchronous save keeps the loop. A turn makes two; the one before stands apart, for it finds
  its memory as the others left it. The very first has memory that was got before, as a run does behind its first steps.
  (`save s` of that row is of both.)
- `CPU save s`, `CPU load s`: processor seconds of this process, which hardly move when others use the machine.
- `extra`: highest anonymous memory of the process during the turn beyond what it had before, as a share of the state.

Every load is checked: the weights are zero and the moments gone before it, and after it all is as it was saved.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.common import alternate, print_table, write_result
from benchmarks.scaling import busy_seconds
from benchmarks.synthetic import write_random_data
from llmtrain.assemble import Assembly, assemble
from llmtrain.checkpoint.folders import step_folder
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.config import CheckpointSection, make_config
from llmtrain.data.staging import sync_path
from llmtrain.engine import make_engine
from llmtrain.optim.optimizers import make_state

OURS, OURS_ASYNC = "llmtrain", "llmtrain, async"
Action = Callable[[Path], dict[str, float] | None]


class Bench:
    """The state that all contenders save, and what a turn measures."""

    def __init__(self, parts: Assembly, folder: Path):
        self.parts, self.engine, self.folder = parts, parts.engine, folder
        make_state(self.engine._optimizer)
        torch.manual_seed(1)
        for _, tensor in self._state():
            tensor.normal_() if tensor.dim() else tensor.fill_(7.0)
        self.bytes = sum(tensor.nbytes for _, tensor in self._state())
        self.sums = self._sums()
        self.turns: dict[str, list[dict[str, float]]] = {}

    def _state(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensor.detach()) for name, tensor in self.engine._state_tensors()]

    def _sums(self) -> dict[str, float]:
        return {name: float(tensor.sum(dtype=torch.float64)) for name, tensor in self._state()}

    def turn(self, name: str, save: Action, load: Action | None) -> float:
        """One save and one load; what was written is deleted."""
        target = self.folder / "turn"
        busy, cpu, began = busy_seconds(), time.process_time(), time.perf_counter()
        try:
            with PeakMemory() as memory:
                measured = timed(save, target, "save s")
                began_flush = time.perf_counter()
                for path in files(target):
                    sync_path(path)
                measured["durable s"] = measured["save s"] + time.perf_counter() - began_flush
            measured["extra"] = memory.extra / self.bytes
            if load:
                measured |= self._load(load, target)
        finally:
            shutil.rmtree(target, ignore_errors=True)
        seconds = time.perf_counter() - began
        used = busy_seconds() - busy - (time.process_time() - cpu)
        measured["others"] = used / (seconds * len(os.sched_getaffinity(0)))
        print(f"  {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in measured.items()), flush=True)
        self.turns.setdefault(name, []).append(measured)
        return measured["durable s"]

    def _load(self, load: Action, target: Path) -> dict[str, float]:
        before = anonymous_bytes()
        for _, tensor in self._state():
            tensor.zero_()
        self.engine._optimizer.state.clear()  # as in a process that begins
        for path in files(target):
            drop_from_cache(path)
        with PeakMemory(before) as memory:
            measured = timed(load, target, "load s")
        if self._sums() != self.sums:
            raise RuntimeError("what was loaded is not what was saved")
        return {**measured, "extra, load": memory.extra / self.bytes}


def timed(action: Action, folder: Path, name: str) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
    own = action(folder)
    return {name: time.perf_counter() - began, f"CPU {name}": time.process_time() - cpu, **(own or {})}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def drop_from_cache(path: Path) -> None:
    """Take a flushed file out of the page cache: this one only, for the machine is shared."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


class PeakMemory:
    """Bytes of anonymous memory beyond those before, looked at every 10 ms. Mapped files are not in it."""

    def __init__(self, before: int | None = None):
        self._before = anonymous_bytes() if before is None else before

    def __enter__(self) -> PeakMemory:
        self._peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.extra = max(0, self._peak - self._before)

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, anonymous_bytes())


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def llmtrain_contenders(bench: Bench) -> dict[str, tuple[Action, Action | None]]:
    """The store as a run uses it, with and without `async_save`."""
    parts, steps = bench.parts, iter(range(1, 10**6))

    def saver(asynchronous: bool) -> Action:
        section = CheckpointSection(async_save=asynchronous)
        runs = bench.folder / f"run-{asynchronous}"
        store = CheckpointStore(runs, section, parts.config.to_yaml(), parts.data)
        store.expect_saves(bench.engine)
        if getting := store._snapshot._getting:
            getting.join()

        def save_one(step: int) -> float:
            began = time.perf_counter()
            store.save(bench.engine, {"step": step}, ())
            stall = time.perf_counter() - began
            if failure := store.settle(bench.engine):
                raise RuntimeError(failure)
            return stall

        def save(folder: Path) -> dict[str, float]:
            stalls = {}
            if asynchronous:
                stalls["stall after others s"] = save_one(next(steps))
            step = next(steps)
            stalls["stall s"] = save_one(step)
            step_folder(runs, step).rename(folder)
            shutil.rmtree(step_folder(runs, step - 1), ignore_errors=True)
            return stalls if asynchronous else {}

        return save

    def load(folder: Path) -> dict[str, float]:
        began = time.perf_counter()
        reader = CheckpointReader(folder)
        if problems := reader.check_records():
            raise RuntimeError(problems[0])
        wanted = bench.engine.to_fill()
        opened = time.perf_counter()
        if problems := reader.load(wanted, [file.path for file in reader.tensor_files()]):
            raise RuntimeError(problems[0])
        bench.engine.publish()
        return {"open s": opened - began, "read s": time.perf_counter() - opened}

    return {OURS: (saver(False), load), OURS_ASYNC: (saver(True), None)}


def peers(bench: Bench) -> dict[str, tuple[Action, Action | None]]:
    """Each as its documentation shows, over the very same model and optimizer."""
    import deepspeed

    model, optimizer, accelerator = bench.engine._bare, bench.engine._optimizer, bench.engine._accelerator
    accelerator.prepare_optimizer(optimizer)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for a minute
    deepspeed.utils.logger.setLevel("WARNING")
    os.environ["LOCAL_RANK"] = "0"  # asked for by DeepSpeed
    group = f"file://{bench.folder}/group"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=group, rank=0, world_size=1)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
    zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)

    return {
        "accelerate": (
            lambda folder: accelerator.save_state(str(folder)) and None,
            lambda folder: accelerator.load_state(str(folder)),
        ),
        "DeepSpeed": (
            lambda folder: zero.save_checkpoint(str(folder), tag="t") and None,
            lambda folder: zero.load_checkpoint(str(folder), tag="t") and None,
        ),
        "DCP": dcp_contender(model, optimizer),
    }


def dcp_contender(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Action, Action]:
    """Torch's own, which cuts equal copies over the processes."""

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    def load(folder: Path) -> None:
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])

    return lambda folder: dcp.save(state(), checkpoint_id=folder) and None, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="350m")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each that count, after one that does not")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/checkpoint.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        data = write_random_data(folder / "data", tokens=100_000, vocab_size=50_304)
        config = make_config(
            {
                "run": {"dir": f"{folder}/run"},
                "data": {"path": str(data), "seq_len": 128},
                "model": {"preset": args.preset},
                "training": {"max_steps": 1, "precision": "fp32", "compile": False, "eval_every": None},
            }
        )
        bench = Bench(assemble(config, make_engine(config.health.timeout_s)), folder)
        contenders = {**llmtrain_contenders(bench), **peers(bench)}
        turns = {who: lambda who=who, both=both: bench.turn(who, *both) for who, both in contenders.items()}
        alternate(turns, args.rounds)  # type: ignore[arg-type]
        disk = shutil.disk_usage(folder)
    report(bench, args, disk.free)


def report(bench: Bench, args: argparse.Namespace, free: int) -> None:
    """Medians, what they are of the fastest peer's, and the file of the result."""
    rows = [table_row(name, turns) for name, turns in bench.turns.items()]
    print_table(rows)
    of = {row["contender"]: row for row in rows}
    others = [row for name, row in of.items() if name not in (OURS, OURS_ASYNC)]
    fastest = {key: min(row[key] for row in others) for key in ("save s", "durable s", "load s")}
    fastest_sync = min(fastest["durable s"], of[OURS]["durable s"])
    ratios = {
        "save / fastest peer, durable": of[OURS]["durable s"] / fastest["durable s"],
        "save / fastest peer, as shipped": of[OURS]["save s"] / fastest["save s"],
        "load / fastest peer": of[OURS]["load s"] / fastest["load s"],
        "stall / fastest durable save": of[OURS_ASYNC]["stall s"] / fastest_sync,
        "first stall / fastest durable save": bench.turns[OURS_ASYNC][0]["stall after others s"] / fastest_sync,
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    facts = {
        "ratios": ratios,
        "state GB": bench.bytes / 1e9,
        "turns, the first not counted": bench.turns,
        "arguments": {key: value and str(value) for key, value in vars(args).items()},
        "disk": f"the one under the temporary folder, {free / 1e9:.0f} GB free; loads with cold page cache (fadvise)",
        "load average": os.getloadavg(),
    }
    packages = ["llmtrain", "torch", "accelerate", "deepspeed", "safetensors"]
    write_result("checkpoint", [*rows, facts], packages, args.out)


def table_row(name: str, turns: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the turns that count; memory as its maximum over all turns."""

    def median(key: str) -> float | None:
        return statistics.median(turn[key] for turn in turns[1:]) if key in turns[0] else None

    timed_keys = [
        "save s", "durable s", "stall s", "stall after others s", "load s", "open s", "read s", "CPU save s",
        "CPU load s",
    ]  # fmt: skip
    row: dict[str, Any] = {"contender": name, **{key: median(key) for key in timed_keys}}
    for key in ("extra", "extra, load"):
        row[f"{key} %"] = 100 * max(turn[key] for turn in turns) if key in turns[0] else None
    return {**row, "others %": 100 * statistics.median(turn["others"] for turn in turns[1:])}


if __name__ == "__main__":
    main()
