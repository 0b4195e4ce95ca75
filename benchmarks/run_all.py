"""`make bench`: the benchmarks that need nothing but this machine, one after the other.

`make bench NANOGPT=DIR PEERS_PYTHON=PATH` has the other trainers measured too; see benchmarks/peers.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

FITTING = [
    "startup",
    "batches",
    "prepare",
    "loop",
    "muon",
    "documents",
    "loss",
    "recompute",
    "growth",
    "traffic",
    "scaling",
    "checkpoint",
    "resume",
    "peers",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--peers-python", help="the python of an environment with litgpt and transformers")
    args = parser.parse_args()
    given = {"--nanogpt": args.nanogpt, "--peers-python": args.peers_python}
    arguments = {"peers": [text for option, value in given.items() if value for text in (option, value)]}
    for name in [*FITTING, *(["gpu_smoke", "gpu_speed"] if torch.cuda.is_available() else [])]:
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments.get(name, [])], check=True)


if __name__ == "__main__":
    main()
