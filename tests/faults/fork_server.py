"""A process that has imported everything and forks one that trains for each request: a launch takes half a second.

Requests and answers are lines of JSON on stdin and stdout; see `Launcher` in `tests/faults/conftest.py`. A request
names the moment of the kill, if there is to be one: the n-th time that the run folder is changed (`event`; with `of`,
only changes that have this in their names count), or some seconds after the n-th time that the loop enters a phase
(`phase`) or that a function of ours is called (`call`, as `module:name`). With `withdraws` the process is not killed at
the event, but may no longer write where it could; `number` is another signal than SIGKILL. Of several `ranks`, this
happens to the `victim`. With `leads` (a name and a path) it is not killed, but finds the file of that name in each
checkpoint that is being written to lead to that path, at so many calls as `times` says. Steps go wrong by `faults`, see
`tests.faulty_steps`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import accelerate.optimizer
import accelerate.utils.deepspeed  # noqa: F401 -- what a launch would import late
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo

import llmtrain.engine.accelerate
import llmtrain.train
from llmtrain.checkpoint.folders import is_committed
from llmtrain.errors import run_main
from llmtrain.health.peers import Peers, Phase
from llmtrain.train import main
from tests.faults.file_events import FileEvents, die
from tests.faults.small_files import make_small
from tests.faulty_steps import faulty

NOBODY = 65534  # a user who may write nowhere here


def serve() -> None:
    """Answer requests until nobody asks any more. No thread may exist here: it would be missing in the children."""
    torch.set_num_threads(1)
    make_small()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        assert threading.active_count() == 1
        request = json.loads(line)
        ranks = int(request.get("ranks", 1))
        children = [fork(request, rank, ranks) for rank in range(ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.stdout.write(json.dumps({"codes": codes}) + "\n")
        sys.stdout.flush()


def fork(request: dict[str, Any], rank: int, ranks: int) -> int:
    """Start one rank of a launch; return its process."""
    child = os.fork()
    if child:
        return child
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"]),
        }  # fmt: skip
    if "ranks" in request:
        request |= {name: f"{request[name]}.{rank}" for name in ("stdout", "stderr", "events") if name in request}
    train({**request, "rank": rank}, rank == request.get("victim", 0))
    raise AssertionError("unreachable")


def train(request: dict[str, Any], is_victim: bool) -> NoReturn:
    """Be `llmtrain train` with the arguments of the request, until killed where that is for this rank."""
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for descriptor, path in ((1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["llmtrain", "train", *request["arguments"]]
        blow = partial(os.kill, os.getpid(), request.get("number", signal.SIGKILL))
        if "leads" in request:
            blow = partial(lead, Path(request["run_dir"]), *request["leads"])
        if "phase" in request and is_victim:
            in_phase(request["phase"], request["nth"], request["delay_s"], blow)
        if "call" in request and is_victim:
            in_call(request["call"], request["nth"], request["delay_s"], blow, request.get("times", 1))
        if "faults" in request:
            faults = {int(begin): kind for begin, kind in request["faults"].items()}
            llmtrain.train.accumulate = faulty(faults, request["rank"])  # type: ignore[assignment]
        end = partial(os.seteuid, NOBODY) if request.get("withdraws") else die
        at = request.get("event") if is_victim else None
        events = FileEvents(Path(request["run_dir"]), at, end, request.get("of", ""))
        code = run_main(main, request["arguments"])
        events.stop()
        if "events" in request:
            Path(request["events"]).write_text(json.dumps(events.seen))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_phase(phase: str, nth: int, delay_s: float, blow: Callable[[], object]) -> None:
    """Strike this process `delay_s` after the loop has entered a phase for the `nth` time, or after the start."""
    if phase == "start":
        threading.Timer(delay_s, blow).start()
        return
    enter, left = Peers.progress, [nth]

    def progress(peers: Peers, step: int, now: Phase) -> None:
        enter(peers, step, now)
        left[0] -= now == phase
        if not left[0]:
            left[0] = -1
            strike(delay_s, blow)

    Peers.progress = progress  # type: ignore[method-assign]


def in_call(place: str, nth: int, delay_s: float, blow: Callable[[], object], times: int) -> None:
    """Strike this process when a function of ours is called for the `nth` time, and so many `times` in a row.

    Without a delay, before it begins.
    """
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function, left = getattr(owner, name), [nth]

    @wraps(function)
    def called(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if -times < left[0] <= 0:
            strike(delay_s, blow)
        return function(*arguments, **named)

    setattr(owner, name, called)


def lead(run_dir: Path, name: str, path: str) -> None:
    """Let a file of the checkpoint that is being written lie elsewhere."""
    for folder in run_dir.glob("step-????????"):
        if not is_committed(folder):
            (folder / name).symlink_to(path)


def strike(delay_s: float, blow: Callable[[], object]) -> None:
    """At once, or after a while in which this process goes on."""
    if delay_s:
        threading.Timer(delay_s, blow).start()
    else:
        blow()


if __name__ == "__main__":
    serve()
