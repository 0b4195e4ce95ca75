"""Two real processes: one is killed, both are, one is stopped; the same command goes on to the same losses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llmtrain.checkpoint.folders import committed_steps, step_folder
from llmtrain.verify import main as verify
from tests.conftest import Call
from tests.distributed.launching import environment, launch_command
from tests.faults.conftest import (
    ROOT,
    Config,
    Launcher,
    assert_two_as_undisturbed,
    config_of,
    last_commit,
    numbers,
    two_ranks,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FLOAT32 = 1e-5
PROGRAM = "tests.faults.small_files"
HANGS = "tests.faults.hanging_save"
LONG = bool(os.environ.get("LLMTRAIN_LONG_TESTS"))


def two_processes(data: Path, run_dir: Path) -> Config:
    """A run that lasts long enough to be met in the middle."""
    config = config_of(data, run_dir, async_save=True, save_every=5, keep_last=2)
    config["training"] |= {"max_steps": 200, "eval_every": 50, "sample_every": None}
    config["health"] = {"timeout_s": 8}
    return config


def start(name: str, config: Config, *program: object, **variables: str) -> subprocess.Popen[str]:
    """Launch two ranks in a session of their own, as a terminal would; what they say is beside the run folder."""
    file = Path(config["run"]["dir"]).with_suffix(".json")
    file.write_text(json.dumps(config))
    command = launch_command(name, 2, "-m", *(program or (PROGRAM,)), "--config", file)
    with file.with_suffix(".out").open("w") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=out, text=True, cwd=ROOT, env=environment(**variables), start_new_session=True
        )


def ranks_of(launcher: subprocess.Popen[str], program: str = PROGRAM) -> list[int]:
    """The processes that train, rank 0 first."""
    found = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper of the launcher's that ended just now
            rank = child.environ().get("RANK") if program in child.cmdline() else None
            if rank is not None:
                found[int(rank)] = child.pid
    return [found[rank] for rank in sorted(found)]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_one_killed_one_stopped_all_killed_in_turn(launcher: Launcher, call: Call, data: Path, tmp_path: Path) -> None:
    """Under ZeRO-3 and DDP by turns, at moments that differ from machine to machine; it ends in one process."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert launcher.train(two_processes(data, whole)).code == 0
    config = two_processes(data, run_dir)
    for name, blow in (("cpu-zero3", "one killed"), ("cpu-ddp", "one stopped"), ("cpu-ddp", "all killed")):
        before = last_commit(run_dir)
        process = start(name, config)
        wait_for(lambda: max(committed_steps(run_dir), default=0) > before, process)  # noqa: B023
        ranks = ranks_of(process)
        assert len(ranks) == 2
        if blow == "all killed":
            for pid in (process.pid, *ranks):
                os.kill(pid, signal.SIGKILL)
        else:
            os.kill(ranks[1], signal.SIGKILL if blow == "one killed" else signal.SIGSTOP)
        assert process.wait(200) != 0, blow
        for pid in ranks:  # nobody is left behind to write into what the next launch does
            wait_for_end(pid)
        said = run_dir.with_suffix(".out").read_text()
        if blow == "one stopped":
            assert "rank 1" in said and "stopped or stuck" in said, said[-3000:]
        assert last_commit(run_dir) > before
    assert any((step_folder(run_dir, step) / "rank00001.safetensors").exists() for step in committed_steps(run_dir))
    newest = step_folder(run_dir, last_commit(run_dir))
    (newest / "rank00001.safetensors").unlink()
    assert f"{newest}/rank00001.safetensors: cannot be read" in call(verify, run_dir)[1]
    ended = launcher.train(config)
    assert ended.code == 0 and f"{newest}/rank00001.safetensors: cannot be read" in ended.err
    ours, theirs = numbers(run_dir), numbers(whole)
    assert [record["step"] for record in ours] == list(range(1, 201))
    for record, expected in zip(ours, theirs, strict=True):
        assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=FLOAT32), record["step"]
        assert record["val_loss"] == (expected["val_loss"] and pytest.approx(expected["val_loss"], rel=FLOAT32))
    assert samples(run_dir) == samples(whole)


def samples(run_dir: Path) -> list[tuple[int, list[int]]]:
    """What was trained on at each step, over all processes."""
    steps: dict[int, list[int]] = {}
    for path in run_dir.glob("samples-rank*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], []).extend(entry["ids"])
    return sorted((step, sorted(ids)) for step, ids in steps.items())


def wait_for_end(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(60)


@pytest.mark.parametrize("to", ["the ranks", "the launcher"] if LONG else ["the ranks"])
def test_a_second_ctrl_c_while_the_first_waits_for_a_save(
    launcher: Launcher, data: Path, tmp_path: Path, undisturbed_two: Path, to: str
) -> None:
    """It ends ranks at once. The launcher (of torch) hands only the first on, and kills the ranks some time later."""
    config = two_ranks(data, tmp_path / "run")
    pipe, code, said = tmp_path / "pipe", tmp_path / "code", tmp_path / "run.out"
    os.mkfifo(pipe)
    variables = {"LLMTRAIN_EXIT_CODE_FILE": str(code), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
    process = start("cpu-ddp", config, HANGS, pipe, **variables)
    wait_for(lambda: said.read_text().count("hangs\n") == 2, process)
    ranks = ranks_of(process, HANGS)
    assert len(ranks) == 2
    if to == "the ranks":
        for word in ("heard\n", "llmtrain: interrupted\n"):
            for pid in ranks:
                os.kill(pid, signal.SIGINT)
            wait_for(lambda: said.read_text().count(word) == 2, process)  # noqa: B023
        assert process.wait(200) != 0 and code.read_text() == "130\n"
    else:
        os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda: said.read_text().count("heard\n") == 2, process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(200) != 0
    for pid in ranks:
        wait_for_end(pid)
    assert last_commit(tmp_path / "run") == 4
    ended = launcher.train_ranks(2, config)
    assert [one.code for one in ended] == [0, 0] and "after step 4\n" in ended[0].out, ended
    assert_two_as_undisturbed(tmp_path / "run", undisturbed_two)
