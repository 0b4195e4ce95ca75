"""The training loop against a bare PyTorch loop over the same model, batches and optimizer, step by step in turns.

    python -m benchmarks.loop [--steps 2] [--rounds 16] [--preset 10m]

Both run in this process, in float32 and eager, at 10M parameters, length 256, batch 8 and vocabulary 8192 (random ids:
speed does not depend on what is learned). The loop is the real one, with its records every 10 steps. The bare loop runs
twice: how far it is from itself is the noise of the machine.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import alternate, print_table, spread, write_result
from benchmarks.synthetic import write_random_data
from llmtrain.assemble import Assembly, assemble
from llmtrain.checkpoint.lock import RunLock
from llmtrain.config import make_config
from llmtrain.data.batches import batches, inputs_and_targets
from llmtrain.engine import make_engine
from llmtrain.health.peers import Peers
from llmtrain.health.signals import StopSignals
from llmtrain.model.transformer import Transformer
from llmtrain.optim.optimizers import make_optimizer
from llmtrain.run import Run
from llmtrain.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each turn")
    parser.add_argument("--rounds", type=int, default=16, help="turns that count, after one that does not")
    parser.add_argument("--preset", default="10m")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_random_data(Path(folder) / "data", tokens=2_000_000, vocab_size=8192)
        config = make_config(
            {
                "run": {"dir": f"{folder}/run"},
                "data": {"path": str(data), "seq_len": args.seq_len},
                "model": {"preset": args.preset},
                "training": {
                    "micro_batch_size": args.batch,
                    "global_batch_size": args.batch,
                    "max_steps": 10**6,
                    "precision": "fp32",
                    "compile": False,
                    "eval_every": None,
                },
                "checkpoint": {"save_every": None},
                "logging": {"plots": False},
            }
        )
        parts = assemble(config, make_engine(config.health.timeout_s))
        contenders = {
            "bare PyTorch": bare_loop(parts, args.steps),
            "llmtrain": the_loop(parts, args.steps),
            "bare again": bare_loop(parts, args.steps),
        }
        measures = alternate(contenders, args.rounds)
    rows = [
        {"loop": name, **{f"ms/step {k}": 1000 * v / args.steps for k, v in spread(seconds).items()}}
        for name, seconds in measures.items()
    ]
    ratios = {
        f"{name} / bare PyTorch": spread([a / b for a, b in zip(measures[name], measures["bare PyTorch"], strict=True)])
        for name in ("llmtrain", "bare again")
    }
    print_table(rows)
    for name, ratio in ratios.items():
        print(f"{name}, round by round: {ratio}")
    write_result(f"loop-{args.preset}", [*rows, {**ratios, "arguments": vars(args)}], ["llmtrain", "torch"])


def the_loop(parts: Assembly, steps: int) -> Callable[[], float]:
    """A function that takes `steps` steps of the real loop and returns the seconds."""
    run = Run(parts, "never", Peers(parts.engine), StopSignals())
    run._open(RunLock(run.dir))
    run.finish = lambda: None  # type: ignore[method-assign]  # a turn ends, the run does not

    def turn() -> float:
        run.total_steps = run.progress.step + steps
        began = time.perf_counter()
        train(run)
        return time.perf_counter() - began

    return turn


def bare_loop(
    parts: Assembly, steps: int, wrap: Callable[[nn.Module], nn.Module] = lambda model: model
) -> Callable[[], float]:
    """The same arithmetic with nothing around it, or nothing but what `wrap` puts there."""
    config = parts.config
    torch.manual_seed(config.run.seed)
    model = Transformer(config.model, config.data.seq_len)
    model.init_weights()
    optimizer = make_optimizer(model, config.optimizer)
    wrapped = wrap(model)
    rows = config.training.micro_batch_size
    stream = batches(parts.train, parts.layout, parts.order(), position=0)
    ready = [
        inputs_and_targets(tokens, rows, torch.device("cpu"))
        for batch in itertools.islice(stream, steps)
        for tokens, _ in batch.micro_batches()
    ]
    targets = rows * config.data.seq_len

    def turn() -> float:
        began = time.perf_counter()
        for inputs, labels in ready:
            loss = wrapped(inputs, labels) / targets
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return turn


if __name__ == "__main__":
    main()
