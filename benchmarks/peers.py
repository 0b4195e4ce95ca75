"""llmtrain beside nanoGPT, litgpt and the `transformers` Trainer, each run by its own code, in turns on one machine.

    python -m benchmarks.peers [--nanogpt DIR] [--peers-python PATH] [--size 10m tiny] [--precision fp32 as-shipped]
                               [--steps N] [--repeats 3] [--device cpu]

DIR is a checkout of nanoGPT, run by the python that runs this; PATH is the python of an environment with litgpt and
transformers. What is not given or cannot be imported there is left out, which the output says.

One measure for all, taken from outside: when the lines that a trainer prints for its records arrive here. A turn is a
process of its own. The time of a step is that from one line to the next, over the steps between them, the record
included; the turn's number is the median over its lines, without the first line and the first fifth of the steps (at
least five). Every trainer records every `--every` steps. Launch to first step is a process of its own too: one step,
recorded. Each contender has run once before, turns alternate, and the table has the median over turns and the range.

All have the same width, depth, heads, vocabulary, length, batch without accumulation, tied embeddings, AdamW, clipping
at 1, the same random tokens, and write no checkpoint while they are timed. The models are their own: GPT-2 in nanoGPT,
a Llama in litgpt and transformers, a Llama with normed queries and keys here; in float32 llmtrain trains the other two
as well, so that the same arithmetic stands beside itself. Each has its own bare loop (peer_drivers/bare.py): its model
and optimizer in float32 and eager, one batch over and over, nothing else. The fixed cost of a trainer is its time less
that of its bare loop, round by round.

fp32: float32 and eager in all (litgpt always compiles; torch's TORCH_COMPILE_DISABLE keeps it from that). as-shipped:
nothing is said about precision and compilation. Then nanoGPT compiles, in float32 on a CPU and bf16 on a GPU that has
it; litgpt compiles with bf16 autocast; the Trainer is float32 and eager; llmtrain takes bf16 autocast where the device
computes it natively, and compiles on a GPU and, at 10m and above, on a CPU with a compiler: it is at the beginning of a
run of 10,000 steps, as nanoGPT is by default at that of one of 600,000. Launches come after the turns, so what was
compiled is in torch's cache. On a GPU float32 products are TF32 in nanoGPT and litgpt.

Evaluation is switched off as far as each allows: nanoGPT takes one batch of each split before its first step, litgpt
two, and measures its FLOPs; both are in launch to first step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate, arguments_without_places, print_table, spread, write_result
from benchmarks.contenders import (
    BARE_LINE,
    SIZES,
    Command,
    Contender,
    Launch,
    commit_of,
    litgpt,
    llmtrain,
    llmtrain_as_gpt2,
    llmtrain_as_llama,
    nanogpt,
    trainer,
    write_data,
)
from llmtrain.engine.device import computes_bf16_natively


class ProcessFailedError(Exception):
    """A process of a contender ended with another exit code than it should; the text is the end of what it said."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"arguments": arguments_without_places(args)}
    contenders, facts["left out"] = _given(args)
    _say_left_out(facts["left out"])
    facts["nanoGPT commit"] = commit_of(args.nanogpt) if args.nanogpt else None
    facts["bf16 is native"] = computes_bf16_natively(torch.device(args.device))
    facts["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS")
    for name in args.size:
        size = SIZES[name]
        size = replace(size, steps=args.steps or size.steps, every=args.every or size.every)
        with tempfile.TemporaryDirectory() as folder:
            launch = Launch(size, "fp32", args.device, write_data(Path(folder), size), Path())
            about, problems = _present(contenders, launch)
            _say_left_out(problems)
            facts["left out"] |= problems
            facts.setdefault("found", {})[name] = about
            contenders = [contender for contender in contenders if contender.name in about]
            for precision in args.precision:
                # Another's model is the same arithmetic only where nothing is left to the trainers' choice.
                fitting = [one for one in contenders if precision == "fp32" or not one.architecture]
                measured = _measure(fitting, replace(launch, precision=precision), args.repeats)
                for row in measured:
                    row |= {"size": name, "parameters": about[row["trainer"]]["parameters"]}
                rows += measured
                print(f"\n{name}, {precision}, {args.device}")
                print_table([_printed(row) for row in measured])
                write_result("peers", [*rows, facts], ["llmtrain", "torch"], args.out)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--peers-python", help="the python of an environment with litgpt and transformers")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["10m", "tiny"])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "as-shipped"], default=["fp32", "as-shipped"])
    parser.add_argument("--steps", type=_positive, help="optimizer steps of a turn; left out, as fits the size")
    parser.add_argument(
        "--every", type=_positive, help="steps from one log line to the next; left out, as fits the size"
    )
    parser.add_argument("--repeats", type=_positive, default=3, help="turns of each")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="where the JSON goes; left out, benchmarks/results/peers.json")
    args = parser.parse_args(argv)
    if args.nanogpt and not (args.nanogpt / "train.py").is_file():
        parser.error(f"--nanogpt {args.nanogpt}: there is no train.py; give a checkout of nanoGPT")
    if args.peers_python and not (found := shutil.which(args.peers_python)):
        parser.error(f"--peers-python {args.peers_python}: cannot be run; give the python of an environment")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    args.nanogpt = args.nanogpt and args.nanogpt.resolve()
    # Not resolved: the python of an environment is a link, and known by where it stands.
    args.peers_python = args.peers_python and os.path.abspath(found)  # noqa: PTH100
    for size in args.size:
        steps, every = args.steps or SIZES[size].steps, args.every or SIZES[size].every
        if steps // every < _lines_left_out(steps, every) + 2:
            parser.error(
                f"--steps {steps}: too few at {size} with a line every {every} steps; raise it, or lower --every"
            )
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


def _given(args: argparse.Namespace) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that were asked for, and why the others are left out."""
    contenders, left_out = [llmtrain()], {}
    if args.nanogpt:
        contenders += [nanogpt(args.nanogpt), llmtrain_as_gpt2()]
    else:
        left_out["nanoGPT"] = "no --nanogpt"
    if args.peers_python:
        contenders += [litgpt(args.peers_python), trainer(args.peers_python), llmtrain_as_llama()]
    else:
        left_out |= dict.fromkeys(("litgpt", "transformers Trainer"), "no --peers-python")
    return contenders, left_out


def _say_left_out(reasons: dict[str, str]) -> None:
    for name, why in reasons.items():
        print(f"{name}: left out: {why}", flush=True)


def _present(contenders: list[Contender], launch: Launch) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What a bare loop of no steps says about each contender; of those that cannot take one step, why."""
    about: dict[str, dict[str, Any]] = {}
    problems = {}
    for contender in contenders:
        try:
            lines = [line for _, line in _lines(contender.bare, replace(launch, size=replace(launch.size, steps=0)))]
            if not lines:
                raise ProcessFailedError("its bare loop said nothing")
            _arrivals(contender.command, contender.line, replace(launch, size=replace(launch.size, steps=1, every=1)))
            about[contender.name] = json.loads(lines[-1])
        except ProcessFailedError as error:
            if contender.name == "llmtrain":
                raise
            problems[contender.name] = str(error).splitlines()[-1]
    return about, problems


def _measure(contenders: list[Contender], launch: Launch, repeats: int) -> list[dict[str, Any]]:
    """One row for each contender: its steps beside its bare loop's, in turns, and then its launches."""
    size = launch.size
    short = replace(launch, size=replace(size, steps=1, every=1))
    turns: dict[str, Callable[[], list[float]]] = {}
    launches: dict[str, Callable[[], float]] = {}
    for each in contenders:
        turns[each.name] = partial(_step_times, each.command, each.line, launch)
        if launch.is_fp32:
            turns[f"{each.name}, bare"] = partial(_step_times, each.bare, BARE_LINE, launch)
        launches[each.name] = partial(_first_arrival, each.command, each.line, short)
    steps, starts = alternate(turns, repeats, warm_up=0), alternate(launches, repeats, warm_up=0)
    rows = []
    for each in contenders:
        own = [statistics.median(turn) for turn in steps[each.name]]
        bare = [statistics.median(turn) for turn in steps.get(f"{each.name}, bare", [])]
        row: dict[str, Any] = {"precision": launch.precision, "device": launch.device, "trainer": each.name}
        row["tokens/s"] = spread([1000 * size.batch * size.seq_len / ms for ms in own])
        row["ms/step"] = spread(own)
        row["bare ms/step"] = spread(bare) if bare else None
        row["fixed ms/step"] = spread([a - b for a, b in zip(own, bare, strict=True)]) if bare else None
        row["launch to first step s"] = spread(starts[each.name])
        row["ms/step within turns"] = [spread(turn) for turn in steps[each.name]]
        rows.append(row)
    return rows


def _first_arrival(make: Callable[[Launch], Command], line: re.Pattern[str], launch: Launch) -> float:
    """Seconds from launch to the first record."""
    return _arrivals(make, line, launch)[0]


def _step_times(make: Callable[[Launch], Command], line: re.Pattern[str], launch: Launch) -> list[float]:
    """Milliseconds a step, from each log line to the next, after warm-up."""
    size = launch.size
    arrivals = _arrivals(make, line, launch)[_lines_left_out(size.steps, size.every) :]
    return [1000 * (after - before) / size.every for before, after in itertools.pairwise(arrivals)]


def _lines_left_out(steps: int, every: int) -> int:
    # nanoGPT's first line is that of the first step, the others' of step `every`; one line more and both are warm.
    return math.ceil(max(5, steps / 5) / every)


def _arrivals(make: Callable[[Launch], Command], line: re.Pattern[str], launch: Launch) -> list[float]:
    """Seconds from the start of a process to each of its log lines."""
    arrivals = [seconds for seconds, text in _lines(make, launch) if line.search(text)]
    expected = launch.size.steps // launch.size.every
    if not expected <= len(arrivals) <= expected + 1:
        raise ProcessFailedError(f"{len(arrivals)} lines were taken for records instead of {expected}")
    return arrivals


def _lines(make: Callable[[Launch], Command], launch: Launch) -> Iterator[tuple[float, str]]:
    """Run a process in a folder of its own; yield its lines, each with the seconds since its start."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        command = make(replace(launch, out=Path(folder)))
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if launch.device == "cpu" else {}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **hidden, **command.environment}
        began = time.perf_counter()
        with subprocess.Popen(
            command.arguments,
            cwd=command.cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        ) as process:
            assert process.stdout
            for line in process.stdout:
                yield time.perf_counter() - began, line
        if process.returncode != command.exit_code:
            errors.seek(0)
            said = errors.read().strip()[-2000:]
            raise ProcessFailedError(f"{command.arguments}: exit code {process.returncode}\n{said}")


def _printed(row: dict[str, Any]) -> dict[str, str]:
    def text(values: dict[str, float] | None, digits: int) -> str:
        if values is None:
            return ""
        low, middle, high = (f"{values[key]:.{digits}f}" for key in ("min", "median", "max"))
        return f"{middle} ({low} to {high})"

    cells = {"trainer": row["trainer"], "parameters": f"{row['parameters'] / 1e6:.2f}M"}
    digits = {"tokens/s": 0, "ms/step": 2, "bare ms/step": 2, "fixed ms/step": 2, "launch to first step s": 2}
    return cells | {key: text(row[key], places) for key, places in digits.items()}


if __name__ == "__main__":
    try:
        main()
    except ProcessFailedError as error:
        sys.exit(f"peers: {error}")
