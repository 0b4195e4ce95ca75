"""Every engine on the one GPU that is there: the same losses, and what each costs in memory and speed.

    python -m benchmarks.gpu_smoke [--cpu] [--engines single zero3] [--variants fp32 bf16] [--minutes 7.5]

Each row is a launch of its own, `accelerate launch --num_processes 1` with a file of launch/: the engine trains the
same model from the same first values over the same batches, two micro-batches a step. Losses are compared with those of
`single` in the same variant: the largest relative difference over all steps. `single` runs twice; how far it is from
itself is what the GPU's own order of additions does. fp32 is without TF32. ZeRO at one process shards nothing, so its
numbers here are those of its machinery, not of what it saves. `waits/step`: how often the host waits for the GPU.

Exit code 1 if losses differ by more than rounding explains, or a row fails. Rows that the minutes do not suffice for,
and ZeRO where DeepSpeed is missing, say so. Without a GPU, or with --cpu, all is small and nothing is compiled.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, print_table, write_result
from llmtrain.errors import run_main

ENGINES = ["single", "zero1", "zero2", "zero3", "zero3-offload", "single again"]
# By variant: precision, compiled, how far losses may be from those of `single`, relative.
VARIANTS: dict[str, tuple[str, bool, float]] = {
    "bf16": ("bf16", False, 5e-3),
    "fp32": ("fp32", False, 1e-5),
    "bf16 compiled": ("bf16", True, 5e-3),
    "fp32 compiled": ("fp32", True, 1e-4),
}
DISTRIBUTIONS = ["llmtrain", "torch", "accelerate", "deepspeed", "triton"]
ROW_LIMIT_S = 150
LARGE = {"preset": "124m", "vocab_size": 50304, "seq_len": 1024, "micro_batch": 16, "warm_steps": 5, "steps": 15}
SMALL = {"preset": "1m", "vocab_size": 512, "seq_len": 64, "micro_batch": 2, "warm_steps": 2, "steps": 4}
COLUMNS = [
    "engine", "variant", "last loss", "difference", "peak GB", "tokens/s", "MFU %", "ms/step", "waits/step",
    "first step s",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="small, on the CPU; so too where there is no GPU")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--preset", help="instead of 124m")
    parser.add_argument("--micro-batch", type=int, help="instead of 16; 4 suits a GPU of 24 GB")
    parser.add_argument("--minutes", type=float, default=7.5, help="after these no further row is started")
    parser.add_argument("--out", default="gpu_smoke", help="name of the result; an absolute path writes elsewhere")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sys.exit(run_main(lambda _: work(**args.worker), []))
    on_cpu = args.cpu or not torch.cuda.is_available()
    given = {"preset": args.preset, "micro_batch": args.micro_batch}
    sizes = (SMALL if on_cpu else LARGE) | {key: value for key, value in given.items() if value}
    variants = args.variants or (["bf16", "fp32"] if on_cpu else list(VARIANTS)[:3])
    until = time.monotonic() + 60 * args.minutes
    rows: list[dict[str, Any]] = []
    for variant in variants:
        for engine in args.engines:
            rows.append(row(engine, variant, sizes, on_cpu, until))
            compare(rows[-1], rows)
            show = [{column: rows[-1].get(column, "") for column in COLUMNS}]
            print(rows[-1].get("problem") or json.dumps(show[0]), flush=True)
            # After each row: what is known is on disk, however this ends.
            write_result(
                args.out, [*rows, {"sizes": sizes}], ["llmtrain", "torch", "accelerate", "deepspeed", "triton"]
            )
    print()
    print_table([{column: line.get(column) for column in COLUMNS} for line in rows])
    problems = [line["problem"] for line in rows if "problem" in line]
    print("\n".join(problems))
    return int(any(line.get("failed") for line in rows))


def row(engine: str, variant: str, sizes: dict[str, Any], on_cpu: bool, until: float) -> dict[str, Any]:
    """Launch an engine; return what it measured, or why it did not."""
    about = {"engine": engine, "variant": variant}
    name = engine.removesuffix(" again")
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return about | {"problem": f"{engine}, {variant}: not run: DeepSpeed is not installed"}
    left = until - time.monotonic()
    if left <= 0:
        return about | {"problem": f"{engine}, {variant}: not run: out of time"}
    launch_file = ROOT / "launch" / (f"cpu-{name}.yaml" if on_cpu and name != "single" else f"{name}.yaml")
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if on_cpu else {})
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "row.json", Path(folder) / "log"
        worker = json.dumps({"variant": variant, "sizes": sizes, "out": str(out)})
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_file),
            "--num_processes", "1", "--main_process_port", "0", "-m", "benchmarks.gpu_smoke", "--worker", worker,
        ]  # fmt: skip
        with log.open("wb") as file:
            code = run_within(command, environment, file, min(ROW_LIMIT_S, left + 30))
        if code == 0 and out.is_file():
            return about | json.loads(out.read_text())
        end = last_words(log.read_text(errors="replace"))
    why = f"exit code {code}" if code is not None else "took too long"
    return about | {"problem": f"{engine}, {variant}: {why}: {end}", "failed": True}


def last_words(log: str) -> str:
    """The lines of a log that say what went wrong: ours, or the end of the first traceback; not the launcher's own."""
    if foreseen := re.search(r"^llmtrain: error: .*", log, re.MULTILINE):
        return foreseen[0]
    traceback = log.split("Traceback (most recent call last):")[1:2]
    lines = [line for line in (traceback[0] if traceback else log).splitlines() if line.strip()]
    said = [line for line in lines if not re.match(r"[EWI]\d{4} ", line)]  # torch's launcher begins its lines so
    return "\n".join(said[-6:])


def run_within(command: list[str], environment: dict[str, str], log: Any, limit_s: float) -> int | None:
    """The exit code of a command; None if it took longer than the limit and was ended, with all that it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def compare(line: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Note how far the losses of a row are from those of `single`, and whether that is too far."""
    same = [other for other in rows if other["variant"] == line["variant"] and "losses" in other]
    if "losses" not in line or same[0]["engine"] != "single":
        return
    pairs = zip(line["losses"], same[0]["losses"], strict=True)
    differences = [abs(ours - theirs) / theirs for ours, theirs in pairs]
    difference = math.nan if any(map(math.isnan, differences)) else max(differences)
    allowed = VARIANTS[line["variant"]][2]
    line["difference"] = f"{difference:.1e}"
    if not difference <= allowed:  # so that NaN fails
        line["failed"] = True
        line["problem"] = (
            f"{line['engine']}, {line['variant']}: losses differ from single's by {difference:.1e} relative, more than "
            f"{allowed:g}"
        )


def work(variant: str, sizes: dict[str, Any], out: str) -> None:
    """The launched process: train a few steps, write down what they gave."""
    from llmtrain.config import make_config
    from llmtrain.engine import make_engine
    from llmtrain.model.cost import flops_per_token, model_flops_utilization
    from llmtrain.model.transformer import Transformer
    from llmtrain.observe.meter import peak_memory_gb
    from llmtrain.resolve import resolve

    precision, compiled, _ = VARIANTS[variant]
    rows, seq_len = sizes["micro_batch"], sizes["seq_len"]
    settings = {
        "data": {"path": "made up", "seq_len": seq_len},
        "model": {"preset": sizes["preset"], "vocab_size": sizes["vocab_size"]},
        "optimizer": {"lr": 1e-3},
        "training": {
            "micro_batch_size": rows, "global_batch_size": 2 * rows, "max_steps": 100, "precision": precision,
            "compile": compiled,
        },
    }  # fmt: skip
    config = resolve(
        make_config(settings),
        vocab_size=sizes["vocab_size"],
        world_size=1,
        bf16_native=True,
        compile_auto=False,
    )
    torch.set_float32_matmul_precision("highest")  # no TF32
    engine = make_engine(120)
    torch.manual_seed(0)
    engine.build(lambda: Transformer(config.model, seq_len), config.training, config.optimizer)
    generator = torch.Generator().manual_seed(1)
    # Small ids are frequent: something that a few steps can learn.
    shape = (sizes["warm_steps"] + sizes["steps"], 2, rows, seq_len + 1)
    tokens = (torch.rand(shape, generator=generator) ** 4 * sizes["vocab_size"]).long().to(engine.device)
    losses, norms, times = list[Tensor](), list[Tensor](), [time.perf_counter()]

    def take_steps(tokens: Tensor) -> None:
        for first, second in tokens:
            loss_sum = torch.zeros((), device=engine.device)
            for micro, is_last in ((first, False), (second, True)):
                loss_sum += engine.forward_backward(
                    micro[:, :-1], micro[:, 1:], global_targets=2 * rows * seq_len, sync=is_last
                )
            norms.append(engine.step(1e-3).grad_norm.clone())
            losses.append(loss_sum / (2 * rows * seq_len))

    first, warming, timed = tokens.split([1, sizes["warm_steps"] - 1, sizes["steps"]])
    take_steps(first)
    wait_for_device(engine.device)
    times.append(time.perf_counter())
    with host_waits(engine.device) as waits:  # to count them takes time
        take_steps(warming)
    wait_for_device(engine.device)
    times.append(time.perf_counter())
    take_steps(timed)
    wait_for_device(engine.device)
    times.append(time.perf_counter())
    seconds = (times[-1] - times[-2]) / sizes["steps"]
    tokens_per_s = 2 * rows * seq_len / seconds
    on_gpu = engine.device.type == "cuda"
    device_name = torch.cuda.get_device_name() if on_gpu else "cpu"
    mfu = model_flops_utilization(tokens_per_s * flops_per_token(config.model, seq_len), device_name, 1)
    content = {
        "class": engine.name,
        "device": device_name,
        "losses": torch.stack(losses).tolist(),
        "grad_norms": torch.stack(norms).tolist(),
        "last loss": f"{losses[-1].item():.5f}",
        "peak GB": peak_memory_gb(engine.device),
        "tokens/s": round(tokens_per_s),
        "MFU %": None if mfu is None else 100 * mfu,
        "ms/step": 1000 * seconds,
        "waits/step": len(waits) / len(warming) if on_gpu else None,
        "first step s": times[1] - times[0],
    }
    Path(out).write_text(json.dumps(content))
    engine.close()


@contextmanager
def host_waits(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """What torch tells of each time that the host waits for a GPU: an engine of ours does not in a step, ZeRO does."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="called a synchronizing")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield told
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def wait_for_device(device: torch.device) -> None:
    """The clock may be read when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
