"""The training loop against a bare PyTorch loop over the same model, batches and optimizer, step by step in turns.

    python -m benchmarks.loop [--size 10m | tiny] [--steps 2] [--rounds 16] [--out FILE]

Both run in this process, in float32 and eager, over random ids (speed does not depend on what is learned), at the sizes
of `benchmarks.peers`. The loop is the real one, with its records every 10 steps. The bare one is what a user of PyTorch
writes by hand, over batches that are there already, and runs twice: how far it is from itself is the noise of the
machine. `fixed ms/step` is what a step costs beyond the bare one, round by round,
by the clock and in processor time, with the interval that holds the median 95 times in 100 (order statistics).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import alternate, arguments_without_places, print_table, spread, write_result
from benchmarks.contenders import SIZES
from benchmarks.synthetic import write_random_data
from llmtrain.assemble import Assembly, assemble
from llmtrain.checkpoint.lock import RunLock
from llmtrain.config import make_config
from llmtrain.data.batches import batches, inputs_and_targets
from llmtrain.engine import make_engine
from llmtrain.health.garbage import without_long_pauses
from llmtrain.health.peers import Peers
from llmtrain.health.signals import StopSignals
from llmtrain.model.transformer import Transformer
from llmtrain.optim.optimizers import parameter_groups
from llmtrain.run import Run
from llmtrain.train import train

Seconds = tuple[float, float]  # by the clock, and of the processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each turn")
    parser.add_argument("--rounds", type=int, default=16, help="turns that count, after one that does not")
    parser.add_argument("--size", default="10m", choices=SIZES)
    parser.add_argument("--out", type=Path, help="default: results/loop-SIZE.json")
    args = parser.parse_args()
    size = SIZES[args.size]
    with tempfile.TemporaryDirectory() as folder:
        data = write_random_data(Path(folder) / "data", tokens=2_000_000, vocab_size=size.vocab_size)
        config = make_config(
            {
                "run": {"dir": f"{folder}/run"},
                "data": {"path": str(data), "seq_len": size.seq_len},
                "model": {"dim": size.dim, "layers": size.layers, "heads": size.heads},
                "training": {
                    "micro_batch_size": size.batch,
                    "global_batch_size": size.batch,
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
        with launched(parts) as run, without_long_pauses():  # by the last the bare loop gains, too
            contenders = {
                "bare PyTorch": bare_loop(parts, args.steps),
                "llmtrain": the_loop(run, args.steps),
                "bare again": bare_loop(parts, args.steps),
            }
            measures = alternate(contenders, args.rounds)
    rows = [
        {"loop": name, **{f"ms/step {k}": 1000 * v / args.steps for k, v in spread([one[0] for one in turns]).items()}}
        for name, turns in measures.items()
    ]
    beyond = {
        f"{name}, {clock}, fixed ms/step": _interval(
            [
                1000 * (own[index] - bare[index]) / args.steps
                for own, bare in zip(measures[name], measures["bare PyTorch"], strict=True)
            ]
        )
        for name in ("llmtrain", "bare again")
        for index, clock in enumerate(("wall", "processor"))
    }
    print_table(rows)
    for name, found in beyond.items():
        print(f"{name}: {found['median']:.3f} ({found['from']:.3f} to {found['to']:.3f})")
    about = {**beyond, "arguments": arguments_without_places(args)}
    print(write_result(f"loop-{args.size}", [*rows, about], ["llmtrain", "torch"], args.out))


def _interval(values: list[float]) -> dict[str, float]:
    """The median, and the order statistics that enclose that of the distribution with a probability of 0.95."""
    ordered, count = sorted(values), len(values)
    tail, below = 0.0, 0
    while below < count // 2 and (tail := tail + math.comb(count, below) / 2**count) <= 0.025:
        below += 1
    return {
        "median": statistics.median(ordered),
        "from": ordered[max(0, below - 1)],
        "to": ordered[min(count - 1, count - below)],
    }


@contextmanager
def launched(parts: Assembly) -> Iterator[Run]:
    """All that `llmtrain train` has around its loop: signals, what watches the ranks and the steps, the run folder."""
    with StopSignals() as signals, Peers(parts.engine) as peers, peers.watched():
        lock = RunLock(Path(parts.config.run.dir))
        lock.acquire()
        run = Run(parts, "never", peers, signals, lock)
        run.finish = lambda: None  # type: ignore[method-assign]  # a turn ends, the run does not
        with run.opened(lock):
            yield run
        lock.release()


def the_loop(run: Run, steps: int) -> Callable[[], Seconds]:
    """A function that takes `steps` steps of the real loop."""

    def turn() -> Seconds:
        run.total_steps = run.progress.step + steps
        began = _clocks()
        train(run)
        return _since(began)

    return turn


def bare_loop(
    parts: Assembly, steps: int, wrap: Callable[[nn.Module], nn.Module] = lambda model: model
) -> Callable[[], Seconds]:
    """The same arithmetic with nothing around it, or nothing but what `wrap` puts there."""
    config = parts.config
    torch.manual_seed(config.run.seed)
    model = Transformer(config.model, config.data.seq_len)
    model.init_weights()
    groups = parameter_groups(model)
    decayed, undecayed = groups["matrices"] + groups["head"], groups["embeddings"] + groups["vectors"]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.optimizer.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        fused=True,
    )
    wrapped = wrap(model)
    rows = config.training.micro_batch_size
    stream = batches(parts.train, parts.layout, parts.order(), position=0)
    ready = [
        inputs_and_targets(tokens, rows, torch.device("cpu"))
        for batch in itertools.islice(stream, steps)
        for tokens, _ in batch.micro_batches()
    ]
    targets = rows * config.data.seq_len

    def turn() -> Seconds:
        began = _clocks()
        for inputs, labels in ready:
            loss = wrapped(inputs, labels) / targets
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return _since(began)

    return turn


def _clocks() -> Seconds:
    return time.perf_counter(), time.process_time()


def _since(began: Seconds) -> Seconds:
    wall, processor = _clocks()
    return wall - began[0], processor - began[1]


if __name__ == "__main__":
    main()
