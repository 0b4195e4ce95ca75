"""Which kernel of scaled_dot_product_attention is the fastest at the shapes that are trained, and which torch takes.

    python -m benchmarks.attention [--sizes 124m 1.3b 7b] [--rounds 20] [--cpu]

Causal attention forward and backward, in turns: as the model calls it, which leaves the choice to torch, and with each
kernel that takes the shape, alone. bf16 on a GPU, float32 on a CPU, where shapes are small. `difference` is that of
output and gradients from those of torch's choice, over the largest of each.

The model leaves the choice to torch, which prefers cuDNN's on a Hopper or a large Blackwell, and flash elsewhere
(docs/LOG.md). `fastest` names the kernel that was it for each size; where that is not torch's and by more than the
spread, `TORCH_CUDNN_SDPA_DEPRIORITIZED=1` in the environment of a run puts cuDNN's last.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import alternate, print_table, spread, write_result
from benchmarks.gpu_speed import LARGE, SMALL
from llmtrain.presets import PRESETS

TORCH = "torch's choice"
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}
CALLS = 5  # of a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(LARGE), default=list(LARGE))
    parser.add_argument("--rounds", type=int, default=20, help="turns that count, after one that does not")
    parser.add_argument("--cpu", action="store_true", help="small, on the CPU; so too where there is no GPU")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/attention.json")
    args = parser.parse_args()
    on_cpu = args.cpu or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        rows += measure(size, device, args.rounds)
    print_table(rows)
    found = fastest(rows)
    for size, way in found.items():
        print(f"{size}: fastest: {way}")
    write_result(
        "attention", [*rows, {"fastest": found, "device": str(device), **vars(args), "out": None}], ["torch"], args.out
    )


def fastest(rows: list[dict[str, Any]]) -> dict[str, str]:
    """By size, the way with the least median, torch's choice where none is faster by more than that one's spread."""
    found = {}
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size]
        best = min(own, key=lambda row: row["ms median"])
        chosen = next(row for row in own if row["way"] == TORCH)
        found[size] = best["way"] if best["ms max"] < chosen["ms min"] else TORCH
    return found


def measure(size: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for each kernel that takes the shape of a size."""
    inputs = make_inputs(size, device)
    reference = attend(inputs, None)
    turns: dict[str, Callable[[], float]] = {TORCH: partial(turn, inputs, None)}
    found: dict[str, dict[str, Any]] = {TORCH: {"kernel": kernel_of(reference[0]), "difference": 0.0}}
    for name, kernel in KERNELS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says why it does not take a kernel
                results = attend(inputs, kernel)
        except RuntimeError as error:
            print(f"{size}: {name}: left out: {' '.join(str(error).split())}")
            continue
        found[name] = {"kernel": kernel_of(results[0]), "difference": max(map(difference, results, reference))}
        turns[name] = partial(turn, inputs, kernel)
    times = alternate(turns, rounds)
    shape = "×".join(map(str, inputs[0].shape))
    return [
        {
            "size": size, "rows×heads×length×width": shape, "way": name, "kernel": about["kernel"],
            **{f"ms {key}": value for key, value in spread(times[name]).items()},
            "difference": f"{about['difference']:.1e}",
        }
        for name, about in found.items()
    ]  # fmt: skip


def make_inputs(size: str, device: torch.device) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, (rows, heads, length, width)."""
    seq_len, rows, *_ = (SMALL if device.type == "cpu" else LARGE)[size]
    preset = PRESETS["1m" if device.type == "cpu" else size]
    generator = torch.Generator(device).manual_seed(0)
    shape = (rows, seq_len, preset["heads"], preset["dim"] // preset["heads"])
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    drawn = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4)]
    # As the model has them: a view of (rows, length, heads, width).
    return [tensor.transpose(1, 2).requires_grad_(index < 3) for index, tensor in enumerate(drawn)]


def attend(inputs: list[Tensor], kernel: SDPBackend | None) -> list[Tensor]:
    """The output and the gradients of queries, keys and values; None: torch chooses the kernel."""
    *leaves, gradient = inputs
    with sdpa_kernel(kernel) if kernel is not None else nullcontext():
        output = scaled_dot_product_attention(*leaves, is_causal=True)
    return [output, *torch.autograd.grad(output, leaves, gradient)]


def turn(inputs: list[Tensor], kernel: SDPBackend | None) -> float:
    """Milliseconds of one forward and backward pass."""
    wait(inputs[0].device)
    began = time.perf_counter()
    for _ in range(CALLS):
        attend(inputs, kernel)
    wait(inputs[0].device)
    return 1000 * (time.perf_counter() - began) / CALLS


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_of(output: Tensor) -> str:
    """What autograd calls the operator that made an output."""
    assert output.grad_fn is not None
    return output.grad_fn.name().removeprefix("ScaledDotProduct").removesuffix("Backward0")


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


if __name__ == "__main__":
    main()
