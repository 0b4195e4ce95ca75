"""Checkpoints of several processes: checked, saved and given up together."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.store import step_folder
from llmtrain.checkpoint.verifying import share
from llmtrain.data.shards import FileInfo
from tests.conftest import small_config
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


def test_ranks_check_their_shares_walk_back_and_wait_for_a_slow_file_longer_than_the_timeout(
    trained_run: Path, data: Path, tmp_path: Path
) -> None:
    """The newest is damaged in a file that rank 1 reads; the one before has a pipe that is fed for 14 s."""
    import hashlib

    run_dir = Path(shutil.copytree(trained_run, tmp_path / "run", symlinks=True))
    newest, older = (step_folder(run_dir, step) for step in (30, 20))
    _, of_rank_1 = share(list(fmt.CheckpointReader(newest).manifest.files), 2)
    damaged = newest / of_rank_1[0].path
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    pieces = [b"slow"] * 28
    os.mkfifo(older / "pipe")
    add_file(older, "pipe", hashlib.sha256(b"".join(pieces)).hexdigest())

    def feed() -> None:
        with (older / "pipe").open("wb", buffering=0) as pipe:
            for piece in pieces:
                pipe.write(piece)
                time.sleep(0.5)

    threading.Thread(target=feed, daemon=True).start()
    config = small_config(data, run_dir)
    config["health"] = {"timeout_s": 10.0}
    (code, said), (other_code, other) = ended(start(config, tmp_path))
    assert (code, other_code) == (0, 0), said + other
    assert f"{damaged}: content differs from the hash in the manifest (rank 1 on " in said
    assert "going back to an older checkpoint" in said
    assert [record["step"] for record in metrics(run_dir)] == [record["step"] for record in metrics(trained_run)]
