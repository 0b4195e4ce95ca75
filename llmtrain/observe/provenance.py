"""`run.json`: what produced a run, so that a number can be traced to code, machine and data."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmtrain import __version__
from llmtrain.data.sources import TrainingData
from llmtrain.errors import DivergedError, LlmtrainError, PeerLostError, Stopped
from llmtrain.observe.files import replacing
from llmtrain.packages import package_versions

_STARTED = "%Y-%m-%dT%H:%M:%S%z"
_ENDINGS: dict[type[BaseException], str] = {
    Stopped: "stopped", DivergedError: "diverged", PeerLostError: "peer lost", LlmtrainError: "failed",
    KeyboardInterrupt: "interrupted", BaseException: "crashed",
}  # fmt: skip


def provenance(
    data: TrainingData, device: torch.device, world_size: int, step: int, total_steps: int
) -> dict[str, Any]:
    """Versions, git commit, hardware, launch, fingerprints; never the environment, which may hold secrets.

    Args:
        data: of the run.
        device: of this process.
        world_size: of the launch.
        step: after which the launch begins.
        total_steps: at which the run will be done.
    """
    git = _begin_git_status()  # it runs while the rest is looked up
    return {
        "started": time.strftime(_STARTED),
        "llmtrain": __version__,
        "python": platform.python_version(),
        "packages": package_versions(),
        "command": sys.argv,
        "hardware": {
            "host": platform.node(),
            "system": platform.platform(),
            "cpu_count": os.cpu_count(),
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "cuda": torch.version.cuda,
        },
        "launch": {
            "world_size": world_size,
            "threads": torch.get_num_threads(),
            "after_step": step,
            "total_steps": total_steps,
        },
        "data": {"path": data.where, "fingerprint": data.fingerprint()},
        "tokenizer": {"kind": data.tokenizer.kind, "sha256": data.tokenizer.sha256},
        "git_commit": _git_commit(git),
    }


def append_launch(path: Path, launch: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Add this launch to `run.json`, `{"launches": [first, …, this]}`; one that cannot be read is set aside."""
    launches: list[dict[str, Any]] = []
    if path.exists():
        try:
            launches = list(json.loads(path.read_text(encoding="utf-8"))["launches"])
        except (ValueError, TypeError, KeyError) as error:
            aside = path.with_suffix(".unreadable.json")
            warn(f"{path}: cannot be read ({error}); renamed to {aside.name}, a new one begins")
            path.replace(aside)
    with replacing(path, durable=True) as file:
        file.write(json.dumps({"launches": [*launches, launch]}, indent=1).encode())


def ending(error: BaseException | None) -> dict[str, Any]:
    """How a launch ends and why, for `files.note_end`; `error` is what ends its loop, None: it is done."""
    how = "done" if error is None else next(how for kind, how in _ENDINGS.items() if isinstance(error, kind))
    return {"time": time.time(), "how": how, "why": str(error) if isinstance(error, LlmtrainError) else None}


def _begin_git_status() -> subprocess.Popen[str] | None:
    """Ask git about the checkout that this code runs from, if it does."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "status", "--porcelain=v2", "--branch"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None  # no git here: the field stays empty


def _git_commit(status: subprocess.Popen[str] | None) -> str | None:
    """The commit, with `+changes` where the checkout differs from it."""
    if status is None:
        return None
    lines = status.communicate()[0].splitlines()
    commits = [line.split()[2] for line in lines if line.startswith("# branch.oid ")]
    if status.returncode or not commits or commits[0] == "(initial)":
        return None
    return commits[0] + ("+changes" if any(not line.startswith("#") for line in lines) else "")
