"""A process that has imported everything and forks one that trains for each request: a launch takes half a second.

Requests and answers are lines of JSON on stdin and stdout; see `Launcher` in `tests/faults/conftest.py`. A request
names the moment of the kill, if there is to be one: the n-th time that the run folder is changed (`event`), or some
seconds after the n-th time that the loop enters a phase (`phase`). With `withdraws` the process is not killed at the
event, but may no longer write where it could.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.optimizer
import accelerate.utils.deepspeed  # noqa: F401 -- what a launch would import late
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo

import llmtrain.engine.accelerate  # noqa: F401
from llmtrain.errors import run_main
from llmtrain.health.peers import Peers, Phase
from llmtrain.train import main
from tests.faults.file_events import FileEvents, die

NOBODY = 65534  # a user who may write nowhere here


def serve() -> None:
    """Answer requests until nobody asks any more. No thread may exist here: it would be missing in the children."""
    torch.set_num_threads(1)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        assert threading.active_count() == 1
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            train(request)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(json.dumps({"code": code}) + "\n")
        sys.stdout.flush()


def train(request: dict[str, Any]) -> None:
    """Be `llmtrain train` with the arguments of the request, until killed."""
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for descriptor, path in ((1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["llmtrain", "train", *request["arguments"]]
        if "phase" in request:
            kill_in_phase(request["phase"], request["nth"], request["delay_s"])
        end = partial(os.seteuid, NOBODY) if request.get("withdraws") else die
        events = FileEvents(Path(request["run_dir"]), request.get("event"), end)
        code = run_main(main, request["arguments"])
        events.stop()
        if "events" in request:
            Path(request["events"]).write_text(json.dumps(events.seen))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill_in_phase(phase: str, nth: int, delay_s: float) -> None:
    """Kill this process `delay_s` after the loop has entered a phase for the `nth` time, or after the start."""
    if phase == "start":
        threading.Timer(delay_s, die).start()
        return
    enter, left = Peers.progress, [nth]

    def progress(peers: Peers, step: int, now: Phase) -> None:
        enter(peers, step, now)
        left[0] -= now == phase
        if not left[0]:
            threading.Timer(delay_s, die).start()
            left[0] = -1

    Peers.progress = progress  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
