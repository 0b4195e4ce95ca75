"""Runs that hang end with 5, long before an exchange between ranks times out, and say which rank hangs where."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.format import CheckpointReader
from tests.distributed.launching import environment, metrics, start_ranks

pytestmark = pytest.mark.slow
STALLING = str(Path(__file__).with_name("stalling_train.py"))
HANG_S = 4.0
LONG_S = 150.0  # more than anything here takes on a busy machine, less than the timeout of an exchange
HOST = socket.gethostname()


def write_config(
    config: dict[str, Any],
    folder: Path,
    save_every: int | None = None,
    timeout_s: float = 300.0,
    hang_after_s: float = HANG_S,
    **training: Any,
) -> Path:
    """An endless run with a watchdog that is quick to bite."""
    health = {"timeout_s": timeout_s, "hang_after_s": hang_after_s}
    config["checkpoint"] = {**config["checkpoint"], "save_every": save_every}
    config["training"] = {**config["training"], "max_steps": 10_000_000, "eval_every": None, **training}
    config.update(health=health, logging={"every": 1, "plots": False})
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def two(config_dict: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Start two ranks; whatever becomes of them, they are gone afterwards."""
    ranks: list[subprocess.Popen[str]] = []

    def start(
        *entry: str,
        save_every: int | None = None,
        timeout_s: float = 300.0,
        hang_after_s: float = HANG_S,
        **variables: str,
    ) -> list[subprocess.Popen[str]]:
        path = write_config(config_dict, tmp_path, save_every, timeout_s, hang_after_s)
        variables["LLMTRAIN_EXIT_CODE_FILE"] = str(tmp_path / "exit-code")
        ranks.extend(start_ranks([path, path], [tmp_path, tmp_path], entry, **variables))
        return ranks

    yield start
    for rank in ranks:
        rank.kill()
        rank.communicate()


def wait_for_step(run_dir: Path, step: int, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + LONG_S
    while not (run_dir / "metrics.jsonl").exists() or metrics_so_far(run_dir) < step:
        assert all(rank.poll() is None for rank in ranks), [rank.communicate() for rank in ranks]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def metrics_so_far(run_dir: Path) -> int:
    """How many steps there are records of."""
    return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")


def end_of(rank: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, the line of the error, and all that it said."""
    stdout, stderr = rank.communicate(timeout=LONG_S)
    errors = [line for line in stderr.splitlines() if line.startswith("llmtrain: error: ")]
    assert len(errors) == 1, stderr
    return rank.returncode, errors[0], stdout + stderr


def test_ranks_that_are_all_stopped_and_continued_go_on_and_one_that_stays_stopped_is_named(
    two: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    ranks, run_dir = two(), tmp_path / "run"
    wait_for_step(run_dir, 20, ranks)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(2.5 * HANG_S)
    before = metrics_so_far(run_dir)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGCONT)
    time.sleep(1.5 * HANG_S)
    wait_for_step(run_dir, before + 20, ranks)

    os.kill(ranks[1].pid, signal.SIGSTOP)
    code, error, stderr = end_of(ranks[0])
    assert code == 5, stderr
    assert f"rank 1 on {HOST} (127.0.0.1): its process is stopped or stuck" in error
    assert "it has not moved on for" in error
    assert (tmp_path / "exit-code").read_text() == "5\n"
    stacks = run_dir / "stacks-rank00000.txt"
    assert str(stacks) in stderr
    assert str(stacks.with_name("stacks-rank*.txt")) in error
    assert "watchdog" in stacks.read_text() and "train.py" in stacks.read_text()


def test_a_rank_that_hangs_in_its_data_ends_the_job_and_a_slow_one_is_named_before(
    two: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    ranks, run_dir = two(STALLING, STALL="1 0.2 40"), tmp_path / "run"
    ends = [end_of(rank) for rank in ranks]
    assert [code for code, _, _ in ends] == [5, 5], ends
    (_, waiting, said_by_0), (_, hanging, said_by_1) = ends
    step = metrics_so_far(run_dir) + 1
    assert f"rank 1 on {HOST} hangs at step {step}, data: it has not moved on for" in hanging, said_by_1
    assert f"rank 1 on {HOST} (127.0.0.1)" in waiting, said_by_0
    assert f"at step {step}, data" in waiting
    assert "stuck_in_storage" in (run_dir / "stacks-rank00001.txt").read_text()
    assert str(run_dir / "stacks-rank00001.txt") in said_by_1

    records = metrics(run_dir)
    # Rank 0 may be the later one now and then: it shares two cores with everything else.
    assert sum(record["slowest_rank"] == 1 for record in records) > len(records) / 2
    assert "rank 1 has been the slowest for 10 records: every step waits at least 0." in said_by_0


def test_a_rank_that_hangs_behind_the_loop_in_a_save_is_named_and_the_save_before_is_good(
    two: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    ranks, run_dir = two(STALLING, save_every=4, STALL="0 0 1e9", STALL_SAVE="1 2"), tmp_path / "run"
    (code, waiting, said_by_0), (other_code, hanging, said_by_1) = [end_of(rank) for rank in ranks]
    assert (code, other_code) == (5, 5), said_by_0 + said_by_1
    # The second save, of step 8, is waited for before the third.
    assert f"rank 1 on {HOST} hangs at step 12, writing a checkpoint: it has not moved on for" in hanging, said_by_1
    assert "1 other rank waits for it" in hanging
    assert f"rank 1 on {HOST} (127.0.0.1)" in waiting, said_by_0
    assert "at step 12, writing a checkpoint" in waiting
    assert "stuck_in_storage" in (run_dir / "stacks-rank00001.txt").read_text()
    latest = (run_dir / "latest").resolve()
    assert latest.name == "step-00000004"
    assert CheckpointReader(latest).verify() == []


def test_a_rank_whose_disk_hangs_in_a_save_ends_all_the_same_when_another_is_lost(
    two: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    """What ends in order waits for what writes in the run folder, but not for ever."""
    saves = {"STALL": "0 0 1e9", "STALL_SAVE": "0 2"}
    ranks, run_dir = two(STALLING, save_every=40, timeout_s=12.0, hang_after_s=1000.0, **saves), tmp_path / "run"
    wait_for_step(run_dir, 84, ranks)
    ranks[1].kill()
    code, error, said = end_of(ranks[0])
    assert code == 5, said
    assert f"rank 1 on {HOST} (127.0.0.1): its process is gone" in error
    assert (tmp_path / "exit-code").read_text() == "5\n"
    assert (run_dir / "latest").resolve().name == "step-00000040"


def test_where_one_of_two_hangs_in_its_backward_pass_neither_says_that_it_was_the_network(
    two: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    """The other waits for its gradients in its own, so nothing says which it is but the stacks.

    Whoever looks first asks the other for its stacks, for that one is gone before it looks itself.
    """
    ranks = two(STALLING, STALL="-1 0 0", STALL_BACKWARD="1 20", STALL_WATCHDOG="0 60")
    ends = [end_of(rank) for rank in ranks]
    assert [code for code, _, _ in ends] == [5, 5], ends
    step = metrics_so_far(tmp_path / "run") + 1
    assert any(f"hangs at step {step}, backward: it has not moved on for" in error for _, error, _ in ends), ends
    assert any("; so has the other: one rank hangs inside this phase (run.dir/stacks" in error for _, error, _ in ends)
    stacks = [(tmp_path / f"run/stacks-rank{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert ["stuck_in_storage" in text for text in stacks] == [False, True]


def test_a_rank_that_hangs_before_the_first_step_is_named(
    two: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    """The watchdog has nothing to go by yet; the exchange in which the others wait ends after health.timeout_s."""
    ranks = two(STALLING, timeout_s=15.0, STALL="-1 0 0", STALL_START="1")
    code, error, stderr = end_of(ranks[0])
    assert code == 5, stderr
    assert f"rank 0 on {HOST} cannot go on before the first step: rank 1 on {HOST} (127.0.0.1): is behind, for" in error
    assert ranks[1].poll() is None
    assert not (tmp_path / "run").exists()


def test_one_process_survives_a_slow_evaluation_and_ends_where_one_hangs(
    config_dict: dict[str, Any], tmp_path: Path
) -> None:
    """The first evaluation is longer than the limit, but every batch of it is a sign of life."""
    write_config(config_dict, tmp_path, eval_every=4, eval_batches=24, micro_batch_size=8)
    # 4 steps, 3 batches of validation, 4 steps, a batch, and then for ever.
    done = subprocess.run(
        [sys.executable, STALLING, "--config", "config.yaml"], cwd=tmp_path, env=environment(STALL="0 1.5 13"),
        capture_output=True, text=True, timeout=LONG_S, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    validated = [record["step"] for record in metrics(tmp_path / "run") if record["val_loss"] is not None]
    assert validated == [4]
    assert f"llmtrain: error: rank 0 on {HOST} hangs at step 8, validation data: it has not moved on for" in done.stderr
    assert done.stderr.endswith("the same command goes on from the last checkpoint\n")
    assert "stuck_in_storage" in (tmp_path / "run" / "stacks-rank00000.txt").read_text()
