"""`make bench`: the benchmarks that need nothing but this machine, one after the other."""

from __future__ import annotations

import subprocess
import sys

FITTING = ["startup", "batches", "prepare", "loop"]


def main() -> None:
    for name in FITTING:
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
