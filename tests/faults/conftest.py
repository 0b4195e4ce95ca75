"""Launches that are killed, cheap enough for hundreds, and the run that nothing disturbed to compare them with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.folders import committed_steps, step_folder
from tests.conftest import records, small_config
from tests.distributed.launching import free_port
from tests.verified import open_verified

Config = dict[str, Any]
STEPS = 8
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a launch ended."""

    code: int  # negative: by this signal
    out: str
    err: str


class Launcher:
    """Trains in processes forked from one that has imported everything."""

    def __init__(self, scratch: Path):
        self._scratch = scratch
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self._server.stdout and self._server.stdout.readline() == "ready\n"

    def train(self, config: Config, *arguments: str, **request: Any) -> Ended:
        """Train to the end, or to the moment of a kill: `event=n`, `phase=…` or `call=…`, with `nth` and `delay_s`."""
        [code] = self._ask(config, arguments, request)
        return Ended(code, *(file.read_text() for file in self._said))

    def train_ranks(self, ranks: int, config: Config, *arguments: str, **request: Any) -> list[Ended]:
        """The same in several processes, of which one, the `victim`, meets with it."""
        codes = self._ask(config, arguments, {**request, "ranks": ranks, "port": free_port()})
        said = [[Path(f"{file}.{rank}").read_text() for file in self._said] for rank in range(ranks)]
        return [Ended(code, *both) for code, both in zip(codes, said, strict=True)]

    @property
    def _said(self) -> tuple[Path, Path]:
        return self._scratch / "out", self._scratch / "err"

    def _ask(self, config: Config, arguments: tuple[str, ...], request: dict[str, Any]) -> list[int]:
        assert self._server.stdin and self._server.stdout
        file, (out, err) = self._scratch / "config.yaml", self._said
        file.write_text(json.dumps(config))
        request |= {
            "arguments": ["--config", str(file), *arguments], "run_dir": config["run"]["dir"],
            "stdout": str(out), "stderr": str(err),
        }  # fmt: skip
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        codes: list[int] = json.loads(self._server.stdout.readline())["codes"]
        return codes

    def events(self, config: Config, *arguments: str) -> list[str]:
        """All that a whole launch does to its run folder, in order."""
        file = self._scratch / "events"
        ended = self.train(config, *arguments, events=str(file))
        assert ended.code == 0, ended.err
        events: list[str] = json.loads(file.read_text())
        return events

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin
        self._server.stdin.close()
        assert self._server.wait(60) == 0


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """One for all tests."""
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


def config_of(data: Path, run_dir: Path, **checkpoint: Any) -> Config:
    """Eight steps with all that a run writes: a checkpoint every second step, one kept beside the best, every file."""
    config = small_config(data, run_dir)
    config["model"] = {"dim": 8, "layers": 1, "heads": 1}
    config["training"] |= {
        "max_steps": STEPS, "eval_every": 4, "eval_batches": 1, "sample_every": 3, "sample_tokens": 2,
        "sample_prompts": ["The"], "micro_batch_size": 4, "global_batch_size": 8,
    }  # fmt: skip
    config["checkpoint"] = {"save_every": 2, "keep_last": 1, "async_save": False, **checkpoint}
    config["logging"] |= {"every": 1, "sample_ledger": True}
    return config


@pytest.fixture(scope="session")
def undisturbed(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = launcher.train(config_of(data, run_dir))
    assert ended.code == 0, ended.err
    return run_dir


@pytest.fixture(scope="session")
def begun(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run after step 4, to be copied."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    assert launcher.train(config_of(data, run_dir), "training.stop_after=4").code == 75
    return run_dir


def two_ranks(data: Path, run_dir: Path, **checkpoint: Any) -> Config:
    """The same for two ranks, which wait for a lost one for a while only."""
    config = config_of(data, run_dir, **{"async_save": True, **checkpoint})
    config["training"] |= {"micro_batch_size": 2}
    config["health"] = {"timeout_s": 20}
    return config


@pytest.fixture(scope="session")
def undisturbed_two(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of two ranks that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    assert [ended.code for ended in launcher.train_ranks(2, two_ranks(data, run_dir))] == [0, 0]
    return run_dir


def copied(begun: Path, run_dir: Path) -> Path:
    """A copy of a run folder in the place of another."""
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(begun, run_dir, symlinks=True)
    return run_dir


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """All records without what depends on the clock."""
    clocked = {
        "tokens_per_sec", "step_time_s", "data_time_s", "mfu", "memory_gb", "time", "step_time_spread_s",
        "slowest_rank",
    }  # fmt: skip
    return [{k: v for k, v in record.items() if k not in clocked} for record in records(run_dir)]


def last_commit(run_dir: Path) -> int:
    """The newest checkpoint that exists, 0 if there is none; every one that exists must be whole."""
    steps = committed_steps(run_dir)
    for step in steps:
        open_verified(step_folder(run_dir, step))
    return max(steps, default=0)


def assert_as_undisturbed(run_dir: Path, undisturbed: Path) -> None:
    """The same files, numbers, samples, checkpoints and links, bit for bit; nothing is left over."""
    assert contents(run_dir) == contents(undisturbed)
    assert numbers(run_dir) == numbers(undisturbed)
    for name in ("training_metrics.json", "samples.jsonl", "samples-rank00000.jsonl"):
        assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes(), name


def assert_two_as_undisturbed(run_dir: Path, whole: Path) -> None:
    """The same checkpoints, numbers and samples, bit for bit; stacks that a watchdog wrote may lie there."""
    assert {name: what for name, what in contents(run_dir).items() if "stacks" not in name} == contents(whole)
    assert numbers(run_dir) == numbers(whole)
    for name in ("training_metrics.json", "samples.jsonl", "samples-rank00000.jsonl", "samples-rank00001.jsonl"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name


def contents(run_dir: Path) -> dict[str, Any]:
    """Every name in the folder; where links lead; the tensors' bytes."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found
