"""The doctor in several processes: what they can do together is measured, and what is wrong on one of them is named."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import small_config
from tests.distributed.launching import environment, launch_command


def examine(
    launch: str, processes: int, config: dict[str, Any], folder: Path, *overrides: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, str]]]:
    """Run the doctor so; return the findings by name, the last of each."""
    (folder / "config.yaml").write_text(json.dumps(config))
    program = ("-m", "llmtrain.doctor", "--config", folder / "config.yaml", "--json", *overrides)
    place = {"cwd": folder, "env": environment(LLMTRAIN_EXIT_CODE_FILE=str(folder / "code"))}
    done = subprocess.run(
        launch_command(launch, processes, *program), capture_output=True, text=True, timeout=200, check=False, **place
    )
    reports = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 1, done.stdout + done.stderr[-3000:]
    return done, {finding["name"]: finding for finding in json.loads(reports[0])["findings"]}


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "processes"), [("cpu-ddp", 2), ("cpu-zero3", 3)])
def test_a_healthy_cluster_is_measured_and_trains(launch: str, processes: int, data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run")
    config["training"] |= {"micro_batch_size": 4, "global_batch_size": 4 * processes}
    done, found = examine(launch, processes, config, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert found["ranks"]["detail"].startswith(f"{processes} on 1 host")
    for kind in ("all-reduce", "all-gather"):
        assert float(found[kind]["detail"].split()[0]) > 0
    assert ("links" in found) == (processes > 2)
    for name in ("python", "config", "targets", "first loss", "gradients", "updates", "disk speed"):
        assert found[name]["status"] == "ok", found[name]
    assert found["gradients"]["detail"].endswith("at first")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_is_wrong_fails_on_all_ranks_at_once(data: Path, tmp_path: Path) -> None:
    done, found = examine("cpu-ddp", 2, small_config(data, tmp_path / "run"), tmp_path, "training.micro_batch_size=8")
    assert done.returncode == 1 and (tmp_path / "code").read_text() == "2\n"
    assert "training.micro_batch_size=4 fits" in found["config"]["detail"]
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("llmtrain:")]
    assert said.startswith("llmtrain: error: 1 of ")
