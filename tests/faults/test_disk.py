"""The disk fills up, or the right to write goes, in the middle of a run: what was saved stays, and it goes on after."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import committed_steps
from tests.faults.conftest import (
    Config,
    Launcher,
    assert_as_undisturbed,
    assert_two_as_undisturbed,
    config_of,
    copied,
    last_commit,
    two_ranks,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of its own, of 1 MB, where everybody may look."""
    folder = Path(tempfile.mkdtemp(prefix="llmtrain-disk-"))
    folder.chmod(0o755)
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        folder.rmdir()
        pytest.skip(f"cannot mount a disk of its own here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def assert_clear(err: str) -> None:
    """Told in lines of ours, never by a traceback."""
    assert "Traceback" not in err
    assert all(line.startswith(("llmtrain: ", "warning: ")) for line in err.splitlines()), err


def goes_on(launcher: Launcher, config: Config, run_dir: Path, undisturbed: Path) -> None:
    found = last_commit(run_dir)
    assert found >= 4
    ended = launcher.train(config)
    assert ended.code == 0, ended.err
    assert_as_undisturbed(run_dir, undisturbed)


@pytest.mark.parametrize("free_kb", [0, 4, 16, 24, 40])
def test_a_full_disk(launcher: Launcher, data: Path, disk: Path, begun: Path, undisturbed: Path, free_kb: int) -> None:
    """Full at once, in the records, in the tensors, in the small files of a checkpoint; then there is room again."""
    run_dir = copied(begun, disk / "run")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free_kb * 1024)))
    config = config_of(data, run_dir)
    ended = launcher.train(config)
    assert ended.code in (0, 2), ended.err
    assert_clear(ended.err)
    assert (ended.code == 2) == (last_commit(run_dir) < 8)
    if ended.code:
        assert "No space left on device" in ended.out + ended.err
    ballast.unlink()
    goes_on(launcher, config, run_dir, undisturbed)


MOMENTS = {
    "records": ("write", "/metrics.jsonl"), "saving": ("open", "/step-00000006/rank"),
    "commit": ("open", "/step-00000006/.COMMITTED"), "deletion": ("os.remove", "/step-00000006/COMMITTED"),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give its rights away for a while")
def test_the_right_to_write_is_withdrawn(
    launcher: Launcher, data: Path, disk: Path, begun: Path, undisturbed: Path, tmp_path: Path, moment: str
) -> None:
    """Then the disk is read-only for the next launch, and then all is well again; the data can be read all the time."""
    data = Path(shutil.copytree(data, disk / "data"))
    events = launcher.events(config_of(data, copied(begun, tmp_path / "counted")))
    kind, name = MOMENTS[moment]
    number = next(n for n, event in enumerate(events, 1) if event.startswith(kind) and name in event)
    run_dir = copied(begun, disk / "run")
    config = config_of(data, run_dir)
    ended = launcher.train(config, event=number, withdraws=True)
    assert ended.code in (0, 2), ended.err
    assert_clear(ended.err)
    assert "Permission denied" in ended.out + ended.err
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = committed_steps(run_dir)
    refused = launcher.train(config)
    assert refused.code == 2 and refused.err.count("\n") == 1 and "cannot be written" in refused.err
    assert committed_steps(run_dir) == before
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    goes_on(launcher, config, run_dir, undisturbed)


@pytest.mark.parametrize("times", [1, 9])
def test_the_disk_of_one_rank_of_two_is_full(
    launcher: Launcher, data: Path, disk: Path, tmp_path: Path, undisturbed_two: Path, times: int
) -> None:
    """From the save of step 6 on, as on a file system of several disks; in its first file, with a piece written.

    Once: all ranks give that save up, and the next one is made. Again and again: all end, and go on when there is room.
    """
    run_dir = tmp_path / "run"
    config = two_ranks(data, run_dir)
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(free - 4096))
    place = {"call": "llmtrain.checkpoint.format:write_rank", "nth": 3, "delay_s": 0.0, "times": times, "victim": 1}
    leads = ["rank00001.safetensors", str(disk / "other")]
    ended = launcher.train_ranks(2, config, **place, leads=leads)
    failures = [line for line in ended[0].err.splitlines() if "saving step 6 failed: No space left on device" in line]
    assert len(failures) == 1 and "(rank 1 on" in failures[0] and "tries again at the next save" in failures[0], ended
    assert (disk / "other").stat().st_size == 4096
    assert [one.code for one in ended] == ([0, 0] if times == 1 else [2, 2]), ended
    assert "Traceback" not in ended[0].err + ended[1].err
    if times > 1:
        assert last_commit(run_dir) == 4
        [error] = [line for one in ended for line in one.err.splitlines() if line.startswith("llmtrain: error")]
        assert "saving step 8 failed: No space left on device (rank 1 on" in error
        ended = launcher.train_ranks(2, config)
        assert [one.code for one in ended] == [0, 0] and "after step 4\n" in ended[0].out, ended
    assert_two_as_undisturbed(run_dir, undisturbed_two)
