"""Check the machine, then, with a config, the training checklist on one batch."""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from llmtrain.arguments import VerbParser
from llmtrain.assemble import Assembly, assemble, describe, resolve_here
from llmtrain.checkpoint.folders import committed_steps
from llmtrain.config import RunConfig, load_config
from llmtrain.data.sources import fetch_data, open_data
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.engine import make_engine
from llmtrain.engine.device import pick_device
from llmtrain.errors import CorruptError, LlmtrainError, UserError, run_main
from llmtrain.health.checklist import checklist, overfit, overfit_rate
from llmtrain.health.finding import Finding, fail, ok, warn
from llmtrain.health.machine import free_memory, machine_findings, rendezvous_finding
from llmtrain.health.rate_finder import find_rate
from llmtrain.model.memory import RankMemory, rank_memory


def training_findings(args: Namespace) -> Iterator[Finding]:
    """Check the config, its data, and training on one batch; the first that fails for good ends it."""
    try:
        config = load_config(args.config, args.overrides)
        yield ok("config", f"{args.config} is valid")
        needed = _needed(config)
        memory = _memory(needed)
        yield memory
        if memory.status == "FAIL":
            return
        with _assembled(config) as parts:
            for name, detail in describe(parts, parts.total_steps()).items():
                yield ok(name, detail)
            yield from _run_folder(Path(config.run.dir), _checkpoint_bytes(config, needed))
            if not parts.val:
                yield warn("validation", "no validation windows, so no best checkpoint; prepare with --val-split")
            yield from checklist(parts, load_tokenizer(parts.data.tokenizer_folder))
        if args.find_lr:
            with _assembled(config) as parts:
                yield find_rate(parts)
        if args.overfit:
            lr = overfit_rate(config.model.dim)
            with _assembled(_for_overfit(config, lr)) as parts:
                yield overfit(parts, lr)
    except CorruptError as error:
        yield fail("data", str(error))
    except LlmtrainError as error:
        yield fail("config", str(error))


@contextmanager
def _assembled(config: RunConfig) -> Iterator[Assembly]:
    engine = make_engine(config.health.timeout_s)
    try:
        yield assemble(config, engine)
    finally:
        engine.close()


def _needed(config: RunConfig) -> RankMemory:
    """What training takes on one device, known before anything of that size is built."""
    data = open_data(config.data, fetch_data(config.data))
    resolved = resolve_here(config, data.tokenizer.vocab_size)
    return rank_memory(
        "single",
        resolved.model,
        resolved.data.seq_len,
        optimizer=resolved.optimizer.name,
        precision=resolved.training.precision,
    )


def _memory(memory: RankMemory) -> Finding:
    needed, free = memory.device, free_memory(pick_device())
    detail = f"{needed / 1e9:.2f} GB for weights, gradients and moments, activations aside; {free / 1e9:.1f} GB free"
    if needed > free:
        return fail("model memory", f"{detail}; choose a smaller model or a larger machine")
    return ok("model memory", detail)


def _checkpoint_bytes(config: RunConfig, memory: RankMemory) -> float:
    """What the checkpoints of a run take at most: the last ones, the best, the final, and the one being written."""
    return (memory.weights + memory.optimizer) * (config.checkpoint.keep_last + 3)


def _run_folder(folder: Path, needed: float) -> Iterator[Finding]:
    """Look at where the run will be written, without writing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        yield fail("run folder", f"{existing}: cannot be written; choose another run.dir")
    elif needed > free:
        yield fail(
            "run folder",
            f"{folder}: checkpoints take up to {needed / 1e9:.2f} GB, {free / 1e9:.1f} GB are free; lower "
            "checkpoint.keep_last or choose another run.dir",
        )
    elif steps := committed_steps(folder):
        yield warn("run folder", f"{folder}: holds a run, which train would go on with after step {steps[-1]:,}")
    else:
        yield ok("run folder", f"{folder}: checkpoints take up to {needed / 1e9:.2f} GB, {free / 1e9:.1f} GB are free")


def _for_overfit(config: RunConfig, lr: float) -> RunConfig:
    """Leave out what keeps a model from learning by heart: dropout, decay, rounding."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"dropout": 0.0}),
            "training": config.training.model_copy(update={"precision": "fp32", "fp8": False, "compile": False}),
            "optimizer": config.optimizer.model_copy(update={"name": "adamw", "lr": lr, "weight_decay": 0.0}),
        }
    )


def main(argv: list[str]) -> None:
    """`llmtrain doctor`."""
    parser = VerbParser("doctor", __doc__.splitlines()[0], "llmtrain doctor --config configs/debug.yaml --overfit")
    parser.add_argument("--config", type=Path, metavar="FILE", help="check training with this config, too")
    parser.add_argument("--overfit", action="store_true", help="learn one batch by heart, which takes a while")
    parser.add_argument(
        "--find-lr",
        action="store_true",
        help="try 150 rising rates, a batch each; suggest optimizer.lr",
    )
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="check that the processes of a launch can meet there")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    args = parser.parse_intermixed_args(argv)
    if args.config is None and (args.overfit or args.find_lr or args.overrides):
        raise UserError("--overfit, --find-lr and section.key=value need a config: add --config FILE")
    findings = []
    network = [rendezvous_finding(args.rendezvous)] if args.rendezvous else []
    for source in (machine_findings(), network, training_findings(args) if args.config else ()):
        for finding in source:
            findings.append(finding)
            if not args.json:
                print(finding.line(), flush=True)
    failed = sum(finding.status == "FAIL" for finding in findings)
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
    if failed:
        raise UserError(f"{failed} of {len(findings)} checks failed")


if __name__ == "__main__":
    sys.exit(run_main(main))
