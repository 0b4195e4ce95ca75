"""Real launches: `accelerate launch` with a file of launch/, several processes on this machine, over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
Config = dict[str, Any]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def launch(
    name: str,
    processes: int,
    config: Config,
    folder: Path = LAUNCH,
    program: tuple[str, ...] = ("-m", "llmtrain.train"),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Train in `processes` processes with the launch file NAME.yaml; `variables` are added to the environment."""
    run_dir = Path(config["run"]["dir"])
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    file = run_dir.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    command = launch_command(name, processes, *program, "--config", file, folder=folder)
    place = {"cwd": run_dir.parent, "env": environment(**variables)}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **place)


def launch_command(name: str, processes: int, *what: object, folder: Path = LAUNCH) -> list[str]:
    """How a user starts `what`, a script or a module with its arguments, with the launch file NAME.yaml."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / f"{name}.yaml"),
        "--num_processes", str(processes), "--main_process_port", str(free_port()), *map(str, what),
    ]  # fmt: skip


def start_ranks(
    configs: list[Path], folders: list[Path], entry: tuple[str, ...] = (), **variables: str
) -> list[subprocess.Popen[str]]:
    """Start one process for each rank by hand, as a launcher would, each with a config and in a folder of its own."""
    port = str(free_port())
    ranks = []
    for rank, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        place = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(configs)),
            "LOCAL_WORLD_SIZE": str(len(configs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, *(entry or ("-m", "llmtrain.train")), "--config", str(config)]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, cwd=folder, env=environment(**place, **variables), **output))
    return ranks


def environment(**variables: str) -> dict[str, str]:
    """This one, with a thread for each process, and no GPU even where there are some."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_equal_numbers(run_dir: Path, reference: Path, rel: float, norm_steps: int = 10**9) -> None:
    """Losses of each set within `rel`, and gradient norms in the first `norm_steps` steps; rates and steps the same."""
    ours, theirs = metrics(run_dir), metrics(reference)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for record, expected in zip(ours, theirs, strict=True):
        norms = ("grad_norm", "param_norm") if record["step"] <= norm_steps else ()
        for key in ("train_loss", "val_loss", *norms):
            where = f"{key} at step {record['step']}"
            assert (record[key] is None) == (expected[key] is None), where
            if record[key] is not None:
                assert record[key] == pytest.approx(expected[key], rel=rel), where
        sets, due = ({name: one["loss"] for name, one in of.get("validation", {}).items()} for of in (record, expected))
        assert sets == pytest.approx(due, rel=rel), f"validation at step {record['step']}"
        for key in ("learning_rate", "tokens", "epoch"):
            assert record[key] == expected[key]
