"""The loss and its gradients from the last hidden states: time and memory, against the plain form and torch's.

    python -m benchmarks.loss [--tokens 4096] [--dim 768] [--vocab 50304] [--rounds 5]

All take the same hidden states, head and targets, forward and backward, in turns; bf16 under autocast on a GPU. Memory
is the most that was there at once beyond inputs and their gradients, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everyone reads

from benchmarks.common import alternate, print_table, spread, write_result
from llmtrain.engine.device import pick_device
from llmtrain.model.loss import cross_entropy_sum, linear_cross_entropy_sum


def plain(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """All logits at once."""
    return cross_entropy_sum(F.linear(hidden_ND, weight_VD), targets_N)


def of_torch(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Torch's (2.13 and later), in parts as it chooses itself."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="sum", options=options)


FORMS = {"plain": plain, "llmtrain": linear_cross_entropy_sum}
if hasattr(F, "linear_cross_entropy"):
    FORMS["torch"] = of_torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--rounds", type=int, default=5, help="turns that count, after one that does not")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/loss.json")
    parser.add_argument("--memory-of", choices=list(FORMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(peak_mb(work(args, FORMS[args.memory_of]))))
        return
    measured = alternate({name: timed(work(args, form)) for name, form in FORMS.items()}, args.rounds)
    rows: list[dict[str, Any]] = []
    for name, values in measured.items():
        command = [sys.executable, "-m", "benchmarks.loss", *sys.argv[1:], "--memory-of", name]
        memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append({"loss": name, **{f"ms {k}": v for k, v in spread(values).items()}, "MB beyond": memory})
    print_table(rows)
    facts = {"tokens": args.tokens, "dim": args.dim, "vocab": args.vocab, "device": str(pick_device())}
    write_result("loss", [*rows, facts], ["llmtrain", "torch"], args.out)


def work(args: argparse.Namespace, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """A function that computes loss and gradients once and waits for the device."""
    device = pick_device()
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.dim, device=device).requires_grad_()
    weight = (0.02 * torch.randn(args.vocab, args.dim, device=device)).requires_grad_()
    targets = torch.randint(args.vocab, (args.tokens,), device=device)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    on_gpu = device.type == "cuda"

    def once() -> None:
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            form(hidden, weight, targets).backward()
        if on_gpu:
            torch.cuda.synchronize()

    return once


def timed(once: Callable[[], None]) -> Callable[[], float]:
    """Milliseconds of one call."""

    def measure() -> float:
        began = time.perf_counter()
        once()
        return 1000 * (time.perf_counter() - began)

    return measure


def peak_mb(once: Callable[[], None], warm: bool = True) -> float:
    """Most memory at once during a call, beyond what was there before it, in MB; `warm`: it was called before."""
    if warm:
        once()  # libraries' own buffers
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (proc(5))
    once()
    return (_resident_bytes("VmHWM") - before) / 1e6


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
