"""Activation checkpointing: what it keeps of a step's memory, and what it costs in time.

    python -m benchmarks.recompute [--preset 10m] [--rounds 5]

Memory of 124m (length 1024, micro-batch 8, bf16), counted at every operator of a step with tensors that have shapes and
no memory, so on any machine; time of real steps of a smaller model, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate, print_table, spread, write_result
from benchmarks.held import peak_bytes, step_config, stepper
from llmtrain.engine.device import pick_device
from llmtrain.errors import run_main

KINDS = ("none", "selective", "full")
MEMORY_OF = {"model": {"preset": "124m", "vocab_size": 50_304}, "seq_len": 1024, "micro_batch": 8, "precision": "bf16"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="10m", help="whose steps take the time")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="turns that count, after one that does not")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/recompute.json")
    args = parser.parse_args(argv)
    model = {"preset": args.preset, "vocab_size": 8192}
    configs = {
        kind: step_config(model, args.seq_len, args.micro_batch, activation_checkpointing=kind) for kind in KINDS
    }
    measured = alternate({kind: timed(stepper(config)) for kind, config in configs.items()}, args.rounds)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        # A round's steps came one after the other, so they are compared with each other.
        longer = [100 * (own / plain - 1) for own, plain in zip(measured[kind], measured["none"], strict=True)]
        held = peak_bytes(step_config(**MEMORY_OF, activation_checkpointing=kind))
        rows.append(
            {
                "activation_checkpointing": kind, "peak GB": held / 1e9,
                **{f"ms {name}": value for name, value in spread(measured[kind]).items()},
                **{f"longer by, % {name}": value for name, value in spread(longer).items()},
            }
        )  # fmt: skip
    print_table([{**row, "peak GB": f"{row['peak GB']:.2f}"} for row in rows])
    facts = {
        "memory of": MEMORY_OF, "time of": {"preset": args.preset, "vocab_size": 8192, "seq_len": args.seq_len,
        "micro_batch": args.micro_batch, "precision": "fp32", "threads": torch.get_num_threads()},
        "device": str(pick_device()),
    }  # fmt: skip
    write_result("recompute", [*rows, facts], ["llmtrain", "torch"], args.out)


def timed(step: Callable[[], None], steps: int = 1) -> Callable[[], float]:
    """Milliseconds of a step, the median of some."""

    def measure() -> float:
        return 1000 * statistics.median(once() for _ in range(steps))

    def once() -> float:
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return measure


if __name__ == "__main__":
    sys.exit(run_main(main))
