"""Check the machine, then, with a config, the training checklist on one batch; launched in several processes, also the
links between them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from llmtrain.assemble import Assembly, assemble, describe, resolve_here
from llmtrain.checkpoint.folders import committed_steps
from llmtrain.config import RunConfig, load_config
from llmtrain.data.sources import fetch_data, open_data
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.engine import Engine, make_engine
from llmtrain.engine.device import free_memory, pick_device
from llmtrain.errors import CorruptError, LlmtrainError, UserError, run_main
from llmtrain.health.agreement import leave
from llmtrain.health.checklist import checklist, overfit, overfit_rate
from llmtrain.health.cluster import cluster_findings
from llmtrain.health.finding import Finding, fail, ok, warn
from llmtrain.health.limits import PROBE, disk_finding
from llmtrain.health.machine import machine_findings, rendezvous_finding
from llmtrain.health.peers import Peers
from llmtrain.health.rate_finder import find_rate
from llmtrain.model.memory import RankMemory, rank_memory
from llmtrain.observe.formats import compact
from llmtrain.observe.sinks import require_sinks
from llmtrain.parsers import doctor_parser as parser
from llmtrain.planning.budget import checkpoints_kept, planned_tokens
from llmtrain.storage.remote import Remote

_TIMEOUT_S = 120.0  # of an exchange: who asks the doctor wants an answer


def training_findings(args: Namespace) -> Iterator[Finding]:
    """Check the config, its data, and training on one batch; the first that fails for good ends it."""
    try:
        config = load_config(args.config, args.overrides)
        for finding in _before_it_is_built(config, args.config):
            yield finding
            if finding.status == "FAIL":
                return
        with _assembled(config) as parts:
            yield from _built(parts)
        if args.find_lr:
            with _assembled(config) as parts:
                yield find_rate(parts)
        if args.overfit:
            lr = overfit_rate(config.model.dim)
            with _assembled(_for_overfit(config, lr)) as parts:
                yield overfit(parts, lr)
    except LlmtrainError as error:
        yield _failure(error)


def _before_it_is_built(config: RunConfig, path: Path, engine: Engine | None = None) -> Iterator[Finding]:
    """What is known without the other ranks, of which there are none where there is no engine yet."""
    require_sinks(config)
    if config.checkpoint.remote:
        Remote(config.checkpoint.remote)  # or what speaks with such a store is not installed
    yield ok("config", f"{path} is valid")
    needed, steps = _needed(config, engine)
    if engine is None or engine.name == "accelerate":  # which ZeRO stage shares the model only the engine knows
        yield _memory(needed)
    if engine is None or engine.rank == 0:
        yield from _run_folder(config, (needed.weights + needed.optimizer), steps)


def _built(parts: Assembly) -> Iterator[Finding]:
    if parts.engine.rank == 0 or parts.engine.world_size == 1:
        for name, detail in describe(parts, parts.total_steps()).items():
            yield ok(name, detail)
        if not parts.judges:
            yield warn("validation", "no validation windows, so no best checkpoint; prepare with --val-split")
        for warning in parts.warnings:
            yield warn("ranks differ", warning)
    yield from checklist(parts, load_tokenizer(parts.data.tokenizer_folder))


def _failure(error: LlmtrainError) -> Finding:
    return fail("data" if isinstance(error, CorruptError) else "config", str(error))


@contextmanager
def _assembled(config: RunConfig) -> Iterator[Assembly]:
    engine = make_engine(config.health.timeout_s)
    try:
        yield assemble(config, engine)
    finally:
        engine.close()


def _needed(config: RunConfig, engine: Engine | None) -> tuple[RankMemory, int]:
    """What training takes on one device, and steps: known before anything of that size is built."""
    data = open_data(config.data, fetch_data(config.data))
    ranks = engine.world_size if engine else 1
    resolved = resolve_here(config, data.tokenizer.vocab_size, ranks)
    memory = rank_memory(
        "single" if ranks == 1 else "ddp",
        resolved.model,
        resolved.data.seq_len,
        world_size=ranks,
        optimizer=resolved.optimizer.name,
        precision=resolved.training.precision,
    )
    tokens, _ = planned_tokens(resolved, data.train_tokens)
    return memory, -(-tokens // (resolved.training.global_batch_size * resolved.data.seq_len))


def _memory(memory: RankMemory) -> Finding:
    needed, free = memory.device, free_memory(pick_device())
    detail = f"{compact(needed)}B for weights, gradients and moments, activations aside; {compact(free)}B free"
    if needed > free:
        return fail(
            "model memory", f"{detail}; choose a smaller model or a larger machine, or cut it (launch/zero3.yaml)"
        )
    return ok("model memory", detail)


def _run_folder(config: RunConfig, checkpoint_bytes: float, steps: int) -> Iterator[Finding]:
    """Look at where the run will be written; what is written to measure is gone at once."""
    folder = Path(config.run.dir)
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryDirectory(dir=existing, prefix=PROBE):
            pass
    except OSError as error:
        place = Path(error.filename or folder / PROBE).parent
        yield fail("run folder", f"{folder}: cannot be written: {place}: {error.strerror}; choose another run.dir")
        return
    free = shutil.disk_usage(existing).free
    needed = checkpoint_bytes * checkpoints_kept(config, steps)
    if needed > free:
        yield fail(
            "run folder",
            f"{folder}: checkpoints take up to {compact(needed)}B, {compact(free)}B are free; lower "
            "checkpoint.keep_last, raise keep_every or choose another run.dir",
        )
    elif saved := committed_steps(folder):
        yield warn("run folder", f"{folder}: holds a run, which train would go on with after step {saved[-1]:,}")
    else:
        yield ok("run folder", f"{folder}: checkpoints take up to {compact(needed)}B, {compact(free)}B are free")
    yield disk_finding(existing, checkpoint_bytes, config.health.grace_s)


def _for_overfit(config: RunConfig, lr: float) -> RunConfig:
    """Leave out what keeps a model from learning by heart: dropout, decay, rounding."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"dropout": 0.0}),
            "training": config.training.model_copy(update={"precision": "fp32", "fp8": False, "compile": False}),
            "optimizer": config.optimizer.model_copy(update={"name": "adamw", "lr": lr, "weight_decay": 0.0}),
        }
    )


def launched_findings(args: Namespace, engine: Engine) -> Iterator[Finding]:
    """The same in several processes: each machine, what they can do together, and training on all of them.

    Every rank goes through all of it and gets the same findings.
    """
    own = list(machine_findings()) if os.environ.get("LOCAL_RANK") == "0" else []
    yield from shared(engine, own)
    yield from cluster_findings(engine)
    if args.config is None:
        return
    found: list[Finding] = []
    config = None
    try:
        config = load_config(args.config, args.overrides)
        found += _before_it_is_built(config, args.config, engine)
    except LlmtrainError as error:
        found.append(_failure(error))
    merged = shared(engine, found)
    yield from merged
    if config is None or any(finding.status == "FAIL" for finding in merged):
        return
    try:
        yield from shared(engine, _built(assemble(config, engine)))
    except LlmtrainError as error:  # all ranks meet it, or none
        yield _failure(error)


def shared(engine: Engine, own: Iterable[Finding]) -> list[Finding]:
    """What rank 0 found, and where others found what is not well, that with rank and host; the same on all ranks."""
    everybody = engine.gather((platform.node(), list(own)))
    merged = list(everybody[0][1])
    seen = {(everybody[0][0], finding.name, finding.status) for finding in merged}
    for rank, (host, findings) in enumerate(everybody):
        for finding in findings:
            if finding.status == "ok" or (host, finding.name, finding.status) in seen:
                continue
            seen.add((host, finding.name, finding.status))
            merged.append(replace(finding, detail=f"rank {rank} on {host}: {finding.detail}"))
    return merged


def _alone(args: Namespace) -> Iterator[Finding]:
    yield from machine_findings()
    if args.rendezvous:
        yield rendezvous_finding(args.rendezvous)
    if args.config:
        yield from training_findings(args)
    else:
        yield disk_finding(Path.cwd())


def main(argv: list[str]) -> None:
    """`llmtrain doctor`."""
    args = parser().read(argv)
    if args.config is None and (args.overfit or args.find_lr or args.overrides):
        raise UserError("--overfit, --find-lr and section.key=value need a config: add --config FILE")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _tell(_alone(args), args.json)
        return
    if args.overfit or args.find_lr or args.rendezvous:
        raise UserError(
            "--overfit, --find-lr and --rendezvous are for one process; run llmtrain doctor without a launcher"
        )
    with ExitStack() as at_the_end:
        engine = make_engine(_TIMEOUT_S)
        at_the_end.push(lambda _, error, __: leave(engine, error))
        peers = at_the_end.enter_context(Peers(engine))
        at_the_end.enter_context(peers.watched())
        _tell(launched_findings(args, engine), args.json, is_shown=engine.rank == 0)


def _tell(source: Iterable[Finding], as_json: bool, is_shown: bool = True) -> None:
    """Print the findings as they come, or all as JSON.

    Raises:
        UserError: something failed.
    """
    findings = []
    for finding in source:
        findings.append(finding)
        if is_shown and not as_json:
            print(finding.line(), flush=True)
    failed = sum(finding.status == "FAIL" for finding in findings)
    if is_shown and as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}), flush=True)
    if failed:
        error = UserError(f"{failed} of {len(findings)} checks failed")
        error.is_everywhere = True  # all ranks have the same findings
        raise error


if __name__ == "__main__":
    sys.exit(run_main(main))
