"""Prepared data on a store: uploaded with the manifest last, fetched once, verified, mapped from the cache."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.fetch import local_data, upload_data
from llmtrain.data.shards import MANIFEST, read_manifest
from llmtrain.errors import CorruptError, UserError
from llmtrain.evaluate import main as evaluate
from llmtrain.prepare import main as prepare
from llmtrain.storage.remote import Remote
from llmtrain.train import main as train
from llmtrain.verify import main as verify
from tests.conftest import Call, is_one_clear_line, prose, records
from tests.distributed.launching import environment
from tests.storage.conftest import Bucket


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    return f"file://{tmp_path}/store/data"


def test_a_run_on_data_of_a_bucket_gives_the_numbers_of_the_same_data_here(
    config_dict: dict[str, Any], trained_run: Path, bucket: Bucket, tmp_path: Path, call: Call
) -> None:
    url, data = f"{bucket.url}/data", Path(config_dict["data"]["path"])
    assert upload_data(data, Remote(url))
    assert not upload_data(data, Remote(url)), "the same again is not uploaded again"
    config_dict["data"]["path"] = url
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(config_dict))
    code, _, err = call(train, "--config", config, "training.stop_after=10")
    assert code == 75 and "fetching" in err
    code, _, err = call(train, "--config", config)
    assert code == 0 and "fetching" not in err
    assert [r["train_loss"] for r in records(tmp_path / "run")] == [r["train_loss"] for r in records(trained_run)]
    assert call(verify, url)[0] == 0
    code, out, err = call(evaluate, tmp_path / "run", "--json")
    assert code == 0, err
    assert json.loads(out)["loss"] > 0


@pytest.mark.slow
def test_a_signal_while_data_are_fetched_stops_the_run(
    config_dict: dict[str, Any], bucket: Bucket, tmp_path: Path
) -> None:
    url, data = f"{bucket.url}/data", Path(config_dict["data"]["path"])
    upload_data(data, Remote(url))
    config_dict["data"]["path"] = url
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(config_dict))
    bucket.server.hold.write_text(f"{bucket.name}/data/train-00000")
    command = [sys.executable, "-m", "llmtrain.train", "--config", str(config)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        while not list((tmp_path / "cache").rglob("train-00000*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        bucket.server.hold.unlink()
        process.kill()
    assert process.returncode == 75, said
    assert "stopped by a signal before the first step" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_prepare_uploads_and_refuses_other_data(bucket: Bucket, tmp_path: Path, call: Call) -> None:
    url, text = f"{bucket.url}/book", tmp_path / "book.txt"
    text.write_text(prose(5_000))
    code, out, err = call(prepare, "--input", text, "--tokenizer", "char", "--out", url)
    assert code == 0 and f"data.path={url}" in out, err
    assert "book/manifest.json" in bucket.names()
    assert not [name for name in bucket.names() if "writable" in name]
    assert call(verify, url)[0] == 0
    assert call(prepare, "--input", text, "--tokenizer", "char", "--out", url)[0] == 0
    code, _, err = call(prepare, "--input", text, "--tokenizer", "byte", "--out", url)
    assert code == 2 and is_one_clear_line(err)
    code, _, err = call(prepare, "--input", text, "--out", url, "--part", "1/2")
    assert code == 2 and is_one_clear_line(err)


def test_a_flipped_byte_is_refused_and_leaves_nothing(data: Path, on_disk: str, tmp_path: Path, call: Call) -> None:
    upload_data(data, Remote(on_disk))
    shard = tmp_path / "store/data/train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptError, match=r"train-00000\.bin: content differs"):
        local_data(on_disk)
    assert not list((tmp_path / "cache").rglob(MANIFEST))
    code, out, _ = call(verify, on_disk)
    assert code == 4 and "train-00000.bin: content differs" in out


def test_a_manifest_that_names_files_outside_is_refused(data: Path, on_disk: str, tmp_path: Path) -> None:
    upload_data(data, Remote(on_disk))
    manifest = tmp_path / "store/data" / MANIFEST
    manifest.write_text(manifest.read_text().replace("train-00000.bin", "../../outside.bin"))
    with pytest.raises(CorruptError, match="outside the folder"):
        local_data(on_disk)


def test_other_data_under_the_same_url_is_fetched_anew(data: Path, on_disk: str, tmp_path: Path) -> None:
    upload_data(data, Remote(on_disk))
    first = local_data(on_disk)
    assert local_data(on_disk) == first
    manifest = tmp_path / "store/data" / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    second = local_data(on_disk)
    assert second != first and read_manifest(second).fingerprint() == read_manifest(first).fingerprint()


def test_what_is_not_there_is_said(on_disk: str) -> None:
    with pytest.raises(UserError, match=r"not prepared data \(no manifest\.json"):
        local_data(on_disk)


@pytest.mark.slow
def test_of_several_processes_one_fetches(data: Path, on_disk: str, tmp_path: Path) -> None:
    upload_data(data, Remote(on_disk))
    code = "import sys; from llmtrain.data.fetch import local_data; print(local_data(sys.argv[1]))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, on_disk], env=environment(), cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    results = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert sum("fetching" in err and "MB" in err for _, err in results) == 1
