"""A step of two processes against one at twice the batch, and against a bare torch DDP loop, in turns.

    python -m benchmarks.scaling [--steps 2] [--rounds 12] [--preset 10m] [--options]

All launches are started once and stay; a turn is a few optimizer steps of one of them while the others sleep, so what
else the machine does falls on all alike. Model, optimizer, batches per process and gloo are the same for all; float32,
eager, one thread for each process. llmtrain runs its real loop with its records. The bare DDP loop runs twice: how far
it is from itself is the noise. All of DDP's contenders live in the same two processes.

Two measures: seconds of a step (the slower rank's), and processor seconds of a step (both ranks together). The second
hardly moves when others use the machine, and shows overhead that costs work; waiting shows only in the first.
`others` is the share of the machine that other programs used during the turns.

`--options` measures instead what DDP's own options change in the bare loop.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import ROOT, alternate, print_table, spread, write_result
from benchmarks.synthetic import write_random_data
from llmtrain.errors import run_main

SEQ_LEN, ROWS, VOCABULARY = 256, 2, 8192
BARE, BARE_AGAIN = "2 × bare DDP", "2 × bare DDP again"
OURS = "2 × llmtrain, "
OPTIONS: dict[str, dict[str, Any]] = {
    BARE: {},
    "broadcast_buffers=False": {"broadcast_buffers": False},
    "gradient_as_bucket_view=True": {"gradient_as_bucket_view": True},
    "static_graph=True": {"static_graph": True},
    "the first two": {"broadcast_buffers": False, "gradient_as_bucket_view": True},
    BARE_AGAIN: {},
}


@dataclass(frozen=True)
class Measure:
    """One turn, of one step on average."""

    seconds: float
    cpu_seconds: float
    others: float  # share of the machine's processors that was not ours


class Launch:
    """Processes that were started once and take turns when told."""

    def __init__(self, name: str, contenders: list[str], config: dict[str, Any], steps: int, folder: Path):
        processes = 1 if name == "single" else 2
        address, key = str(folder / f"{name}.socket"), secrets.token_bytes(16)
        listener = Listener(address, "AF_UNIX", authkey=key)
        worker = {"config": config, "contenders": contenders, "steps": steps, "address": address, "key": key.hex()}
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"launch/{name}.yaml"),
            "--num_processes", str(processes), "--main_process_port", "0",
            "-m", "benchmarks.scaling", "--worker", json.dumps(worker),
        ]  # fmt: skip
        self.steps = steps
        self._log = (folder / f"{name}.log").open("w+")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self._log, stderr=self._log)
        self._ranks: list[Connection] = []
        listener._listener._socket.settimeout(180)  # type: ignore[attr-defined]  # no public way to give up waiting
        for _ in range(processes):
            try:
                self._ranks.append(listener.accept())
            except TimeoutError as error:
                raise RuntimeError(f"{name} does not start: {self._tail()}") from error

    def turn(self, contender: str) -> Measure:
        """Let a contender take its steps."""
        busy = busy_seconds()
        for rank in self._ranks:
            rank.send(contender)
        try:
            measures = [rank.recv() for rank in self._ranks]
        except EOFError as error:
            raise RuntimeError(f"{contender} ended: {self._tail()}") from error
        seconds, cpu = max(wall for wall, _ in measures), sum(cpu for _, cpu in measures)
        others = (busy_seconds() - busy - cpu) / (seconds * len(os.sched_getaffinity(0)))
        return Measure(seconds / self.steps, cpu / self.steps, others)

    def close(self) -> None:
        for rank in self._ranks:
            rank.send(None)
        self._process.wait(timeout=120)

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-3000:]


def busy_seconds() -> float:
    """Processor seconds that this machine has spent on anything since its start, over all processors."""
    numbers = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, soft_irq, *_ = numbers
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(limit_s: float) -> None:
    """Wait until others use less than a tenth of the machine for a second, but no longer than the limit."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        busy, began = busy_seconds(), time.monotonic()
        time.sleep(1)
        if busy_seconds() - busy < 0.1 * len(os.sched_getaffinity(0)) * (time.monotonic() - began):
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each turn")
    parser.add_argument("--rounds", type=int, default=12, help="turns that count, after one that does not")
    parser.add_argument("--preset", default="10m")
    parser.add_argument("--options", action="store_true", help="what DDP's own options change")
    parser.add_argument("--wait", type=float, default=20, help="seconds to wait for a quiet moment before each turn")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sys.exit(run_main(lambda _: work(**args.worker), []))
    if args.options:
        plan = {"cpu-ddp": list(OPTIONS)}
    else:
        plan = {"single": ["1 × llmtrain, twice the batch"], "cpu-ddp": [BARE, OURS + "DDP", BARE_AGAIN]}
        if importlib.util.find_spec("deepspeed"):
            plan |= {f"cpu-zero{stage}": [f"{OURS}ZeRO-{stage}"] for stage in (1, 2, 3)}
    measures: dict[str, list[Measure]] = {name: [] for names in plan.values() for name in names}
    with tempfile.TemporaryDirectory() as name, launches(plan, args, Path(name)) as contenders:

        def turn(contender: str) -> float:
            wait_for_quiet(args.wait)
            measures[contender].append(contenders[contender].turn(contender))
            return 0.0

        alternate({name: lambda name=name: turn(name) for name in contenders}, args.rounds)  # type: ignore[misc]
    rows = [table_row(name, taken[1:], measures[BARE][1:]) for name, taken in measures.items()]  # the first warms up
    print_table(rows)
    content = [*rows, {"arguments": vars(args), "load average": os.getloadavg()}]
    name = "ddp-options" if args.options else "scaling"
    write_result(name, content, ["llmtrain", "torch", "accelerate", "deepspeed"])


def table_row(name: str, taken: list[Measure], bare: list[Measure]) -> dict[str, Any]:
    """Medians, and the ratios to the bare DDP loop round by round."""
    wall = spread([m.seconds / b.seconds for m, b in zip(taken, bare, strict=True)])
    cpu = spread([m.cpu_seconds / b.cpu_seconds for m, b in zip(taken, bare, strict=True)])
    return {
        "loop": name,
        "ms/step": 1000 * statistics.median(m.seconds for m in taken),
        "of bare DDP (min–max)": "{median:.3f} ({min:.2f}–{max:.2f})".format(**wall),
        "CPU ms/step": 1000 * statistics.median(m.cpu_seconds for m in taken),
        "of bare DDP (min–max) ": "{median:.3f} ({min:.2f}–{max:.2f})".format(**cpu),
        "others %": 100 * statistics.median(m.others for m in taken),
    }


@contextmanager
def launches(plan: dict[str, list[str]], args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Launch]]:
    """Start everything; yields by contender the launch it lives in."""
    data = write_random_data(folder / "data", tokens=2_000_000, vocab_size=VOCABULARY)
    started: dict[str, Launch] = {}
    try:
        for name, contenders in plan.items():
            config = {
                "run": {"dir": str(folder / name)},
                "data": {"path": str(data), "seq_len": SEQ_LEN},
                "model": {"preset": args.preset},
                "training": {
                    "micro_batch_size": 2 * ROWS if name == "single" else ROWS, "global_batch_size": 2 * ROWS,
                    "max_steps": 10**6, "precision": "fp32", "compile": False, "eval_every": None,
                },
                "checkpoint": {"save_every": None},
                "logging": {"plots": False},
            }  # fmt: skip
            launch = Launch(name, contenders, config, args.steps, folder)
            started |= dict.fromkeys(contenders, launch)
        yield started
    finally:
        for launch in dict.fromkeys(started.values()):
            launch.close()


def work(config: dict[str, Any], contenders: list[str], steps: int, address: str, key: str) -> None:
    """One process of a launch: build its contenders, then take turns until told to end."""
    from benchmarks.loop import bare_loop, the_loop
    from llmtrain.assemble import assemble
    from llmtrain.config import make_config
    from llmtrain.engine import make_engine

    engine = make_engine(600)  # ranks wait for each other only within a turn
    parts = assemble(make_config(config), engine)
    turns = {}
    for name in contenders:
        if name in OPTIONS:
            turns[name] = bare_loop(parts, steps, partial(DistributedDataParallel, **OPTIONS[name]))
        else:
            turns[name] = the_loop(parts, steps)
    with Client(address, "AF_UNIX", authkey=bytes.fromhex(key)) as orchestrator:
        while (name := orchestrator.recv()) is not None:
            engine.barrier()
            began, cpu_began = time.perf_counter(), time.process_time()
            turns[name]()
            orchestrator.send((time.perf_counter() - began, time.process_time() - cpu_began))
    engine.close()


if __name__ == "__main__":
    main()
