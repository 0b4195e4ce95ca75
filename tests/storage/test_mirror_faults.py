"""What goes wrong around the copy on a store, and must cost neither the run nor the copy."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import llmtrain.run
import llmtrain.train
from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import committed_steps, step_folder
from llmtrain.checkpoint.remote import remote_steps
from llmtrain.storage.remote import Remote
from llmtrain.train import main as train
from tests.conftest import Call
from tests.faulty_steps import faulty
from tests.storage.test_mirror import written

# Of 8 samples a step: steps 13, 16 and 19 are skipped, and the run goes back to step 12.
_BAD = {96: "nan loss", 120: "nan gradient", 144: "large loss"}


def diverging(config_dict: dict[str, Any], folder: Path, url: str) -> Path:
    return written(
        config_dict, folder, training={"eval_every": None}, logging={"every": 1},
        checkpoint={"save_every": 2, "keep_last": 9, "remote": url}, health={"spike_window": 8, "max_skips": 3},
    )  # fmt: skip


def markers(folder: Path, steps: list[int]) -> dict[int, bytes]:
    return {step: (step_folder(folder, step) / fmt.MARKER).read_bytes() for step in steps}


def steps_there(store: Path) -> list[int]:
    return remote_steps(Remote(f"file://{store}").sizes())


def test_what_a_run_goes_back_from_is_not_uploaded_once_more(
    config_dict: dict[str, Any], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, store = tmp_path / "run", tmp_path / "store"
    config = diverging({**config_dict, "health": {}}, tmp_path, f"file://{store}")
    plain_close = llmtrain.run.Observer.close

    def slow_close(observer: llmtrain.run.Observer, outcome: str, draws: bool = True) -> None:
        if outcome.startswith("rolled back"):  # curves are drawn and W&B is waited for
            time.sleep(1.5)
        plain_close(observer, outcome, draws)

    monkeypatch.setattr(llmtrain.run.Observer, "close", slow_close)
    monkeypatch.setattr(llmtrain.train, "accumulate", faulty(_BAD))
    code, out, err = call(train, "--config", config, "training.stop_after=20")
    assert code == 75 and "going back to" in out + err, err
    here = committed_steps(run_dir)
    assert here[-3:] == [16, 18, 20] and markers(store, steps_there(store)) == markers(run_dir, here)


def test_a_store_that_is_lost_when_a_run_goes_back_is_right_again_after_the_next_launch(
    config_dict: dict[str, Any], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, store = tmp_path / "run", tmp_path / "store"
    config = diverging({**config_dict, "health": {}}, tmp_path, f"file://{store}")
    plain_back = llmtrain.run.Run._roll_back

    def lose_store(run: llmtrain.run.Run, *arguments: Any) -> None:
        run.mirror.wait()
        store.rename(tmp_path / "lost")
        store.write_text("no folder can be made here")
        plain_back(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(llmtrain.run.Run, "_roll_back", lose_store)
        patch.setattr(llmtrain.train, "accumulate", faulty(_BAD))
        code, _, err = call(train, "--config", config, "training.stop_after=20")
    assert code == 75 and "not uploaded" in err, err
    store.unlink()
    shutil.move(tmp_path / "lost", store)
    left = markers(store, steps_there(store))
    assert left[18] != markers(run_dir, [18])[18]
    code, _, err = call(train, "--config", config, "training.stop_after=21")
    assert code == 75 and f"{store}/step-00000018: " in err, err
    assert markers(store, steps_there(store)) == markers(run_dir, committed_steps(run_dir))
    aside = {path.name[5:13]: (path / fmt.MARKER).read_bytes() for path in store.glob("step-*.aside-*")}
    assert aside == {f"{step:08d}": left[step] for step in (14, 16, 18)}, "renamed, not lost"
