"""Say before anything is rented what a run takes: memory of each engine, time, cost, checkpoints, the best layout."""

from __future__ import annotations

import argparse
import json
import sys

from llmtrain.arguments import VerbParser, finite_float, positive_int
from llmtrain.errors import run_main


def _above_zero(text: str) -> float:
    value = finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _count(text: str) -> int:
    """Argparse type: a number of tokens, also as 2.5e9."""
    return positive_int(text) if text.isdecimal() else positive_int(f"{_above_zero(text):.0f}")


def parser() -> VerbParser:
    """The parser of `llmtrain plan`."""
    example = "llmtrain plan --config configs/7b.yaml --gpus 64 --gpu h100 --price-per-gpu-hour 2.5"
    made = VerbParser("plan", __doc__.splitlines()[0], example)
    add = made.add_argument
    add("--config", required=True, metavar="FILE", help="the run's YAML file")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="such as training.micro_batch_size=4")
    add("--gpus", type=positive_int, default=1, metavar="N", help="in all machines together (default: %(default)s)")
    add("--gpu", default="h100", metavar="NAME", help="the kind: a short name or the driver's (default: %(default)s)")
    add("--gpus-per-node", type=positive_int, default=8, metavar="N", help="in a machine (default: %(default)s)")
    add("--engine", metavar="NAME", help="plan this launch file's (default: the fastest that fits)")
    add("--tokens", type=_count, metavar="N", help="train on so many (default: what the config says)")
    add("--price-per-gpu-hour", type=_above_zero, metavar="X", help="in any currency; without it no cost is given")
    add("--disk-gbps", type=_above_zero, default=1.0, metavar="X",
        help="GB/s at which all ranks together write checkpoints (default: %(default)s)")  # fmt: skip
    add("--network-gbps", type=_above_zero, metavar="X",
        help="Gb/s between machines for each GPU (default: what is usual with the kind)")  # fmt: skip
    add("--search", action="store_true", help="the fastest layout that fits, on each number of GPUs up to --gpus")
    add("--json", action="store_true", help="print all of it as JSON")
    return made


def main(argv: list[str]) -> None:
    """`llmtrain plan`."""
    args = parser().read(argv)
    from llmtrain.config import load_config
    from llmtrain.planning.facts import Asked, plan
    from llmtrain.planning.hardware import find_gpu

    asked = Asked(
        gpu=find_gpu(args.gpu),
        gpus=args.gpus,
        per_machine=args.gpus_per_node,
        engine=args.engine,
        tokens=args.tokens,
        price_per_gpu_hour=args.price_per_gpu_hour,
        disk=args.disk_gbps * 1e9,
        network=None if args.network_gbps is None else args.network_gbps / 8 * 1e9,
        search=args.search,
    )
    facts = plan(load_config(args.config, args.overrides), asked)
    if args.json:
        print(json.dumps(facts, allow_nan=False))
        return
    from llmtrain.observe.plan_report import show

    show(facts)


if __name__ == "__main__":
    sys.exit(run_main(main))
