"""The order in which a save reaches the disk, as the kernel saw it of all processes of a launch (strace)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import committed_steps
from tests.distributed.launching import environment, free_port
from tests.faults.conftest import ROOT, Config, config_of
from tests.faults.power_cut import STRACE, Event, broken_promises, events_of, without

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed (docker/install.sh strace)"),
]
TWO_RANKS = 'for rank in 0 1; do RANK=$rank LOCAL_RANK=$rank "$@" & done; wait'


def traced(config: Config, folder: Path) -> list[Event]:
    """All that two ranks that train to the end do to the run folder and to what is above it in `folder`."""
    file, trace, exit_code = folder / "config.json", folder / "trace", folder / "exit-code"
    file.write_text(json.dumps(config))
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.faults.small_files", "--config", str(file)]
    done = subprocess.run(
        [*STRACE, str(trace), "sh", "-c", TWO_RANKS, "sh", *command], capture_output=True, text=True, timeout=280,
        cwd=ROOT, env=environment(**place, LLMTRAIN_EXIT_CODE_FILE=str(exit_code)), check=False,
    )  # fmt: skip
    assert exit_code.exists() and exit_code.read_text() == "0\n", done.stderr[-4000:]
    return events_of(trace, folder)


@pytest.fixture(scope="module")
def launches(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[list[Event], Path]]:
    """Whole launches with saves that the loop waits for, and with saves behind its back: what they did, and where."""
    found = {}
    for waits in (True, False):
        folder = tmp_path_factory.mktemp("traced")
        run_dir = folder / "runs" / "run"  # the launch makes both folders
        found[waits] = traced(config_of(data, run_dir, async_save=not waits), folder), run_dir
    return found


@pytest.mark.parametrize("waits", [True, False])
def test_every_byte_of_every_rank_is_on_the_disk_before_the_marker_and_that_before_links_and_deletions(
    launches: dict[bool, tuple[list[Event], Path]], waits: bool
) -> None:
    events, run_dir = launches[waits]
    problems, seen = broken_promises(events, run_dir, waits=waits)
    assert problems == []
    assert committed_steps(run_dir) == [8] and seen.deletions == 3
    assert len(seen.commits) == 4 and seen.links >= 4 + 2 + 1  # latest, best, final
    for number, names in enumerate(seen.commits, start=1):
        step = f"step-{2 * number:08d}"
        assert names >= {
            f"{step}/{name}"
            for name in ("rank00000.safetensors", "rank00001.safetensors", "rank00000-1.safetensors",
                         "rank00001-1.safetensors", "rank00000.json", "rank00001.json",
                         "state.json", "config.yaml", "manifest.json", "tokenizer", ".COMMITTED")
        }  # fmt: skip
        assert any(name.startswith(f"{step}/tokenizer/") for name in names)


def test_each_fsync_is_needed_and_would_be_missed(launches: dict[bool, tuple[list[Event], Path]]) -> None:
    """Without what asks for any one path, the check above finds the hole."""
    events, run_dir = launches[True]
    folder = run_dir / "step-00000004"
    synced = {event.paths[0] for event in events if event.name == "fsync"}
    of_step = {path for path in synced if path.startswith(str(folder))}
    assert len(of_step) >= 2 * 3 + 4 + 3  # each rank's two files and record; state and so on; folder, tokenizer, files
    above = {str(run_dir), str(run_dir.parent), str(run_dir.parents[1]), f"{run_dir}/metrics.jsonl"}
    assert above <= synced
    for path in sorted(of_step | above):
        problems, _ = broken_promises(without(events, path), run_dir, waits=True)
        assert problems, f"nobody would miss an fsync of {path}"
