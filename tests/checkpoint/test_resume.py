"""What a launch that goes on from a checkpoint knows of it, and what it holds on to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import llmtrain.train
from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import FINAL, MARKER, committed_steps, pointed, step_folder
from llmtrain.config import make_config
from llmtrain.errors import Stopped, UserError
from llmtrain.optim.schedule import make_schedule
from llmtrain.run import Run
from llmtrain.train import main
from tests.conftest import records, small_config
from tests.faults.test_hostile import rehash
from tests.faulty_steps import faulty
from tests.verified import open_verified


@pytest.fixture
def run_dir(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, whose last checkpoint is that of step 30."""
    return Path(shutil.copytree(trained_run, tmp_path / "run", symlinks=True))


def train(data: Path, run_dir: Path, *arguments: str) -> None:
    config = run_dir.with_suffix(".yaml")
    config.write_text(json.dumps(small_config(data, run_dir)))
    main(["--config", str(config), *arguments])


def test_a_run_that_has_nothing_left_to_do_links_its_last_checkpoint_and_a_branch_writes_its_own(
    data: Path, run_dir: Path, tmp_path: Path
) -> None:
    record = step_folder(run_dir, 30) / "rank00000.json"
    before = record.stat().st_ino
    (run_dir / FINAL).unlink()
    train(data, run_dir)
    assert record.stat().st_ino == before and pointed(run_dir, FINAL) == step_folder(run_dir, 30)
    train(data, tmp_path / "branch", "--resume", str(run_dir))
    assert pointed(tmp_path / "branch", FINAL) == step_folder(tmp_path / "branch", 30)
    assert open_verified(step_folder(tmp_path / "branch", 30)).manifest.step == 30


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what is mapped on Linux only")
def test_once_it_has_begun_a_run_holds_no_file_of_a_checkpoint(
    data: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the one it goes on from nor of the one it goes back to: deleting them must free their room."""
    seen: list[tuple[int, bool]] = []
    conclude = llmtrain.train.conclude

    def concluded(run: Run, *rest: Any) -> None:
        seen.append((run.progress.step, str(run_dir) in Path("/proc/self/maps").read_text()))
        conclude(run, *rest)

    monkeypatch.setattr("llmtrain.train.conclude", concluded)
    monkeypatch.setattr("llmtrain.train.accumulate", faulty(dict.fromkeys((235, 243, 251), "nan loss")))
    train(data, run_dir, "training.max_steps=40", "health.max_skips=3", "health.spike_window=8")
    assert [step for step, _ in seen] == [31, 32, *range(31, 41)]
    assert not any(is_mapped for _, is_mapped in seen)


def test_a_checkpoint_of_another_version_is_refused_and_not_taken_for_damaged(data: Path, run_dir: Path) -> None:
    """Going back would rename it aside and train its steps again."""
    newest = step_folder(run_dir, 30)
    state = json.loads((newest / fmt.STATE).read_text())
    (newest / fmt.STATE).write_text(json.dumps({**state, "something_new": 1}))
    rehash(newest)
    with pytest.raises(UserError, match="its state is of another version of llmtrain"):
        train(data, run_dir, "training.max_steps=40")
    assert committed_steps(run_dir) == [10, 20, 30]
    manifest = json.loads((newest / fmt.MANIFEST).read_text())
    text = json.dumps({**manifest, "version": 2, "llmtrain_version": "9.0"})
    (newest / fmt.MANIFEST).write_text(text)
    (newest / MARKER).write_text(hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(UserError, match=r"format version 2, written by llmtrain 9.0; llmtrain .* reads version 1"):
        train(data, run_dir, "training.max_steps=40")
    assert committed_steps(run_dir) == [10, 20, 30]


def test_the_same_command_goes_on_also_after_a_rollback_to_where_it_began(
    data: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a scheduler that repeats `--resume PATH` would throw away what was trained since, each time."""
    start = step_folder(run_dir, 10)
    begin = json.loads((start / fmt.STATE).read_text())["position"]
    again = ("--resume", str(start), "health.max_skips=3", "health.spike_window=8")
    monkeypatch.setattr("llmtrain.train.accumulate", faulty(dict.fromkeys(range(begin, begin + 24), "nan loss")))
    with pytest.raises(Stopped):
        train(data, run_dir, *again, "training.stop_after=25")
    assert json.loads((step_folder(run_dir, 25) / fmt.STATE).read_text())["guard"]["rollbacks"] == 1
    aside = sorted(run_dir.glob("*.aside-*"))
    train(data, run_dir, *again)
    assert sorted(run_dir.glob("*.aside-*")) == aside and committed_steps(run_dir)[-1] == 30


def test_a_checkpoint_from_before_head_dim_was_a_key_goes_on(data: Path, run_dir: Path) -> None:
    """And the width that it had may not change either."""
    config = step_folder(run_dir, 30) / fmt.CONFIG
    before = config.read_text()
    config.write_text(before.replace("  head_dim: 16\n", ""))
    assert config.read_text() != before
    rehash(config.parent)
    with pytest.raises(UserError, match=r"model.head_dim=16, this run has 8"):
        train(data, run_dir, "training.max_steps=31", "model.head_dim=8")
    train(data, run_dir, "training.max_steps=31")
    assert committed_steps(run_dir)[-1] == 31


def test_a_stop_in_the_middle_of_a_save_does_not_begin_another_that_cannot_be_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process would be killed in it, and whoever looks at its exit code would not start it again."""
    plain = fmt.write_rank

    def write_rank(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)
        plain(*args)

    monkeypatch.setattr("llmtrain.checkpoint.format.write_rank", write_rank)
    with pytest.raises(Stopped, match=r"too little of health.grace_s .* goes on from step 10"):
        train(data, tmp_path / "run", "training.max_steps=100000", "training.eval_every=null", "health.grace_s=1.2")
    assert committed_steps(tmp_path / "run") == [10]


def test_a_save_that_may_not_fit_into_the_grace_is_warned_of_and_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured at the save before; nothing is under way that could be left with."""
    plain, slow_s = fmt.write_rank, [0.8]

    def write_rank(*args: Any) -> None:
        plain(*args)
        if slow_s:
            time.sleep(slow_s.pop())
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("llmtrain.checkpoint.format.write_rank", write_rank)
    overrides = ("training.max_steps=100000", "training.eval_every=null", "checkpoint.async_save=false")
    with pytest.raises(Stopped, match="stopped after step 10 by SIGTERM; saved"):
        train(data, tmp_path / "run", *overrides, "health.grace_s=0.5")
    warning = "of health.grace_s=0.5; what sent SIGTERM may end this process before it has saved"
    assert warning in capsys.readouterr().err
    assert committed_steps(tmp_path / "run") == [10]


def test_another_rate_batch_and_length_are_obeyed_and_said_and_the_samples_go_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = "logging.sample_ledger=true"
    train(data, tmp_path / "whole", ledger, "training.max_steps=20")
    with pytest.raises(Stopped):
        train(data, tmp_path / "run", ledger, "training.stop_after=10")
    capsys.readouterr()
    changed = ("optimizer.lr=0.001", "training.global_batch_size=16", "training.max_steps=15", "logging.every=1")
    train(data, tmp_path / "run", ledger, *changed)
    said = capsys.readouterr().out.splitlines()
    assert {line for line in said if line.startswith("changed since then: ")} == {
        "changed since then: optimizer.lr: 0.003 → 0.001",
        "changed since then: training.global_batch_size: 8 → 16",
        "changed since then: training.max_steps: 30 → 15",
    }

    def ids(name: str) -> list[int]:
        lines = (tmp_path / name / "samples-rank00000.jsonl").read_text().splitlines()
        return [sample for line in lines for sample in json.loads(line)["ids"]]

    assert len(ids("run")) == 10 * 8 + 5 * 16 and ids("run") == ids("whole")
    new = [record for record in records(tmp_path / "run") if record["step"] > 10]
    assert [record["step"] for record in new] == [11, 12, 13, 14, 15]
    schedule = make_schedule(make_config({"schedule": {"warmup_steps": 5}}).schedule, 1e-3, 15)
    assert [record["learning_rate"] for record in new] == [schedule(step) for step in range(11, 16)]
