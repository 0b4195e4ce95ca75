"""How far bf16 and torch.compile take the loss from that of float32 and eager: the same run in each, record by record.

    python -m benchmarks.rounding [--data data/stdlib] [--steps 200] [--cpu] [section.key=value …]

Each run is `llmtrain train` with the model and length of configs/10m.yaml, AdamW and eight sequences a step, on real
text: the same first values, the same batches. `mean` and `largest` are the differences of the training loss, in nats,
over all records (each is the mean of `--every` steps); `val_loss` is that at the end. Two rows say what a difference
means: the same run again, and one from another seed, which has other first values and other batches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, print_table, train_records, write_result
from llmtrain.errors import UserError, run_main

REFERENCE = "float32"
WAYS = {
    REFERENCE: ["training.precision=fp32", "training.compile=false"],
    "float32 again": ["training.precision=fp32", "training.compile=false"],
    "float32, compiled": ["training.precision=fp32", "training.compile=true"],
    "bf16": ["training.precision=bf16", "training.compile=false"],
    "bf16, compiled": ["training.precision=bf16", "training.compile=true"],
    "float32, another seed": ["training.precision=fp32", "training.compile=false", "run.seed=1"],
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "stdlib", help="prepared")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=5, help="steps of a record")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS), help=f"beside {REFERENCE}")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/rounding.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all of them")
    args = parser.parse_args(argv)
    settings = [
        f"data.path={args.data.resolve()}", f"training.max_steps={args.steps}", f"logging.every={args.every}",
        f"training.eval_every={args.steps}", "training.micro_batch_size=8", "training.global_batch_size=8",
        "optimizer.name=adamw", "optimizer.lr=1e-3", f"schedule.warmup_steps={args.steps // 10}",
        "checkpoint.save_every=null", "logging.plots=false", *args.overrides,
    ]  # fmt: skip
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, way in enumerate(dict.fromkeys([REFERENCE, *args.ways])):
            run = Path(folder) / str(number)
            command = ["--config", str(ROOT / "configs" / "10m.yaml"), f"run.dir={run}", *settings, *WAYS[way]]
            runs[way], said = train_records(command, run, on_cpu=args.cpu, limit_s=None)
            if not runs[way] or runs[way][-1]["step"] < args.steps:
                raise UserError(f"{way}: did not run to the end: {said}")
            print(way, f"{runs[way][-1]['train_loss']:.4f}", flush=True)
    rows = [row(way, records, runs[REFERENCE]) for way, records in runs.items()]
    print_table([{**line, **{key: f"{line[key]:.1e}" for key in ("mean", "largest")}} for line in rows])
    about = {"steps": args.steps, "every": args.every, "overrides": args.overrides}
    curves = {way: [round(record["train_loss"], 6) for record in records] for way, records in runs.items()}
    write_result("rounding", [*rows, {"arguments": about, "train_loss": curves}], ["llmtrain", "torch"], args.out)


def row(way: str, records: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far a run's losses are from those of another with the same records."""
    pairs = zip(records, reference, strict=True)
    differences = list(starmap(lambda own, other: abs(own["train_loss"] - other["train_loss"]), pairs))
    return {
        "way": way,
        "mean": statistics.fmean(differences),
        "largest": max(differences),
        "last train_loss": f"{records[-1]['train_loss']:.4f}",
        "val_loss": f"{records[-1]['val_loss']:.4f}",
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
