"""`make bench`: the benchmarks that need nothing but this machine, one after the other."""

from __future__ import annotations

import subprocess
import sys

import torch

FITTING = ["startup", "batches", "prepare", "loop", "muon", "loss", "traffic", "scaling", "checkpoint"]


def main() -> None:
    for name in [*FITTING, *(["gpu_smoke"] if torch.cuda.is_available() else [])]:
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
