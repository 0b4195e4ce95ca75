"""What keeping documents apart costs: a step with and without the mask, and packing; on a GPU also whether it is right.

    python -m benchmarks.documents [--preset 124m] [--seq-len 2048] [--rows 8] [--mean 500] [--rounds 5] [--compile]

Windows of random ids hold documents of `--mean` tokens on average. In turns: without a mask, with the reference
(scaled_dot_product_attention under a mask), and on a GPU with flex_attention. There, first, loss and gradients of the
last two are compared in float32, without TF32; exit code 1 if they differ by more than rounding explains.
Packing: lengths are log-normal with that median, and a mean of nearly twice it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import alternate, print_table, spread, write_result
from llmtrain.config import make_config
from llmtrain.data.packing import GROUP, cut, pack
from llmtrain.engine.device import pick_device
from llmtrain.model import transformer
from llmtrain.model.document_mask import flex_suits
from llmtrain.resolve import resolve

END, VOCAB = 0, 8192
ALLOWED = 1e-4  # of the largest gradient of a tensor: float32 sums in another order
Step = Callable[[], float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--preset", default="124m" if on_gpu else "1m")
    parser.add_argument("--seq-len", type=int, default=2048 if on_gpu else 256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--mean", type=int, default=500 if on_gpu else 60, help="tokens of a document")
    parser.add_argument("--documents", type=int, default=GROUP, help="that are packed")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count, after one that does not")
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--compile", action="store_true", help="each block")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/documents.json")
    args = parser.parse_args()
    device = pick_device()
    names = ["no mask", "reference", *(["flex"] if flex_suits(device, 64, 0.0) else [])]
    difference = compare(args, device) if "flex" in names else None
    steps = {name: step(args, device, name) for name in names}
    rows: list[dict[str, Any]] = [
        {"what": name, **spread(times), "unit": "ms/step"} for name, times in alternate(steps, args.rounds).items()
    ]
    rows += [packing(args, seq_len) for seq_len in (args.seq_len, 4 * args.seq_len)]
    print_table(rows)
    print(f"flex against the reference: {difference}")
    facts = {"device": str(device), "flex against the reference": difference, **vars(args), "out": None}
    write_result("documents", [*rows, facts], ["llmtrain", "torch", "triton"], args.out)
    return int(difference is not None and not difference <= ALLOWED)


def build(args: argparse.Namespace, device: torch.device, document_end: int | None) -> transformer.Transformer:
    """The model with its first values, the same each time."""
    config = resolve(
        make_config({"model": {"preset": args.preset}}), vocab_size=VOCAB, world_size=1,
        bf16_native=False, compile_auto=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = transformer.Transformer(config.model, args.seq_len, args.checkpointing, document_end)
    model.init_weights()
    return model


def windows(args: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (args.rows, args.seq_len + 1), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 1 / args.mean] = END
    return ids[:, :-1].to(device), ids[:, 1:].to(device)


def by(name: str) -> None:
    """Choose the way of attention under a mask."""
    transformer.flex_suits = flex_suits if name == "flex" else lambda *_: False


def step(args: argparse.Namespace, device: torch.device, name: str) -> Step:
    """Milliseconds of a forward and backward pass: bf16 on a GPU, else float32."""
    model = build(args, device, None if name == "no mask" else END)
    if args.compile:
        for block in model.blocks:
            block.compile()
    inputs, targets = windows(args, device)
    precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def run() -> float:
        by(name)
        began = time.perf_counter()
        with precision:
            loss = model(inputs, targets)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        model.zero_grad()
        return 1e3 * (time.perf_counter() - began)

    return run


def compare(args: argparse.Namespace, device: torch.device) -> float:
    """How far gradients by flex_attention are from the reference's at most, over the largest of their tensor."""
    inputs, targets = windows(args, device)
    gradients = []
    for name in ("reference", "flex"):
        by(name)
        model = build(args, device, END)
        model(inputs, targets).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in pairs)


def packing(args: argparse.Namespace, seq_len: int) -> dict[str, Any]:
    """Millions of documents a second, and the share of padding."""
    lengths = np.random.default_rng(2).lognormal(np.log(args.mean), 1.1, args.documents).astype(np.int64) + 2
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    rates, padding = [], 0.0
    for _ in range(args.rounds):
        began = time.perf_counter()
        pieces = cut(bounds, np.ones(len(lengths), np.bool_), seq_len)
        window_of = pack(pieces.lengths, ~pieces.open, seq_len)
        rates.append(len(lengths) / (time.perf_counter() - began) / 1e6)
        padding = 1 - int(pieces.lengths.sum()) / (seq_len * (int(window_of.max()) + 1))
    return {"what": f"packing, {seq_len}, {padding:.2%} padding", **spread(rates), "unit": "M documents/s"}


if __name__ == "__main__":
    sys.exit(main())
