"""Checkpoints of several processes: checked, saved and given up together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import committed_steps, step_folder
from llmtrain.data.shards import FileInfo
from tests.conftest import prose, small_config, write_data
from tests.distributed.launching import metrics, start_ranks

pytestmark = pytest.mark.slow
Config = dict[str, Any]


def start(config: Config, folder: Path, **variables: str) -> list[Any]:
    """Start two ranks by hand."""
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return start_ranks([path, path], [folder, folder], **variables)


def ended(ranks: list[Any]) -> list[tuple[int, str]]:
    """Exit code and stderr of each, once all have ended."""
    outputs = [rank.communicate(timeout=200) for rank in ranks]
    return [(rank.returncode, stderr) for rank, (_, stderr) in zip(ranks, outputs, strict=True)]


def add_file(folder: Path, name: str, sha256: str) -> None:
    """Put one more file, of no bytes by its size, into a committed checkpoint's manifest."""
    manifest = fmt.CheckpointManifest.model_validate_json((folder / fmt.MANIFEST).read_text())
    files = (*manifest.files, FileInfo(path=name, bytes=0, sha256=sha256))
    fmt.commit(folder, manifest.model_copy(update={"files": files}))


def test_ranks_check_their_shares_walk_back_obey_a_signal_and_wait_for_a_slow_file_longer_than_the_timeout(
    trained_run: Path, data: Path, tmp_path: Path
) -> None:
    """The newest is damaged in a file that rank 1 reads; the one before has a pipe that is fed for 14 s."""
    import hashlib

    run_dir = Path(shutil.copytree(trained_run, tmp_path / "run", symlinks=True))
    newest, older = (step_folder(run_dir, step) for step in (30, 20))
    damaged = newest / "more.safetensors"  # rank 0 has enough with the other
    damaged.touch()
    add_file(newest, damaged.name, "0" * 64)
    pieces = [b"slow"] * 28
    os.mkfifo(older / "pipe.safetensors")
    add_file(older, "pipe.safetensors", hashlib.sha256(b"".join(pieces)).hexdigest())

    def feed() -> None:
        with (older / "pipe.safetensors").open("wb", buffering=0) as pipe:
            for piece in pieces:
                pipe.write(piece)
                time.sleep(0.5)

    config = small_config(data, run_dir)
    config["health"] = {"timeout_s": 10.0}
    ranks = start(config, tmp_path)
    opened: list[int] = []

    def is_read() -> bool:
        try:
            opened.append(os.open(older / "pipe.safetensors", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads yet
            return False
        return True

    wait_until(is_read, ranks)
    ranks[1].send_signal(signal.SIGTERM)  # while the checkpoint is read
    (code, said), (other_code, other) = ended(ranks)
    assert (code, other_code) == (75, 75), said + other
    assert (said + other).count("stopped by a signal while the checkpoint was read: nothing to save") == 1
    os.close(opened[0])

    threading.Thread(target=feed, daemon=True).start()
    (code, said), (other_code, other) = ended(start(config, tmp_path))
    assert (code, other_code) == (0, 0), said + other
    assert f"{damaged}: content differs from the hash in the manifest (rank 1 on " in said
    assert "going back to an older checkpoint" in said
    assert [record["step"] for record in metrics(run_dir)] == [record["step"] for record in metrics(trained_run)]


def committed(run_dir: Path) -> list[int]:
    return committed_steps(run_dir) if run_dir.exists() else []


def wait_until(condition: Callable[[], bool], ranks: list[Any]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks), [rank.communicate() for rank in ranks]
        time.sleep(0.002)


@pytest.mark.parametrize(("bad_steps", "code", "kept"), [((40,), 0, [80, 120]), ((40, 80), 2, [])])
def test_a_save_that_fails_on_one_rank_is_given_up_on_all_and_twice_in_a_row_ends_all(
    data: Path, tmp_path: Path, bad_steps: tuple[int, ...], code: int, kept: list[int]
) -> None:
    """What rank 1 would call its record is a folder, in which it cannot write."""
    run_dir = tmp_path / "run"
    config = small_config(data, run_dir)
    config["training"] |= {"max_steps": 120, "eval_every": None}
    config |= {"checkpoint": {"save_every": 40}, "logging": {"every": 1000, "plots": False}}
    ranks = start(config, tmp_path)
    wait_until((run_dir / "run.json").exists, ranks)  # written when the folder is put in order
    for step in bad_steps:
        (step_folder(run_dir, step) / ".rank00001.json").mkdir(parents=True)
    began = time.monotonic()
    (rank_0, said), (rank_1, other) = ended(ranks)
    assert time.monotonic() - began < 600, "rank 0 waited for what could not come"
    assert (rank_0, rank_1) == (code, code), said + other
    warnings = [line for line in said.splitlines() if "step 40 failed: Is a directory (rank 1 on" in line]
    assert len(warnings) == 1 and "earlier checkpoints are intact" in warnings[0]
    assert committed(run_dir) == kept
    errors = [line for line in (said + other).splitlines() if line.startswith("llmtrain: error")]
    assert len(errors) == (code != 0)
    assert all("saving step 80 failed" in line and "second save in a row" in line for line in errors)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_numbers_go_on(data: Path, tmp_path: Path) -> None:
    """Between logging steps, during an evaluation, during a slow save: each stop goes on to the same bits."""
    texts = {"train": prose(12_000), "val": prose(120_000, seed=1)}
    long_val = write_data(tmp_path / "data", texts)
    # A slow file system: a checkpoint takes seconds.
    (tmp_path / "slow").mkdir()
    slow = "import os, time\n_fsync = os.fsync\ndef fsync(fd):\n    time.sleep(0.3)\n    _fsync(fd)\nos.fsync = fsync\n"
    (tmp_path / "slow" / "sitecustomize.py").write_text(slow)

    def config_of(name: str) -> Config:
        config = small_config(long_val, tmp_path / name)
        config["training"] |= {"max_steps": 160, "eval_every": 80, "epochs": 100}
        config["checkpoint"] = {"save_every": 60, "keep_last": 50}
        config["logging"] = {"every": 1000, "plots": False, "sample_ledger": True}
        return config

    def stop(rank: int, signal_number: int, when: Callable[[], bool], **variables: str) -> tuple[int, Any]:
        """Signal one rank when the time has come; return the step that both have saved, and its state."""
        ranks = start(config_of("broken"), tmp_path, **variables)
        wait_until(when, ranks)
        ranks[rank].send_signal(signal_number)
        (code, said), (other_code, other) = ended(ranks)
        assert (code, other_code) == (75, 75), said + other
        assert len([line for line in (said + other).splitlines() if "stopped after step" in line]) == 1
        step = committed(broken)[-1]
        assert fmt.CheckpointReader(step_folder(broken, step)).verify() == []
        return step, fmt.CheckpointReader(step_folder(broken, step)).state()

    def last_of_ledger() -> int:
        path = broken / "samples-rank00001.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for code, said in ended(start(config_of("whole"), tmp_path)):
        assert code == 0, said
    first, state = stop(1, signal.SIGUSR1, lambda: last_of_ledger() >= 5)
    assert 5 <= first < 60 and state["unfinished"] is None
    second, state = stop(0, signal.SIGTERM, lambda: last_of_ledger() >= 80)
    assert second == 80 and state["unfinished"]["epoch"] >= 1  # in the evaluation: it took no further step
    slow_path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "slow"), os.environ.get("PYTHONPATH", "")])}
    third, _ = stop(1, signal.SIGINT, (step_folder(broken, 120)).is_dir, **slow_path)
    assert 120 <= third < 160
    assert 120 in committed(broken)
    for code, said in ended(start(config_of("broken"), tmp_path)):
        assert code == 0, said
    keys = ("step", "train_loss", "val_loss", "val_accuracy", "grad_norm", "param_norm", "tokens", "epoch")
    expected = [[record[key] for key in keys] for record in metrics(whole)]
    assert [[record[key] for key in keys] for record in metrics(broken)] == expected
    assert [record["step"] for record in metrics(whole)] == [80, 160]
    for rank in range(2):
        name = f"step-00000160/rank{rank:05d}.safetensors"
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
        ledger = f"samples-rank{rank:05d}.jsonl"
        assert (broken / ledger).read_text() == (whole / ledger).read_text()
