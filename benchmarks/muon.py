"""A step of Muon: matrices of a shape together, in float32 and in bf16, one by one, and torch's own, in turns.

    python -m benchmarks.muon [--config configs/char.yaml] [--rounds 7]

The optimizers step the matrices of the blocks of that config's model, with random gradients; nothing else is computed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import ROOT, alternate, print_table, spread, write_result
from llmtrain.config import load_config
from llmtrain.engine.device import pick_device
from llmtrain.model.transformer import Transformer
from llmtrain.optim import muon
from llmtrain.optim.optimizers import muon_groups
from llmtrain.resolve import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/char.yaml")
    parser.add_argument("--rounds", type=int, default=7, help="turns that count, after one that does not")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/muon.json")
    args = parser.parse_args()
    config = resolve(load_config(args.config), vocab_size=65, world_size=1, bf16_native=False, compile_auto=False)
    device = pick_device()
    with device:
        model = Transformer(config.model, config.data.seq_len)
    model.init_weights()
    group, _ = muon_groups(model, config.optimizer)
    for matrix in group["params"]:
        matrix.grad = torch.randn_like(matrix)
    ours, in_bf16 = (muon.Muon(**group, product_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    theirs = torch.optim.Muon(**group, adjust_lr_fn="match_rms_adamw")

    def one_by_one() -> None:
        limit, muon.BATCH_NUMEL = muon.BATCH_NUMEL, 1
        ours.step()
        muon.BATCH_NUMEL = limit

    contenders = {
        "llmtrain": ours.step,
        "llmtrain, products in bf16": in_bf16.step,
        "llmtrain, one by one": one_by_one,
        "torch.optim.Muon": theirs.step,
    }
    measured = alternate({name: timed(step, device) for name, step in contenders.items()}, args.rounds)
    rows = [{"optimizer": name, **spread(values)} for name, values in measured.items()]
    print_table([{**row, "unit": "ms/step"} for row in rows])
    shapes = sorted({tuple(sorted(matrix.shape)) for matrix in group["params"]})
    facts = {"unit": "ms/step", "matrices": len(group["params"]), "shapes, laid wide": shapes, "device": str(device)}
    write_result("muon", [*rows, facts], ["llmtrain", "torch"], args.out)


def timed(step: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Milliseconds of a step, the device's work included."""

    def measure() -> float:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    return measure


if __name__ == "__main__":
    main()
