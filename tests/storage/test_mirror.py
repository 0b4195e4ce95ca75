"""Checkpoints on a store: the promises of the run folder hold there too, over a real S3 server."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.folders import point
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.mirror import Mirror
from llmtrain.checkpoint.remote import remote_steps
from llmtrain.config import CheckpointSection
from llmtrain.generate import main as generate
from llmtrain.storage.remote import Remote
from llmtrain.train import main as train
from llmtrain.verify import main as verify
from tests.conftest import Call, is_one_clear_line, records, small_config
from tests.distributed.launching import environment, launch, start_ranks
from tests.storage.conftest import Bucket, Server, make_bucket


def written(config: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Path:
    """The config with some settings changed, as a file."""
    changed = {key: {**value, **sections.get(key, {})} for key, value in config.items()}
    file = folder / "config.yaml"
    file.write_text(json.dumps(changed))
    return file


def same_tensors(left: Path, right: Path) -> bool:
    ours, theirs = CheckpointReader(left), CheckpointReader(right)
    return ours.tensors() == theirs.tensors() and all(
        (left / f"rank{rank:05d}.safetensors").read_bytes() == (right / f"rank{rank:05d}.safetensors").read_bytes()
        for rank in range(ours.manifest.world_size)
    )


def test_a_new_machine_goes_on_from_the_store_with_the_same_numbers(
    config_dict: dict[str, Any], trained_run: Path, bucket: Bucket, tmp_path: Path, call: Call
) -> None:
    run_dir, url = tmp_path / "run", f"{bucket.url}/run"
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10, "remote": url})
    code, _, err = call(train, "--config", config, "training.stop_after=20")
    assert code == 75, err
    assert bucket.steps("run") == [10, 20]
    assert bucket.get("run/latest") == b"step-00000020\n"
    written_files = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    everything = [*written_files, *(bucket.get(name) for name in bucket.names()), err.encode()]
    assert len(written_files) >= 20 and not any(b"not-to-be-written" in content for content in everything)

    shutil.rmtree(run_dir)
    code, out, err = call(train, "--config", config)
    assert code == 0, err
    assert f"fetched {url}/step-00000020 to {run_dir}/step-00000020" in err and "after step 20" in out + err
    assert same_tensors(run_dir / "step-00000030", trained_run / "step-00000030")
    expected = {record["step"]: record["train_loss"] for record in records(trained_run)}
    assert {record["step"]: record["train_loss"] for record in records(run_dir)}.items() <= expected.items()
    assert bucket.steps("run") == [10, 20, 30] and bucket.get("run/final") == b"step-00000030\n"

    # A fresh launch must not write over it, and a third machine has nothing left to do.
    shutil.rmtree(run_dir)
    code, _, err = call(train, "--config", config, "--resume", "never")
    assert code == 2 and is_one_clear_line(err) and "holds another run" in err
    assert call(verify, url)[0] == 0
    code, _, err = call(generate, url, "--max-new-tokens", 3, "--seed", 1)
    assert code == 0, err


def test_a_flipped_byte_is_passed_over_and_told(
    config_dict: dict[str, Any], bucket: Bucket, tmp_path: Path, call: Call
) -> None:
    url = f"{bucket.url}/run"
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10, "remote": url})
    assert call(train, "--config", config)[0] == 0
    key = "run/step-00000030/rank00000.safetensors"
    content = bytearray(bucket.get(key))
    content[-100] ^= 1
    bucket.put(key, bytes(content))
    code, out, _ = call(verify, url)
    assert code == 4 and f"FAIL  {bucket.url}/{key}: content differs" in out
    assert call(generate, f"{url}/step-00000030", "--max-new-tokens", 3)[0] == 4

    shutil.rmtree(tmp_path / "run")
    code, _, err = call(train, "--config", config)
    assert code == 0
    assert f"warning: {bucket.url}/{key}: content differs" in err and "going back to an older checkpoint" in err
    assert f"fetched {url}/step-00000020" in err
    assert bucket.steps("run") == [10, 20, 30]
    assert any(name.startswith("run/step-00000030.aside-") for name in bucket.names())
    assert call(verify, url)[0] == 0


def test_retention_and_rewinding_hold_on_the_store(
    config_dict: dict[str, Any], bucket: Bucket, tmp_path: Path, call: Call
) -> None:
    url = f"{bucket.url}/deep/run"
    kept = {"save_every": 4, "keep_last": 1, "keep_every": 12, "remote": url}
    config = written(config_dict, tmp_path, checkpoint=kept, training={**config_dict["training"], "eval_every": None})
    assert call(train, "--config", config)[0] == 0
    assert bucket.steps("deep/run") == [12, 24, 30]
    assert not [name for name in bucket.names() if "step-00000008" in name]
    code, _, err = call(train, "--config", config, "--resume", f"{url}/step-00000012", "training.stop_after=14")
    assert code == 75, err
    assert bucket.steps("deep/run") == [12, 14] and bucket.get("deep/run/latest") == b"step-00000014\n"
    assert "deep/run/final" not in bucket.names()


def test_what_is_wrong_with_the_store_is_one_line_before_training(
    config_dict: dict[str, Any], bucket: Bucket, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    def attempt(url: str) -> str:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        config = written(config_dict, tmp_path, checkpoint={"remote": url})
        code, _, err = call(train, "--config", config)
        assert code == 2 and is_one_clear_line(err), err
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
        return err

    assert "bucket does not exist" in attempt("s3://no-such-bucket/run")
    assert "known are" in attempt("nonsense://bucket/run")
    assert "pip install gcsfs" in attempt("gs://bucket/run")
    refused = attempt("s3://user:pass-word@bucket/run")
    assert "password" in refused and "pass-word" not in refused
    assert "cannot be written" in attempt("file:///proc/run")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "credentials" in attempt(f"{bucket.url}/run")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "Could not connect" in attempt(f"{bucket.url}/run")


@pytest.mark.slow
def test_a_server_that_dies_costs_a_warning_and_when_it_is_back_the_run_catches_up(
    config_dict: dict[str, Any], s3_environment: Callable[[Server], None], tmp_path: Path, call: Call
) -> None:
    server = Server()
    bucket = make_bucket(server, s3_environment)
    training = {**config_dict["training"], "max_steps": 100_000, "eval_every": None}
    checkpoint = {"save_every": 10, "keep_every": 20, "remote": f"{bucket.url}/run"}
    config = written(config_dict, tmp_path, checkpoint=checkpoint, training=training)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.train", "--config", str(config)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        wait_for_line(process, "step-00000010")
        server.stop()
        wait_for_line(process, "not uploaded; everything is in")
        server = Server(server.port)  # it has lost everything, the bucket too
        bucket = make_bucket(server, s3_environment, bucket.name)
        wait_for_line(process, "can be written again")
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 75, output
        here = [int(folder.name[5:]) for folder in sorted((tmp_path / "run").glob("step-*"))]
        assert bucket.steps("run") == here and 20 in here, "also what was saved while there was no server"
        assert call(verify, checkpoint["remote"])[0] == 0
    finally:
        process.kill()
        server.stop()


@pytest.mark.slow
def test_the_wait_for_a_slow_store_at_the_end_is_not_taken_for_a_hang(
    config_dict: dict[str, Any], bucket: Bucket, tmp_path: Path
) -> None:
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10, "remote": f"{bucket.url}/run"})
    bucket.server.hold.write_text(f"{bucket.name}/run/step-00000030/manifest.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.train", "--config", str(config), "health.hang_after_s=2"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        wait_for_line(process, "step 30/30")
        time.sleep(8)
        assert bucket.steps("run") == [10, 20]
        bucket.server.hold.unlink()
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
        bucket.server.hold.unlink(missing_ok=True)
    assert process.returncode == 0, output
    assert bucket.steps("run") == [10, 20, 30]


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_the_wait_for_the_last_upload_on_all_and_the_run_is_done(
    config_dict: dict[str, Any], bucket: Bucket, tmp_path: Path
) -> None:
    """Else that rank would be killed at the end of its grace while the others wait on."""
    changed = {**config_dict, "health": {"grace_s": 2.0}}
    config = written(changed, tmp_path, checkpoint={"save_every": 10, "remote": f"{bucket.url}/run"})
    bucket.server.hold.write_text(f"{bucket.name}/run/step-00000030/manifest.json")
    ranks = start_ranks([config, config], [tmp_path, tmp_path])
    try:
        while not (tmp_path / "run/final").is_symlink():
            assert all(rank.poll() is None for rank in ranks), [rank.communicate() for rank in ranks]
            time.sleep(0.1)
        time.sleep(1.0)
        ranks[1].send_signal(signal.SIGTERM)
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        bucket.server.hold.unlink()
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "done: 30 of 30 steps" in said[0][0]
    assert "is given up; everything is in" in said[0][0] + said[0][1]
    assert bucket.steps("run") == [10, 20]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_a_checkpoint_is_fetched_stops_all_ranks_and_the_same_command_goes_on(
    config_dict: dict[str, Any], bucket: Bucket, tmp_path: Path, call: Call, processes: int
) -> None:
    """A fetch may take longer than the grace."""
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10, "remote": f"{bucket.url}/run"})
    run_dir = tmp_path / "run"
    assert call(train, "--config", config, "training.stop_after=20")[0] == 75
    shutil.rmtree(run_dir)
    bucket.server.hold.write_text(f"{bucket.name}/run/step-00000020/rank00000.safetensors")
    ranks = start_ranks([config] * processes, [tmp_path] * processes)
    try:
        while not list(run_dir.glob("step-00000020.partial-*/state.json")):
            assert all(rank.poll() is None for rank in ranks), [rank.communicate() for rank in ranks]
            time.sleep(0.1)
        ranks[-1].send_signal(signal.SIGTERM)
        said = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        bucket.server.hold.unlink()
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [75] * processes, said
    assert "stopped by a signal before the first step: nothing to save" in said[0][1]
    assert "Traceback" not in said[0][1] + said[-1][1]
    code, out, err = call(train, "--config", config)
    assert code == 0, err
    assert f"removed {run_dir}/step-00000020.partial-" in err and "after step 20" in out
    assert bucket.steps("run") == [10, 20, 30]


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    """Read the output up to a line with this text."""
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        if text in line:
            return
    raise AssertionError(f"no {text!r} in {''.join(output)}")


@pytest.mark.slow
def test_a_kill_in_the_middle_of_an_upload_leaves_no_checkpoint_there_and_uploads_do_not_hold_the_loop(
    config_dict: dict[str, Any], trained_run: Path, bucket: Bucket, tmp_path: Path, call: Call
) -> None:
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10, "remote": f"{bucket.url}/run"})
    run_dir = tmp_path / "run"
    assert call(train, "--config", config, "training.stop_after=5")[0] == 75
    assert bucket.steps("run") == [5]
    bucket.server.hold.write_text("0/manifest.json")  # of all that come now: which goes first depends on the machine
    command = [sys.executable, "-m", "llmtrain.train", "--config", str(config)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        until = time.monotonic() + 120
        while not (run_dir / "step-00000030/COMMITTED").exists() or not (
            uploading := [name for name in bucket.names() if name.endswith("0/state.json")]
        ):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        bucket.server.hold.unlink()
    assert bucket.steps("run") == [5], f"{uploading} was on its way, and the loop had gone on to its end meanwhile"
    shutil.rmtree(run_dir)
    code, _, err = call(train, "--config", config)
    assert code == 0
    assert "step-00000005 to" in err and "0: an unfinished checkpoint; removed" in err
    assert same_tensors(run_dir / "step-00000030", trained_run / "step-00000030")
    assert bucket.steps("run") == [10, 20, 30]


def test_rank_1_uploads_its_own_file_and_rank_0_what_nobody_brought(trained_run: Path, tmp_path: Path) -> None:
    remote, config = Remote(f"file://{tmp_path}/store"), CheckpointSection()
    source = tmp_path / "run/step-00000030"
    shutil.copytree(trained_run / source.name, source)
    shutil.copyfile(source / "rank00000.safetensors", source / "rank00001.safetensors")
    other = Mirror(remote, tmp_path / "run", config, 1, 60)
    other.saved(source)
    other.wait()
    assert other.news() == [] and list(remote.sizes()) == [f"{source.name}/rank00001.safetensors"]
    first = Mirror(remote, tmp_path / "run", config, 0, 60)
    first.saved(source)
    first.wait()
    assert first.news() == [] and remote_steps(remote.sizes()) == [30]


def test_going_back_in_the_middle_of_a_run_holds_on_the_store(trained_run: Path, tmp_path: Path) -> None:
    remote, run_dir = Remote(f"file://{tmp_path}/store"), tmp_path / "run"
    shutil.copytree(trained_run, run_dir, symlinks=True)
    mirror = Mirror(remote, run_dir, CheckpointSection(), 0, 60)
    mirror.saved(run_dir)
    mirror.wait()
    assert remote_steps(remote.sizes()) == [10, 20, 30]
    (run_dir / "step-00000030").rename(run_dir / "step-00000030.aside-1")
    for name in ("latest", "final", "best"):
        point(run_dir, name, "step-00000020")
    mirror.rewind(20)
    mirror.wait()
    told = mirror.news()
    assert len(told) == 1 and "step-00000030: later than step 20" in told[0]
    assert remote_steps(remote.sizes()) == [10, 20] and remote.read("latest") == b"step-00000020\n"


def test_what_a_run_went_back_from_is_not_fetched_though_the_store_was_not_told(
    config_dict: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    run_dir = tmp_path / "run"
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10, "remote": f"file://{tmp_path}/store"})
    assert call(train, "--config", config)[0] == 0
    (run_dir / "step-00000030").rename(run_dir / "step-00000030.aside-1")
    code, out, err = call(train, "--config", config, "training.stop_after=22")
    assert code == 75 and "fetched" not in err and "step-00000020 after step 20" in out + err, err
    assert sorted(remote_steps(Remote(f"file://{tmp_path}/store").sizes())) == [10, 20, 22]


@pytest.mark.slow
def test_two_processes_upload_their_own_parts_and_on_new_machines_two_go_on_and_then_one(
    data: Path, bucket: Bucket, tmp_path: Path, call: Call
) -> None:
    run_dir = tmp_path / "two"
    config = small_config(data, run_dir)
    config["checkpoint"] |= {"remote": f"{bucket.url}/run", "save_every": 10}
    config["training"] |= {"max_steps": 20, "micro_batch_size": 4}
    done = launch("cpu-ddp", 2, config)
    assert done.returncode == 0, done.stderr
    assert bucket.steps("run") == [10, 20]
    for step in (10, 20):
        own = [
            line for line in bucket.server.requests if f"/{bucket.name}/run/step-000000{step}/rank00001.safe" in line
        ]
        assert sum('"PUT ' in line for line in own) == 1, "the file of rank 1 goes once, and so from one rank"
    (expected,) = {(run_dir / "step-00000020" / "rank00001.safetensors").read_bytes()}
    assert bucket.get("run/step-00000020/rank00001.safetensors") == expected
    shutil.rmtree(run_dir)
    config["training"]["max_steps"] = 22
    done = launch("cpu-ddp", 2, config)
    assert done.returncode == 0 and done.stderr.count("fetched") == 1, done.stderr
    shutil.rmtree(run_dir)
    code, _, err = call(train, "--config", run_dir.with_suffix(".yaml"), "training.max_steps=24")
    assert code == 0 and f"fetched {bucket.url}/run/step-00000022" in err, err
    assert bucket.steps("run")[-2:] == [22, 24]
