"""What can be wrong with a launch: one clear line each, exit code 2, and no process left waiting for another."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import llmtrain
from tests.conftest import small_config
from tests.distributed.launching import environment, launch, start_ranks

pytestmark = pytest.mark.slow
Config = dict[str, Any]


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Config:
    config = small_config(data, tmp_path / "run")
    config["training"] |= {"max_steps": 2, "eval_every": None}
    return config


def errors(stderr: str) -> list[str]:
    """Our lines among those of the launcher."""
    return [line for line in stderr.splitlines() if line.startswith("llmtrain: error: ")]


@pytest.mark.parametrize(("name", "processes", "settings", "message"), [
    ("cpu-ddp", 3, {}, "global_batch_size 8 is not divisible by micro_batch_size 4 × 3 processes = 12; choose a"),
    ("cpu-zero2", 2, {"micro_batch_size": 8}, "× 2 processes = 16; training.micro_batch_size=4 fits"),
])  # fmt: skip
def test_a_world_size_that_does_not_divide_the_batch(
    config: Config, name: str, processes: int, settings: Config, message: str
) -> None:
    config["training"] |= settings
    done = launch(name, processes, config)
    assert done.returncode != 0 and "[rank0]: Traceback" not in done.stderr
    (line,) = errors(done.stderr)  # once, not once for each process
    assert message in line
    assert not Path(config["run"]["dir"]).exists()


def test_fp8_is_not_for_zero(config: Config) -> None:
    config["training"] |= {"fp8": True, "precision": "bf16"}
    (line,) = errors(launch("cpu-zero2", 1, config).stderr)
    assert "training.fp8 is for one device and DDP" in line


@pytest.mark.parametrize(("setting", "message"), [
    ("gradient_clipping: 5.0", "sets gradient_clipping to 5.0, but optimizer.clip_norm is 1.0"),
    ("gradient_accumulation_steps: 4", "sets gradient_accumulation_steps to 4, but"),
    ("zero_stage: 0", "sets zero_stage to 0"),
    ("offload_optimizer_device: nvme", "sets offload_optimizer to nvme, from which no checkpoint can be made"),
    ("offload_param_device: cpu", "offloads parameters at zero_stage 2; only stage 3 can"),
])  # fmt: skip
def test_a_launch_file_that_contradicts_the_run_config(
    config: Config, tmp_path: Path, setting: str, message: str
) -> None:
    stage = "" if "stage" in setting else "  zero_stage: 2\n"
    (tmp_path / "own.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nnum_machines: 1\n"
        f"num_processes: 1\ndeepspeed_config:\n{stage}  {setting}\n"
    )
    (line,) = errors(launch("own", 1, config, tmp_path).stderr)
    assert message in line


def test_a_config_for_deepspeed_that_contradicts_the_run_config(config: Config, tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", "params": {"lr": 1.0}}}
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    (tmp_path / "own.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nnum_machines: 1\n"
        f"num_processes: 1\ndeepspeed_config:\n  deepspeed_config_file: {tmp_path}/deepspeed.json\n"
    )
    (line,) = errors(launch("own", 1, config, tmp_path).stderr)
    assert "sets DeepSpeed's optimizer, but the run config decides such things" in line


def two_ranks(config: Config, tmp_path: Path, other: Config | None = None, **variables: str) -> list[tuple[int, str]]:
    """Exit code and stderr of two ranks that are started by hand, the second with a config of its own."""
    folders, files = [], []
    for rank, content in enumerate((config, other or config)):
        folders.append(tmp_path / f"host{rank}")
        folders[-1].mkdir(exist_ok=True)
        files.append(folders[-1] / "config.yaml")
        files[-1].write_text(json.dumps(content))
    ranks = start_ranks(files, folders, **variables)
    ended = [rank.communicate(timeout=120) for rank in ranks]
    return [(rank.returncode, stderr) for rank, (_, stderr) in zip(ranks, ended, strict=True)]


def test_ranks_with_unlike_configs_are_named(config: Config, tmp_path: Path) -> None:
    other = copy.deepcopy(config)
    other["optimizer"]["lr"] = 1e-4
    other["schedule"]["min_lr"] = 1e-5
    (first, said), (second, _) = two_ranks(config, tmp_path, other)
    assert first == second == 2
    (line,) = errors(said)
    assert "rank 1 on " in line and "has optimizer.lr=0.0001, rank 0 has 0.003" in line


def test_a_rank_without_the_data_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "host0").mkdir()
    shutil.copytree(config["data"]["path"], tmp_path / "host0" / "data")
    config["data"]["path"] = "data"  # relative to each host's own folder
    (first, said), (second, _) = two_ranks(config, tmp_path)
    assert first == second == 2
    (line,) = errors(said)
    assert "data: not prepared data" in line and "(rank 1 on " in line and "1 of 2 ranks are fine" in line


def test_a_rank_with_other_data_is_named(config: Config, tmp_path: Path) -> None:
    for host in ("host0", "host1"):
        (tmp_path / host).mkdir()
        shutil.copytree(config["data"]["path"], tmp_path / host / "data")
    manifest = tmp_path / "host1" / "data" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["recipe"] = {"input": "another"}
    content["splits"]["train"]["shards"][0]["ids"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    config["data"]["path"] = "data"
    (first, said), (second, _) = two_ranks(config, tmp_path)
    assert first == second == 2
    assert "rank 1 on " in errors(said)[0] and ": data is " in errors(said)[0]


def test_a_run_folder_that_a_host_does_not_see_is_noticed_before_training(config: Config, tmp_path: Path) -> None:
    config["run"]["dir"] = "run"  # relative to each host's own folder
    (first, said), (second, _) = two_ranks(config, tmp_path)
    assert first == second == 2
    assert "choose a run.dir that all hosts share (rank 1 on " in errors(said)[0]


def test_ranks_with_unlike_code_are_warned_of_and_train(config: Config, tmp_path: Path) -> None:
    package = Path(llmtrain.__file__).parent
    (tmp_path / "host1").mkdir()
    shutil.copytree(package, tmp_path / "host1" / "llmtrain", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "host1" / "llmtrain" / "cli.py").open("a") as file:
        file.write("# changed on this host only\n")
    (first, said), (second, _) = two_ranks(config, tmp_path)
    assert first == second == 0
    assert "llmtrain: warning: rank 1 on " in said and ": code is " in said


@pytest.mark.parametrize("name", ["deepspeed", "transformers"])
def test_deepspeed_that_is_missing_is_said(config: Config, tmp_path: Path, name: str) -> None:
    """Or what Accelerate needs for it."""
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    # As on a machine without it: it cannot be imported, and has no version.
    blocked = (
        "import sys; from importlib import metadata; version = metadata.version\n"
        "def of(package):\n"
        f"    if package == '{name}': raise metadata.PackageNotFoundError(package)\n"
        "    return version(package)\n"
        f"metadata.version = of; sys.modules['{name}'] = None"
    )
    program = f"{blocked}\nfrom llmtrain.train import main, run_main; sys.exit(run_main(main))"
    command = [sys.executable, "-c", program, "--config", str(tmp_path / "config.yaml")]
    place = {"ACCELERATE_USE_DEEPSPEED": "true", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**place), check=False, timeout=60)
    assert done.returncode == 2
    assert "asks for DeepSpeed, which is not there" in errors(done.stderr)[0]
    assert name in errors(done.stderr)[0].partition(";")[0]


def test_the_extra_for_deepspeed_brings_what_accelerate_asks_for() -> None:
    needs = [Requirement(need) for need in metadata.requires("llmtrain") or []]
    extra = {need.name for need in needs if need.marker and need.marker.evaluate({"extra": "deepspeed"})}
    assert extra == {"deepspeed", "transformers"}
