"""`make bench`: the benchmarks that need nothing but this machine, one after the other.

`make bench NANOGPT=DIR PEERS_PYTHON=PATH` has the other trainers measured too, DATA_PEERS_PYTHON=PATH other ways to
deliver data, with MEGATRON=DIR beside it another way to prepare it; see benchmarks/peers.py, data.py and prepare.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

from benchmarks.common import RESULTS

FITTING = [
    "startup",
    "data",
    "prepare",
    "dealing",
    "loop",
    "cpu",
    "muon",
    "documents",
    "loss",
    "recompute",
    "growth",
    "traffic",
    "scaling",
    "checkpoint",
    "checkpoint_ranks",
    "resume",
    "peers",
]

ON_GPU = ["--size", "124m", "--precision", "as-shipped", "--device", "cuda", "--out", str(RESULTS / "peers-124m.json")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--peers-python", help="the python of an environment with litgpt and transformers")
    parser.add_argument("--data-peers-python", help="the python of an environment with megatron-core, litdata, …")
    parser.add_argument("--megatron", help="a checkout of Megatron-LM, for the python of --data-peers-python")
    args = parser.parse_args()
    if args.megatron and not args.data_peers_python:
        parser.error("--megatron: give --data-peers-python too")
    given = {"--nanogpt": args.nanogpt, "--peers-python": args.peers_python}
    arguments = {"peers": [text for option, value in given.items() if value for text in (option, value)]}
    if args.data_peers_python:
        arguments["data"] = ["--peers-python", args.data_peers_python]
    if args.megatron:
        arguments["prepare"] = ["--megatron", args.megatron, "--peers-python", args.data_peers_python]
    turns = [(name, arguments.get(name, [])) for name in FITTING]
    if torch.cuda.is_available():
        turns += [(name, []) for name in ("gpu_smoke", "gpu_speed", "attention")]
        turns.append(("peers", [*arguments["peers"], *ON_GPU]))
    for name, given_to_it in turns:
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *given_to_it], check=True)


if __name__ == "__main__":
    main()
