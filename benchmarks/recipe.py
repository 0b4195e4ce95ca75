"""What learns fastest: the validation loss of one model by optimizer, rate, batch, and anything a config sets.

    python -m benchmarks.recipe --data DIR --tokens 2_000_000 [--model dim=128 layers=4 heads=4] [--seq-len 128]
        [--batch 16 32] [--rates muon=0.01,0.02 adamw=0.002] [--seeds 1] [--variant "" "schedule.name=linear" …]
        [section.key=value …]

Each run is `llmtrain train` as a user types it, of so many tokens whatever the batch, and its loss that of the last
step, over the same validation windows. Losses do not depend on how busy a machine is; `seconds` do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared")
    parser.add_argument("--tokens", type=int, required=True, help="of a run")
    parser.add_argument("--model", nargs="+", default=["dim=128", "layers=4", "heads=4"], metavar="KEY=VALUE")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="sequences of an optimizer step")
    parser.add_argument("--rates", nargs="+", default=["muon=0.01", "adamw=0.003"], metavar="OPTIMIZER=RATE,…")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with one seed after the other")
    parser.add_argument("--variant", nargs="+", default=[""], metavar="OVERRIDES", help="each: section.key=value …")
    parser.add_argument("--out", type=Path, help="default: results/recipe.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all of them")
    args = parser.parse_args(argv)
    given = (one.partition("=") for one in args.rates)
    rates = [(name, float(rate)) for name, _, of_it in given for rate in of_it.split(",")]
    rows: list[dict[str, Any]] = []
    ways = itertools.product(args.batch, rates, args.variant, range(args.seeds))
    for batch, (optimizer, rate), variant, seed in ways:
        steps = args.tokens // (batch * args.seq_len)
        settings = {
            "data.path": args.data.resolve(),
            "data.seq_len": args.seq_len,
            "optimizer.name": optimizer,
            "optimizer.lr": rate,
            "schedule.min_lr": 0.0,
            "schedule.warmup_steps": max(10, steps // 20),
            "training.micro_batch_size": batch,
            "training.global_batch_size": batch,
            "training.max_steps": steps,
            "training.eval_every": steps,
            "training.eval_batches": 640 // batch,
            "run.seed": 1337 + seed,
            "checkpoint.save_every": "null",
            "logging.plots": "false",
        }
        texts = [f"{key}={value}" for key, value in settings.items()]
        model = [f"model.{one}" for one in args.model]
        loss, seconds = trained([*texts, *model, *args.overrides, *variant.split()])
        row = {"optimizer": optimizer, "lr": f"{rate:g}", "batch": batch, "steps": steps, "variant": variant}
        rows.append({**row, "seed": seed, "val_loss": f"{loss:.4f}", "seconds": round(seconds, 1)})
        print(rows[-1], flush=True)
    print_table(rows)
    about = {
        "tokens": args.tokens, "seq_len": args.seq_len, "model": args.model, "overrides": args.overrides,
        "data": json.loads((args.data / "manifest.json").read_text())["tokenizer"],
    }  # fmt: skip
    print(write_result("recipe", [*rows, about], ["llmtrain", "torch"], args.out))


def trained(settings: list[Any]) -> tuple[float, float]:
    """Train in a process of its own; return (validation loss in nats, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text("logging: {console: plain}\n")
        command = [sys.executable, "-m", "llmtrain", "train", "--config", config, f"run.dir={folder}/run", *settings]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        seconds = time.perf_counter() - began
        curves = json.loads((Path(folder) / "run/training_metrics.json").read_text())
    return curves["val_loss"][-1], seconds


if __name__ == "__main__":
    main()
