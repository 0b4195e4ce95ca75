"""Train a model from a config, or go on with an interrupted run. The loop is `train`; it does not know what runs it."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from llmtrain.assemble import assemble, describe
from llmtrain.checkpoint.folders import BEST
from llmtrain.checkpoint.lock import RunLock
from llmtrain.checkpoint.resume import brings_weights
from llmtrain.config import RunConfig, load_config
from llmtrain.data.batches import Batch, inputs_and_targets
from llmtrain.demo import demo_config
from llmtrain.engine import Engine, make_engine
from llmtrain.errors import LlmtrainError, run_main
from llmtrain.health.agreement import leave, together
from llmtrain.health.garbage import without_long_pauses
from llmtrain.health.peers import Peers
from llmtrain.health.signals import StopSignals
from llmtrain.observe.loss_sums import LossSums
from llmtrain.observe.meter import peak_memory_gb
from llmtrain.parsers import train_parser as parser
from llmtrain.run import Run


def train(run: Run) -> None:
    """Take optimizer steps until the run is done.

    Raises:
        Stopped: told to stop; saved.
        DivergedError: steps had to be skipped again and again; going back did not help.
        PeerLostError: another rank is gone, cut off or stuck.
        UserError: checkpoints could not be written.
    """
    engine, progress, training = run.engine, run.progress, run.config.training
    stream = run.batches()
    if progress.unfinished:  # a signal cut short what follows the last step
        conclude(run, *run.unfinished())
    while progress.step < run.total_steps and not run.has_stopped_improving():
        run.stop_if_told()
        run.meter.begin()
        batch = next(stream)
        lr = run.schedule(progress.step + 1)
        seed_dropout(run.config, progress.step + 1, engine.rank)
        loss = accumulate(engine, batch, training.micro_batch_size)
        run.ask()
        run.peers.progress(progress.step + 1, "update")
        outcome = engine.step(lr, loss.total / batch.target_count, run.guard.limits(batch))
        progress.advance(batch.end, batch.target_count)
        run.meter.add(loss, outcome, batch.target_count)
        if run.ledger:
            run.ledger.write(progress.step, batch)
        if run.rolled_back(batch, lr, outcome):
            stream, progress = run.batches(), run.progress
            if progress.unfinished:
                conclude(run, *run.unfinished())
        else:
            conclude(run, batch.epoch, lr, outcome.grad_norm)
    run.finish()


def conclude(run: Run, epoch: int, lr: float, grad_norm: torch.Tensor) -> None:
    """Whatever is due after a step."""
    training = run.config.training
    validation = run.validate(epoch, grad_norm) if run.due(training.eval_every) else None
    if run.due(training.sample_every) and (validation is None or math.isfinite(validation.loss)):  # else `log` ends it
        run.sample(epoch, grad_norm)
    run.progress.unfinished = None
    is_best = validation is not None and run.progress.validated(validation.loss)
    if validation or run.due(run.config.logging.every):
        run.log(epoch, lr, grad_norm, validation)
    if is_best:
        run.save(BEST)
    elif run.due(run.config.checkpoint.save_every):
        run.save()


def accumulate(engine: Engine, batch: Batch, rows: int) -> LossSums:
    """Add the gradient of the mean over all target tokens of the global batch; return this rank's loss."""
    loss, count = LossSums(batch, engine.device), batch.target_count
    for tokens, is_last in batch.micro_batches():
        inputs_BS, targets_BS = inputs_and_targets(tokens, rows, engine.device, batch.padding)
        loss.add(engine.forward_backward(inputs_BS, targets_BS, global_targets=count, sync=is_last, by_row=loss.by_row))
    return loss


def seed_dropout(config: RunConfig, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank): a resumed run draws what an uninterrupted one would."""
    if config.model.dropout:
        torch.manual_seed(int(np.random.SeedSequence([config.run.seed, step, rank]).generate_state(1, np.uint64)[0]))


def dry_run(run: Run) -> None:
    """Everything a run needs has been checked: take one step, print the plan, write nothing."""
    config, engine, batch = run.config, run.engine, next(run.batches())
    began = time.perf_counter()
    loss = engine.sum(accumulate(engine, batch, config.training.micro_batch_size).total).item() / batch.target_count
    grad_norm = engine.step(run.schedule(run.progress.step + 1)).grad_norm.item()
    seconds = time.perf_counter() - began
    start = f"after step {run.progress.step:,} of {run.resumed_from.folder}" if run.resumed_from else "the beginning"
    plan = {
        **describe(run.parts, run.total_steps),
        "start": start,
        "one step": f"loss {loss:.4f} (chance: {math.log(config.model.vocab_size or 1):.4f}) · gradient norm "
        f"{grad_norm:.4f} · {seconds:.2f} s with warm-up · peak memory {peak_memory_gb(engine.device):.2f} GB",
    }
    if engine.rank == 0:
        print("\n".join(f"{name:>10}  {value}" for name, value in plan.items()))
        print("dry run: all checks passed; nothing was written")


def main(argv: list[str]) -> None:
    """`llmtrain train`."""
    args = parser().read(argv)
    config = load_config(args.config or demo_config(args.overrides), args.overrides)
    # Outermost: a scheduler that signals twice must not cut short what follows the first.
    with StopSignals() as signals, ExitStack() as at_the_end:
        lock = RunLock(Path(config.run.dir))
        at_the_end.callback(lock.release)
        engine = make_engine(config.health.timeout_s)
        at_the_end.push(lambda _, error, __: leave(engine, error))
        peers = at_the_end.enter_context(Peers(engine))
        at_the_end.enter_context(peers.watched())
        if not args.dry_run:
            together(engine, lambda: lock.acquire() if engine.rank == 0 else None)
        known = together(engine, lambda: engine.rank == 0 and brings_weights(Path(config.run.dir), args.resume))
        goes_on = engine.gather(known)[0]
        parts = assemble(config, engine, is_drawn=not goes_on, is_told=signals.is_told)
        run = Run(parts, args.resume, peers, signals, None if args.dry_run else lock)
        if goes_on and not run.resumed_from:
            raise LlmtrainError(f"{config.run.dir}: its checkpoints have gone since the start; start again")
        if args.dry_run:
            dry_run(run)
        else:
            with run.opened(lock), without_long_pauses():
                train(run)


if __name__ == "__main__":
    sys.exit(run_main(main))
