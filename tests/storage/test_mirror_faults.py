"""What goes wrong around the copy on a store, and must cost neither the run nor the copy."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

import llmtrain.run
import llmtrain.train
from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import committed_steps, step_folder
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.mirror import Mirror
from llmtrain.checkpoint.remote import remote_steps
from llmtrain.checkpoint.store import clear_way
from llmtrain.config import CheckpointSection
from llmtrain.errors import UserError
from llmtrain.storage.remote import Remote, RemoteError, in_parallel
from llmtrain.train import main as train
from tests.conftest import Call, is_one_clear_line
from tests.faulty_steps import faulty
from tests.storage.conftest import Bucket, Server, make_bucket
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

    def slow_close(observer: llmtrain.run.Observer, outcome: str, *arguments: Any) -> None:
        if outcome.startswith("rolled back"):  # curves are drawn and W&B is waited for
            time.sleep(1.5)
        plain_close(observer, outcome, *arguments)

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
        run.store.join()
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


def test_a_store_that_does_not_answer_at_a_relaunch_costs_a_warning_and_is_up_to_date_again_later(
    config_dict: dict[str, Any], bucket: Bucket, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    checkpoint = {"save_every": 10, "keep_last": 9, "remote": f"{bucket.url}/run"}
    config = written(config_dict, tmp_path, checkpoint=checkpoint, training={"eval_every": None})
    assert call(train, "--config", config, "training.stop_after=22")[0] == 75
    for step in (20, 22):
        shutil.move(step_folder(run_dir, step), tmp_path / f"lost-{step}")  # so the store is ahead of this disk
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        code, out, err = call(train, "--config", config, "training.stop_after=12")
        assert code == 75 and "after step 10" in out + err, err
        assert "Could not connect" in err and f"going on with what is in {run_dir}" in err and "Traceback" not in err
        shutil.move(run_dir, tmp_path / "elsewhere")
        code, _, err = call(train, "--config", config)
        assert code == 2 and is_one_clear_line(err), "with nothing here there is nothing to go on from"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.move(tmp_path / "elsewhere", run_dir)
    code, _, err = call(train, "--config", config, "training.stop_after=24")
    assert code == 75 and f"fetched {bucket.url}/run/step-00000022" in err, err
    assert bucket.steps("run")[-2:] == [22, 24] and 12 in bucket.steps("run")


def test_what_is_later_on_a_store_that_was_lost_at_the_start_gives_way_when_it_answers(
    trained_run: Path, s3_environment: Callable[[Server], None], tmp_path: Path
) -> None:
    run_dir, told = tmp_path / "run", list[str]()
    shutil.copytree(trained_run, run_dir, symlinks=True)
    server = Server()
    bucket = make_bucket(server, s3_environment)
    remote = Remote(f"{bucket.url}/run")
    server.stop()
    try:
        for step in (20, 30):
            shutil.rmtree(step_folder(run_dir, step))
        mirror = Mirror(remote, run_dir, CheckpointSection(), 0, 60)
        mirror.check_writable(told.append)
        mirror.clear_way(10, told.append)
        mirror.wait()
        assert len(told) == 1 and "going on with" in told[0]
        assert "not uploaded" in "".join(mirror.news())
        server = Server(server.port)
        bucket = make_bucket(server, s3_environment, bucket.name)
        for file in trained_run.glob("step-*/**/*"):
            if file.is_file():
                remote.upload(file, str(file.relative_to(trained_run)))
        mirror.saved(run_dir)
        mirror.wait()
        assert bucket.steps("run") == [10] and "can be written again" in mirror.news()[-1]
    finally:
        server.stop()


def test_the_end_of_a_run_waits_for_the_last_upload_however_long_it_takes(
    config_dict: dict[str, Any], bucket: Bucket, tmp_path: Path, call: Call
) -> None:
    changed = {**config_dict, "health": {"timeout_s": 4.0}}  # of which a run that is stopped would wait for a half
    config = written(changed, tmp_path, checkpoint={"save_every": 10, "remote": f"{bucket.url}/run"})
    bucket.server.hold.write_text(f"{bucket.name}/run/step-00000030/manifest.json")

    def answer() -> None:
        until = time.monotonic() + 60
        while not (tmp_path / "run/final").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(4.5)
        bucket.server.hold.unlink()

    thread = threading.Thread(target=answer)
    thread.start()
    code, out, err = call(train, "--config", config)
    thread.join()
    assert code == 0 and "given up" not in out + err, err
    assert bucket.steps("run") == [10, 20, 30] and bucket.get("run/final") == b"step-00000030\n"


@pytest.mark.parametrize("harm", ["manifest", "short file"])
def test_one_damaged_checkpoint_here_does_not_keep_the_others_from_the_store(
    trained_run: Path, tmp_path: Path, harm: str
) -> None:
    run_dir, store = tmp_path / "run", tmp_path / "store"
    shutil.copytree(trained_run, run_dir, symlinks=True)
    mirror = Mirror(Remote(f"file://{store}"), run_dir, CheckpointSection(keep_last=1, keep_every=10), 0, 60)
    name = {"manifest": fmt.MANIFEST, "short file": "rank00000.safetensors"}[harm]
    (run_dir / "step-00000010" / name).write_text("{}")
    for _ in range(2):
        mirror.saved(run_dir)
        mirror.wait()
    (warning,) = mirror.news()
    assert "step-00000010" in warning and "not uploaded" in warning
    assert steps_there(store) == [20, 30] and (store / "latest").read_text() == "step-00000030\n"


def test_what_a_killed_fetch_on_another_host_left_is_removed_and_told(trained_run: Path, tmp_path: Path) -> None:
    run_dir, told = tmp_path / "run", list[str]()
    shutil.copytree(trained_run, run_dir, symlinks=True)
    left = run_dir / "step-00000040.partial-another-host-77"
    shutil.copytree(run_dir / "step-00000030", left)
    clear_way(run_dir, 30, None, told.append)
    assert not left.exists() and committed_steps(run_dir) == [10, 20, 30]
    assert len(told) == 1 and str(left) in told[0] and "removed" in told[0]


@pytest.mark.parametrize("harm", ["rank00000.safetensors", fmt.MANIFEST, fmt.MARKER])
def test_what_is_damaged_here_and_whole_on_the_store_is_fetched_before_the_run_goes_back(
    config_dict: dict[str, Any], tmp_path: Path, call: Call, harm: str
) -> None:
    run_dir, store = tmp_path / "run", tmp_path / "store"
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10, "remote": f"file://{store}"})
    assert call(train, "--config", config, "training.stop_after=20")[0] == 75
    damaged = step_folder(run_dir, 20) / harm
    content = bytearray(damaged.read_bytes())
    content[-8] ^= 1
    damaged.write_bytes(content)
    code, out, err = call(train, "--config", config, "training.stop_after=21")
    assert code == 75 and "after step 20" in out + err and f"fetched whole from file://{store}" in err, err
    assert steps_there(store) == [10, 20, 21] and not list(store.glob("*.aside-*"))
    assert CheckpointReader(step_folder(run_dir, 20)).verify() == []

    # Damaged in both places, the run goes back.
    for folder in (run_dir, store):
        (step_folder(folder, 21) / "rank00000.safetensors").write_bytes(bytes(content))
    code, out, err = call(train, "--config", config, "training.stop_after=22")
    assert code == 75 and "after step 20" in out + err and "not to be had from the store" in err, err


def test_newer_steps_that_a_store_has_and_cannot_give_end_the_launch_and_stay(
    config_dict: dict[str, Any], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on from an older one here would set them aside there."""
    run_dir, store = tmp_path / "run", tmp_path / "store"
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10, "remote": f"file://{store}"})
    assert call(train, "--config", config, "training.stop_after=20")[0] == 75
    shutil.rmtree(step_folder(run_dir, 20))

    def fails(remote: Remote, name: str, *_: object) -> None:
        raise RemoteError(f"{remote.url}/{name}: cannot be read: 503 Slow Down")

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "fetch", fails)
        code, _, err = call(train, "--config", config)
        assert code == 2 and "503 Slow Down" in err, err
    assert steps_there(store) == [10, 20] and not list(store.glob("*.aside-*"))
    code, out, err = call(train, "--config", config, "training.stop_after=21")
    assert code == 75 and "after step 20" in out + err, err


def test_the_end_of_a_run_tries_again_where_the_last_upload_failed(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, store, failures = tmp_path / "run", tmp_path / "store", [1, 2]
    shutil.copytree(trained_run, run_dir, symlinks=True)
    plain = Remote.upload

    def upload(remote: Remote, file: Path, name: str) -> None:
        if failures:
            failures.pop()
            raise RemoteError(f"{remote.url}/{name}: cannot be written: 503 Slow Down")
        plain(remote, file, name)

    monkeypatch.setattr(Remote, "upload", upload)
    monkeypatch.setattr("llmtrain.checkpoint.mirror._RETRY_S", 0.1)
    mirror = Mirror(Remote(f"file://{store}"), run_dir, CheckpointSection(), 0, 60)
    mirror.saved(run_dir)
    mirror.wait(is_final=True)
    assert steps_there(store) == [10, 20, 30] and "can be written again" in mirror.news()[-1]


def test_of_what_is_done_in_parallel_the_first_failure_is_raised_and_no_more_begun() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item % 7 == 3:
            time.sleep(0.2)
            raise ValueError(item)

    with pytest.raises(ValueError, match=r"^3$"):
        in_parallel(work, list(range(1000)))
    assert len(begun) < 1000
    in_parallel(begun.append, [])


def test_a_linked_step_whose_disk_is_not_there_is_left_alone(trained_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained_run, run_dir, symlinks=True)
    link = step_folder(run_dir, 20)
    shutil.rmtree(link)
    link.symlink_to(tmp_path / "archive")
    with pytest.raises(UserError, match="archive, which is not there; mount its disk"):
        clear_way(run_dir, 30, None, print)
    assert link.is_symlink()
