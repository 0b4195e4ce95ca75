"""Two hosts, one cable: they meet and train; when the cable is cut or a process dies, every rank ends and says who."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.checkpoint.folders import committed_steps, step_folder
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.errors import Stopped
from llmtrain.train import main
from tests.conftest import is_one_clear_line
from tests.distributed.hosts import Host, HostsRefusedError, TwoHosts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PORT = 29500
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
START_S = 120.0  # generous: a loaded machine imports torch slowly


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    if os.geteuid():
        pytest.skip("network namespaces take root")
    try:
        entered = TwoHosts().__enter__()
    except HostsRefusedError as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield entered
    entered.__exit__()


class Launch:
    """The same command on both hosts."""

    def __init__(
        self, hosts: TwoHosts, config: dict[str, Any], folder: Path, *, processes: int = 2, file: str = "cpu-ddp"
    ):
        self.hosts, self.run_dir = hosts, Path(config["run"]["dir"])
        self.logs = {host.name: folder / f"{host.name}.log" for host in (hosts.alpha, hosts.beta)}
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        self.agents = {}
        # Left to itself accelerate would start DeepSpeed's own launcher, which wants pdsh and ssh.
        launcher = ["--deepspeed_multinode_launcher", "standard"] if "zero" in file else []
        for machine_rank, host in enumerate((hosts.alpha, hosts.beta)):
            command = [
                str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
                str(ROOT / "launch" / f"{file}.yaml"), "--num_machines", "2", "--num_processes", str(processes),
                "--machine_rank", str(machine_rank), "--main_process_ip", hosts.alpha.name,
                "--main_process_port", str(PORT), *launcher, "-m", "llmtrain.train", "--config", str(path),
            ]  # fmt: skip
            self.agents[host.name] = host.start(command, self.logs[host.name], ENVIRONMENT)

    def wait_for_a_checkpoint(self) -> None:
        deadline = time.monotonic() + START_S
        while not (self.run_dir / "latest").exists():
            assert time.monotonic() < deadline, self.text()
            assert all(agent.poll() is None for agent in self.agents.values()), self.text()
            time.sleep(0.05)

    def text(self, host: str | None = None) -> str:
        return "\n".join(log.read_text(errors="replace") for name, log in self.logs.items() if host in (name, None))

    def ended_after_s(self, within_s: float) -> float:
        """Wait until every launcher has ended and nothing of them is left; return how long that took."""
        began = time.monotonic()
        for agent in self.agents.values():
            try:
                agent.wait(within_s - (time.monotonic() - began))
            except subprocess.TimeoutExpired:
                pytest.fail(f"still there {within_s} s later:\n{self.text()}")
        seconds = time.monotonic() - began
        for host in (self.hosts.alpha, self.hosts.beta):
            assert host.processes() == {}
        return seconds

    def errors(self, host: str) -> list[str]:
        """What its ranks said at their end; none of them left a traceback."""
        assert not re.search(r"^\[rank\d+\]: Traceback", self.text(host), re.MULTILINE), self.text(host)
        return re.findall(r"^llmtrain: error: .*$", self.text(host), re.MULTILINE)


def endless(config: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    training = {**config["training"], "max_steps": 10_000_000, "eval_every": None}
    return {**config, "training": training, "checkpoint": {"save_every": 20}, "health": {"timeout_s": timeout_s}}


def every_checkpoint_is_whole(run_dir: Path) -> bool:
    steps = committed_steps(run_dir)
    return bool(steps) and all(CheckpointReader(step_folder(run_dir, step)).verify() == [] for step in steps)


@pytest.mark.parametrize(("cut", "file"), [(TwoHosts.pull_cable, "cpu-zero2"), (TwoHosts.lose_frames, "cpu-zero3")])
def test_a_cut_link_ends_every_rank_within_the_timeout_with_the_peer_named(
    hosts: TwoHosts, config_dict: dict[str, Any], tmp_path: Path, cut: Any, file: str
) -> None:
    timeout_s = 8.0
    launch = Launch(hosts, endless(config_dict, timeout_s), tmp_path, file=file)
    launch.wait_for_a_checkpoint()
    cut(hosts)
    # Half a minute more for what follows the timeout: asking the peers, and the launchers' own end.
    assert launch.ended_after_s(timeout_s + 30) > timeout_s / 2
    for rank, host, peer in ((0, hosts.alpha, hosts.beta), (1, hosts.beta, hosts.alpha)):
        [error] = launch.errors(host.name)
        assert f"rank {rank} on {host.name} cannot go on at step " in error
        assert f"rank {1 - rank} on {peer.name} ({peer.address}): its host or the link to it is down" in error
        assert re.search(r"exitcode +: 5 ", launch.text(host.name))
    assert every_checkpoint_is_whole(launch.run_dir)
    step = committed_steps(launch.run_dir)[-1]
    with pytest.raises(Stopped, match=f"stopped after step {step + 1}"):
        main(["--config", str(tmp_path / "config.yaml"), f"training.stop_after={step + 1}"])


def test_a_killed_process_ends_the_others_at_once_and_all_name_the_first_cause(
    hosts: TwoHosts, config_dict: dict[str, Any], tmp_path: Path
) -> None:
    config = endless(config_dict, timeout_s=300)
    config["training"].update(micro_batch_size=2)
    launch = Launch(hosts, config, tmp_path, processes=4)
    launch.wait_for_a_checkpoint()
    os.kill(hosts.beta.trainers()[-1], signal.SIGKILL)
    launch.ended_after_s(60)
    errors = [*launch.errors("alpha"), *launch.errors("beta")]
    assert [int(error.split("error: rank ")[1].split()[0]) for error in sorted(errors)] == [0, 1, 2], launch.text()
    named = {tuple(re.findall(r"(rank \d) on \w+ \([0-9.]+\)", error)) for error in errors}
    assert len(named) == 1, errors
    assert all("on beta (10.77.0.2): its process is gone" in error for error in errors)
    assert every_checkpoint_is_whole(launch.run_dir)


def test_a_stopped_process_is_told_from_a_lost_host(
    hosts: TwoHosts, config_dict: dict[str, Any], tmp_path: Path
) -> None:
    launch = Launch(hosts, endless(config_dict, timeout_s=6), tmp_path, file="cpu-zero2")
    launch.wait_for_a_checkpoint()
    [trainer] = hosts.beta.trainers()
    os.kill(trainer, signal.SIGSTOP)
    launch.agents["alpha"].wait(40)
    [error] = launch.errors("alpha")
    assert "rank 1 on beta (10.77.0.2): its process is stopped or stuck" in error
    os.kill(trainer, signal.SIGCONT)
    launch.ended_after_s(40)
    [error] = launch.errors("beta")
    assert "rank 0 on alpha (10.77.0.1): its process is gone" in error


def by_hand(host: Host, folder: Path, name: str, config: dict[str, Any], **variables: str) -> tuple[Any, Path]:
    """One rank of two, started without a launcher."""
    path, log = folder / f"{name}.yaml", folder / f"{name}.log"
    path.write_text(yaml.safe_dump({**config, "health": {"timeout_s": 4.0}}))
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": str(PORT)}
    command = [sys.executable, "-m", "llmtrain.train", "--config", str(path)]
    return host.start(command, log, {**ENVIRONMENT, **place, **variables}), log


def test_processes_that_cannot_meet_say_so_in_one_line_within_the_timeout(
    hosts: TwoHosts, config_dict: dict[str, Any], tmp_path: Path
) -> None:
    started = {
        "no rendezvous at 10.255.255.1:29500 within 4 s (Network is unreachable)":
            by_hand(hosts.beta, tmp_path, "nowhere", config_dict, RANK="1", MASTER_ADDR="10.255.255.1"),
        "no rendezvous at 10.77.0.9:29500 within 4 s (":
            by_hand(hosts.beta, tmp_path, "nobody", config_dict, RANK="1", MASTER_ADDR="10.77.0.9"),
        "no rendezvous at alpha:29501 within 4 s (Connection refused)":
            by_hand(hosts.beta, tmp_path, "port", config_dict, RANK="1", MASTER_ADDR="alpha", MASTER_PORT="29501"),
        "no rendezvous at gamma:29500 within 4 s (":
            by_hand(hosts.beta, tmp_path, "name", config_dict, RANK="1", MASTER_ADDR="gamma"),
        "only 1 of 2 processes came to alpha:29500 within 4 s":
            by_hand(hosts.alpha, tmp_path, "alone", config_dict, RANK="0", MASTER_ADDR="alpha"),
    }  # fmt: skip
    for message, (process, log) in started.items():
        assert process.wait(START_S) == 2, log.read_text()
        # torch warns, of itself, where an address has no name.
        said = [line for line in log.read_text().splitlines(keepends=True) if not line.startswith("[W")]
        assert message in said[-1]
        assert is_one_clear_line("".join(said)), log.read_text()
