"""Where the time of some steps goes: a trace of each rank, and a table by the phases that the loop goes through.

While steps are profiled the device is waited for at each change of phase, so that the work of a phase falls into it.
This costs what host and device would otherwise do at the same time; what overlaps within a phase, such as the exchange
of gradients with the backward pass, still does.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llmtrain.config import ProfileSection, RunConfig
from llmtrain.engine import Engine
from llmtrain.health.peers import Peers
from llmtrain.observe.files import replacing

FOLDER = "profile"
_EXCHANGES = ("nccl:", "gloo:", "mpi:", "ucc:")  # how torch.distributed's backends name what they do


@contextmanager
def profiled(config: RunConfig, engine: Engine, peers: Peers, say: Callable[[str], None]) -> Iterator[None]:
    """Profile those steps of the loop inside that `training.profile` names; `say` is told the result.

    Where the loop is left by an error or a signal nothing is written: a lost rank may keep the device waiting for ever,
    and the time from a signal to the end belongs to the checkpoint. One of several processes does not even stop its
    profile: it ends without the interpreter's end, and an exchange may be under way (see `Profiler.moved_on`).
    """
    if config.training.profile is None:
        yield
        return
    profiler = Profiler(config.training.profile, Path(config.run.dir), engine.device, engine.rank, say)
    peers.listener = profiler.moved_on
    try:
        yield
    except BaseException:
        if engine.world_size == 1:
            profiler.discard()  # or the interpreter's end would crash in it
        raise
    else:
        profiler.close()
    finally:
        peers.listener = None


class Profiler:
    """Told of every change of phase (`Peers.listener`), it profiles the steps that it is to."""

    def __init__(
        self, section: ProfileSection, run_dir: Path, device: torch.device, rank: int, say: Callable[[str], None]
    ):
        """`say` is told the table, and where the traces are."""
        self._section, self._folder, self._device, self._rank, self._say = section, run_dir / FOLDER, device, rank, say
        self._profile: profile | None = None
        self._seconds: dict[str, float] = {}
        self._steps, self._has_all = 0, False
        self._told = ""  # the phase
        self._phase, self._since = "", 0.0

    def moved_on(self, step: int, phase: str) -> None:
        """The loop comes to a phase of a step; a step begins with "between steps".

        An exchange that is asked for before the update is answered between steps; that phase is told of once more then,
        and the profile stopped. gloo's threads note the end of an exchange where its beginning was noted: in memory
        that `stop` frees (torch 2.13; two processes that stopped earlier crashed after some thousand times).
        """
        if self._profile and self._has_all:
            self._end()
        is_new_step, self._told = phase == "between steps" and self._told != phase, phase
        if is_new_step:
            if self._profile and self._steps == self._section.steps:
                self._change_to("")
                self._has_all = True
                return
            if not self._profile and step == self._section.start:
                self._begin()
            self._steps += 1
        if self._profile:
            self._change_to(phase)

    def close(self) -> None:
        """The run ends: what was profiled until now is written."""
        if self._profile:
            self._end()

    def discard(self) -> None:
        """The run is left: nothing is written."""
        if self._profile:
            with contextlib.suppress(Exception):  # why the run is left is worth more than what a broken device says
                self._profile.stop()
            self._profile = None

    def _begin(self) -> None:
        self._seconds.clear()
        self._phase, self._steps, self._has_all = "", 0, False
        on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
        self._profile.start()

    def _change_to(self, phase: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def _end(self) -> None:
        assert self._profile is not None
        self._change_to("")
        done, self._profile = self._profile, None
        done.stop()
        self._folder.mkdir(exist_ok=True)
        name = f"rank{self._rank:05d}"
        done.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        exchanges_us = sum(
            event.time_range.elapsed_us()
            for event in done.events()  # type: ignore[no-untyped-call]
            if event.name.startswith(_EXCHANGES)
        )
        ms = {phase: 1000 * seconds / self._steps for phase, seconds in self._seconds.items()}
        exchanges_ms = exchanges_us / 1000 / self._steps
        with replacing(self._folder / f"{name}.json") as file:
            content = {"first_step": self._section.start, "steps": self._steps, "ms_per_step": ms}
            file.write(json.dumps({**content, "exchanges_ms_per_step": exchanges_ms}, indent=1).encode() + b"\n")
        last = self._section.start + self._steps - 1
        self._say(
            f"profile of steps {self._section.start} to {last}; traces: {self._folder}\n{table(ms, exchanges_ms)}"
        )


def table(ms_per_step: Mapping[str, float], exchanges_ms: float) -> str:
    """Milliseconds of a step and shares, by phase, the longest first; exchanges between ranks lie within the phases."""
    total = sum(ms_per_step.values())
    phases = sorted(ms_per_step.items(), key=lambda item: -item[1])
    lines = [f"  {name:<16}{ms:10.2f} ms{100 * ms / total:7.1f} %" for name, ms in phases]
    lines += [f"  {'together':<16}{total:10.2f} ms a step"]
    lines += [f"  {'exchanges':<16}{exchanges_ms:10.2f} ms of these"] if exchanges_ms else []
    return "\n".join(lines)
