"""Bytes that each process sends in an optimizer step, on the wire, against the theory; with what was asked to be sent.

    python -m benchmarks.traffic [--preset 10m] [--only zero3]

Two processes run as on two hosts: each in a network namespace of its own, with one virtual cable between them, whose
counters are read between the phases of a step. Nothing else uses the cable; the idle bytes of a reading are shown.
Needs Linux with `unshare`, `nsenter` (util-linux) and `ip` (iproute2), and user namespaces; no root.

P is the parameters' bytes in float32. Of N processes in a ring each sends 2P(N-1)/N for an all-reduce, and half of that
for a reduce-scatter or an all-gather. Bytes are shown as multiples of P(N-1)/N, so the theory is 2 (DDP), 2 (ZeRO-1
and 2) and 3 (ZeRO-3), whatever N is. `asked` is the same sum over the collectives that were called, if each were done
in the least volume: it differs from the wire where gloo does a collective in another way.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import ROOT, print_table, write_result
from benchmarks.synthetic import write_random_data
from llmtrain.errors import run_main

ADDRESSES = ("10.231.0.1", "10.231.0.2")
CABLE = "cable0"  # its end has this name on both hosts
PORT = 29531  # in namespaces of our own every port is free
WARM_STEPS, STEPS = 2, 3
# ZeRO-3's own limits (10^9 parameters live at once; matrices below 10^5 always whole) leave small models nothing to do.
# Large presets do not tie the head to the embedding either, which would be gathered for each of its uses.
AS_IF_LARGE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
# By default ZeRO-1 and 2 reduce all gradients to all ranks, and each keeps its part.
ONE_REDUCE_A_RANK = {"use_multi_rank_bucket_allreduce": False}


@dataclass(frozen=True)
class Case:
    """One way to train, and the least that it must send per step, in P."""

    launch: str
    theory: str
    accumulation: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"
    zero: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's settings on top of the launch file's
    note: str = ""


CASES = [
    Case("cpu-ddp", "2"),
    Case("cpu-zero1", "2"),
    Case("cpu-zero2", "2"),
    Case("cpu-zero1", "2", zero=ONE_REDUCE_A_RANK, note="a reduction for each owner"),
    Case("cpu-zero2", "2", zero=ONE_REDUCE_A_RANK, note="a reduction for each owner"),
    Case("cpu-zero3", "3", zero=AS_IF_LARGE, note="as if large"),
    Case("cpu-zero3", "2 to 3", note="small: kept whole until its backward"),
    Case("cpu-ddp", "2", 3),
    Case("cpu-zero1", "2", 3),
    Case("cpu-zero2", "3×1 + 1", 3),
    Case("cpu-zero3", "3×3", 3, zero=AS_IF_LARGE, note="as if large"),
    Case("cpu-ddp", "2", precision="bf16"),
    Case("cpu-zero3", "2", precision="bf16", zero=AS_IF_LARGE, note="as if large; blocks' matrices in bf16"),
    Case("cpu-zero1", "2 + 2M", optimizer="muon", note="M: the blocks' matrices"),
    Case("cpu-zero2", "2 + 2M", optimizer="muon", note="M: the blocks' matrices"),
    Case("cpu-zero3", "3 + 2M", optimizer="muon", zero=AS_IF_LARGE, note="as if large; M: the blocks' matrices"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="10m")
    parser.add_argument("--only", default="", help="run and show the cases in whose description this stands")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sys.exit(run_main(lambda _: work(**args.worker), []))
    if "LLMTRAIN_TRAFFIC_HOST" not in os.environ:
        enter_a_namespace()
    rows = []
    with tempfile.TemporaryDirectory() as name, second_host() as prefix:
        folder = Path(name)
        write_random_data(folder / "data", tokens=200_000, vocab_size=8192)
        for case in CASES:
            if args.only in str(case) and (case.launch == "cpu-ddp" or importlib.util.find_spec("deepspeed")):
                rows.append(measure(case, args.preset, folder, prefix))
                print_table([rows[-1]["table"]])
                sys.stdout.flush()
                if not args.only:  # after each, so that what is known is on disk, however this ends
                    write_result("traffic", rows, ["llmtrain", "torch", "accelerate", "deepspeed"])
    print()
    print_table([row["table"] for row in rows])


def enter_a_namespace() -> None:
    """Start this program again as the root of a network of its own; does not return."""
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    trial = ["unshare", "-rn", "true"]
    possible = not missing and subprocess.run(trial, capture_output=True, check=False).returncode == 0
    if not possible:
        reason = f"no {', '.join(missing)} here" if missing else "user namespaces are not allowed here"
        print(f"traffic: skipped: {reason}")
        sys.exit(0)
    os.environ["LLMTRAIN_TRAFFIC_HOST"] = "1"
    os.execvp("unshare", ["unshare", "-rn", sys.executable, "-m", "benchmarks.traffic", *sys.argv[1:]])


@contextmanager
def second_host() -> Iterator[list[str]]:
    """Make a second network beside this one, and a cable between; yields what a command for it begins with."""
    holder = subprocess.Popen(["unshare", "-n", sys.executable, "-c", "print(flush=True); input()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"\n"  # it is in its namespace
        there = ["nsenter", "-t", str(holder.pid), "-n"]
        here: list[str] = []
        link = ["ip", "link"]
        ends = ["type", "veth", "peer", "name", CABLE, "netns", str(holder.pid)]
        subprocess.run([*link, "add", CABLE, *ends], check=True)
        for prefix, address in zip((here, there), ADDRESSES, strict=True):
            subprocess.run([*prefix, "ip", "address", "add", f"{address}/24", "dev", CABLE], check=True)
            for device in ("lo", CABLE):
                subprocess.run([*prefix, *link, "set", device, "up"], check=True)
        yield there
    finally:
        holder.communicate(b"\n")


def measure(case: Case, preset: str, folder: Path, second: list[str]) -> dict[str, Any]:
    """Launch a case on both hosts; return what rank 0 read, and a line for the table."""
    out = folder / "read.json"
    launch_file = folder / "launch.yaml"
    launch_file.write_text(launch_with(case, folder / "zero.json"))
    settings = {
        "run": {"dir": str(folder / "run")},
        "data": {"path": str(folder / "data"), "seq_len": 32},
        "model": {"preset": preset, "tie_embeddings": case.zero is not AS_IF_LARGE},
        "optimizer": {"name": case.optimizer},
        "training": {
            "micro_batch_size": 1, "global_batch_size": 2 * case.accumulation, "max_steps": 100, "eval_every": None,
            "precision": case.precision, "compile": False,
        },
    }  # fmt: skip
    worker = json.dumps({"settings": settings, "out": str(out)})
    processes = []
    for rank, prefix in enumerate(([], second)):
        command = [
            *prefix, sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch_file,
            "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank),
            "--main_process_ip", ADDRESSES[0], "--main_process_port", str(PORT),
            "-m", "benchmarks.traffic", "--worker", worker,
        ]  # fmt: skip
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        log = (folder / f"{rank}.log").open("wb")
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    codes = [process.wait(timeout=300) for process in processes]
    if any(codes):
        logs = "\n".join((folder / f"{rank}.log").read_text() for rank in (0, 1))
        raise RuntimeError(f"{case}: exit codes {codes}\n{logs}")
    return describe(case, json.loads(out.read_text()))


def launch_with(case: Case, zero_file: Path) -> str:
    """The text of the case's launch file, with its DeepSpeed settings and torch's own launcher between hosts."""
    launch = yaml.safe_load((ROOT / "launch" / f"{case.launch}.yaml").read_text())
    zero = launch.get("deepspeed_config")
    if zero is not None:
        if case.zero:
            zero_file.write_text(json.dumps({"zero_optimization": {"stage": zero["zero_stage"], **case.zero}}))
            launch["deepspeed_config"] = zero = {"deepspeed_config_file": str(zero_file)}
        zero["deepspeed_multinode_launcher"] = "standard"
    return yaml.safe_dump(launch)


def describe(case: Case, read: dict[str, Any]) -> dict[str, Any]:
    """Everything as bytes, and the table's line in units of P(N-1)/N."""
    unit = read["parameter_bytes"] / 2
    phases = read["sent"]  # one for each micro-batch, then the optimizer step
    table = {
        "engine": case.launch.removeprefix("cpu-"),
        "micro-batches": case.accumulation,
        "precision": case.precision,
        "optimizer": case.optimizer,
        "theory": case.theory,
        "on the wire": f"{sum(phases) / unit:.3f}",
        "asked": f"{read['asked'] / unit:.3f}",
        "by phase": " + ".join(f"{phase / unit:.2f}" for phase in phases),
        "note": case.note,
    }
    return {"table": table, **asdict(case), **read}


def work(settings: dict[str, Any], out: str) -> None:
    """One of the two processes: take steps, and read the counters between their phases."""
    from llmtrain.assemble import assemble
    from llmtrain.config import make_config
    from llmtrain.data.batches import batches
    from llmtrain.engine import make_engine
    from llmtrain.train import accumulate

    engine = make_engine(60)
    parts = assemble(make_config(settings), engine)
    stream = batches(parts.train, parts.layout, parts.order(), position=0)

    def read_sent() -> float:
        engine.barrier()
        sent = sent_bytes()
        engine.barrier()
        return sent

    marks: list[float] = []
    backward = engine.forward_backward

    def backward_and_read(*args: Any, **kwargs: Any) -> Any:
        loss_sum = backward(*args, **kwargs)
        marks.append(read_sent())
        return loss_sum

    engine.forward_backward = backward_and_read  # type: ignore[method-assign]  # the loop's own accumulation is measured
    asked = AskedBytes()
    readings = []
    idle = -read_sent() + read_sent()
    for step in range(WARM_STEPS + STEPS):
        batch = next(stream)
        marks.append(read_sent())
        with asked if step == WARM_STEPS else nullcontext():
            accumulate(engine, batch, rows=1)
            engine.step(1e-4)
        marks.append(read_sent())
        readings.append([after - before for before, after in itertools.pairwise(marks)])
        marks.clear()
    if engine.rank == 0:
        from llmtrain.model.cost import parameter_count

        parameters = parameter_count(parts.config.model, parts.config.data.seq_len)
        steps = readings[WARM_STEPS:]
        content = {
            "parameter_bytes": 4 * parameters,
            "sent": [sum(phase) / STEPS for phase in zip(*steps, strict=True)],
            "sent_by_step": [sum(step) for step in steps],
            "idle": idle,
            "asked": asked.total(engine.world_size),
            "collectives": {name: [count, asked.bytes[name]] for name, count in asked.calls.items()},
        }
        Path(out).write_text(json.dumps(content))
    engine.close()


class AskedBytes(TorchDispatchMode):
    """Notes the collectives that this process calls, also those that DDP calls from C++."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace == "c10d":
            self.calls[name] += 1
            # Inputs and outputs, in either order; the larger of them is the whole that is gathered or reduced.
            self.bytes[name] += max(
                sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)) for arg in args[:2]
            )
        return func(*args, **(kwargs or {}))

    def total(self, processes: int) -> float:
        """Bytes that a process sends for them at the least, averaged over the processes."""
        whole = sum(count * (2 if name.startswith("allreduce") else 1) for name, count in self.bytes.items())
        return whole * (processes - 1) / processes


def sent_bytes() -> float:
    """Bytes that a host has put on the cable, headers included; the mean of the two."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == CABLE:
            received, sent = (int(numbers.split()[column]) for column in (0, 8))
            return (received + sent) / 2
    raise RuntimeError(f"no {CABLE} in /proc/net/dev")


if __name__ == "__main__":
    main()
