"""kill -9 at every moment of a launch: the same command goes on by itself, from the last commit, to the same files.

LLMTRAIN_LONG_TESTS=1 tries every deed of a whole launch on its run folder (torn writes included) and 200 random
moments, without it a part of them that is spread evenly.
"""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path
from typing import get_args

import pytest

from llmtrain.checkpoint.folders import committed_steps
from llmtrain.health.peers import Phase
from tests.faults.conftest import (
    Config,
    Launcher,
    assert_as_undisturbed,
    config_of,
    contents,
    copied,
    last_commit,
)
from tests.faults.file_events import DIRECTLY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LONG = bool(os.environ.get("LLMTRAIN_LONG_TESTS"))
DIED = -9
# All that one process goes through which nothing goes wrong in.
PHASES = sorted({*get_args(Phase)} - {"waiting for what other ranks write", "going back"})


# What happens to each file of tensors, and how often: two pieces and a rest, one and a rest, a rest; see `small_files`.
DEEDS = {
    "rank00000.safetensors": {"open": 1, "write": 3, "fsync": 1},
    "rank00000-1.safetensors": {"open": 1, "write": 2, "fsync": 1},
    "rank00000-2.safetensors": {"open": 1, "write": 1, "fsync": 1},
}
OF_PIECES = [
    (name, kind, nth)
    for name, deeds in DEEDS.items() for kind, most in deeds.items() for nth in range(1, most + 1)
]  # fmt: skip
SHORT_OF_PIECES = [
    ("rank00000.safetensors", "write", 1), ("rank00000.safetensors", "write", 2), ("rank00000.safetensors", "write", 3),
    ("rank00000-1.safetensors", "write", 1), ("rank00000-2.safetensors", "open", 1),
]  # fmt: skip


def distinct(events: list[str]) -> list[int]:
    """The numbers, from 1, of the deeds worth a try: of the many writes of tensors into one file, three."""
    runs: list[list[int]] = []
    for number, event in enumerate(events, start=1):
        if runs and event.startswith("write") and events[runs[-1][0] - 1] == event:
            runs[-1].append(number)
        else:
            runs.append([number])
    return sorted({number for run in runs for number in (run[0], run[len(run) // 2], run[-1])})


def spread(numbers: list[int], count: int) -> list[int]:
    """All in the long form, otherwise `count` of them."""
    return numbers if LONG else [numbers[i * len(numbers) // count] for i in range(count)]


def goes_on(launcher: Launcher, config: Config, committed: int, undisturbed: Path) -> None:
    """The same command goes on from what was committed when the process was killed, and ends as if nothing had been."""
    run_dir = Path(config["run"]["dir"])
    found = last_commit(run_dir)
    assert found >= committed
    ended = launcher.train(config)
    assert ended.code == 0, ended.err
    assert (f"after step {found}\n" in ended.out) == bool(found), ended.out
    assert "Traceback" not in ended.err
    assert_as_undisturbed(run_dir, undisturbed)


def test_at_every_change_of_the_run_folder(
    launcher: Launcher, data: Path, tmp_path: Path, undisturbed: Path, begun: Path
) -> None:
    """Opening a run that goes on, logging, saving (each file of it), linking, deleting, ending."""
    config = config_of(data, tmp_path / "run")
    events = launcher.events(config_of(data, copied(begun, tmp_path / "counted")))
    # Two saves: the marker opened, written, synced, renamed; two deletions.
    assert sum("COMMITTED" in event for event in events) == 10
    # The commit itself is always among them.
    commits = [number for number in distinct(events) if "step-00000006/.COMMITTED" in events[number - 1]]
    tries = sorted({*spread(distinct(events), 26), *commits})
    assert len(commits) == 4  # opened, written, synced, renamed
    for number in tries:
        copied(begun, tmp_path / "run")
        assert launcher.train(config, event=number).code == DIED, events[number - 1]
        goes_on(launcher, config, 4, undisturbed)
    assert len(tries) >= (150 if LONG else 20)


def test_in_every_piece_of_every_file_of_tensors(
    launcher: Launcher, data: Path, tmp_path: Path, undisturbed: Path, begun: Path
) -> None:
    """They are written at the same time, so a number counts what happens to one of them."""
    run_dir = tmp_path / "run"
    events = launcher.events(config_of(data, copied(begun, run_dir)))
    for name, deeds in DEEDS.items():
        of_file = [event.split()[0] for event in events if f" {run_dir}/step-00000006/{name}" in event]
        assert {kind: of_file.count(kind) for kind in deeds} == deeds
    for name, kind, nth in OF_PIECES if LONG else SHORT_OF_PIECES:
        config = config_of(data, copied(begun, run_dir))
        launch = launcher.train(config, event=nth, of=f"{kind} {run_dir}/step-00000006/{name}")
        assert launch.code == DIED, (name, kind, nth)
        assert last_commit(run_dir) == 4
        goes_on(launcher, config, 4, undisturbed)


def test_pieces_are_written_past_the_page_cache(launcher: Launcher, data: Path, tmp_path: Path, begun: Path) -> None:
    """What the tests above are killed in; the rest of a file is no whole number of blocks."""
    if not takes_direct_writes(tmp_path):
        pytest.skip(f"the file system of {tmp_path} takes no writes past the page cache (O_DIRECT)")
    events = launcher.events(config_of(data, copied(begun, tmp_path / "run")))
    path = tmp_path / "run" / "step-00000006" / "rank00000.safetensors"
    writes = [event for event in events if event.startswith(f"write {path}")]
    assert writes == [f"write {path}{DIRECTLY}"] * 2 + [f"write {path}"]


def takes_direct_writes(folder: Path) -> bool:
    piece = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        descriptor = os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0))
        try:
            return hasattr(os, "O_DIRECT") and os.write(descriptor, piece) == mmap.PAGESIZE
        finally:
            os.close(descriptor)
    except OSError:
        return False


def test_before_the_first_checkpoint(launcher: Launcher, data: Path, tmp_path: Path, undisturbed: Path) -> None:
    """From an empty folder to the end of the first save: there is nothing to lose, and nothing in the way."""
    events = launcher.events(config_of(data, tmp_path / "counted"))
    first = next(index for index, event in enumerate(events) if event.startswith("os.rename") and "COMMITTED" in event)
    for number in spread(distinct(events[: first + 1]), 6):
        config = config_of(data, tmp_path / str(number))
        assert launcher.train(config, event=number).code == DIED, events[number - 1]
        goes_on(launcher, config, 0, undisturbed)


def test_at_random_moments_of_every_phase_again_and_again(
    launcher: Launcher, data: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """Each launch is killed where the one before left off, until one gets to the end; saves are in the background.

    The phases come in turns; one that a launch got past is tried again, with the next run.
    """
    dice, moments = random.Random(0), 200 if LONG else len(PHASES)
    turns = dice.sample(PHASES, len(PHASES))
    met: list[str] = []
    ended = launches = 0
    while len(met) < moments:
        launches += 1
        assert launches <= 4 * moments, "most launches got to the end before their moment came"
        phase = turns[len(met) % len(turns)]
        config = config_of(data, tmp_path / f"run-{ended}", async_save=True)
        run_dir = Path(config["run"]["dir"])
        before = committed_steps(run_dir)
        delay_s = dice.random() * (0.3 if phase == "start" else 0.03)
        launch = launcher.train(config, phase=phase, nth=dice.randint(1, 2), delay_s=delay_s)
        assert launch.code in (DIED, 0), launch.err
        assert last_commit(run_dir) >= max(before, default=0)
        if launch.code == DIED:
            met.append(phase)
        else:
            assert_as_undisturbed(run_dir, undisturbed)
            ended += 1
    assert set(met) == set(PHASES)
    goes_on(launcher, config, 0, undisturbed)


def test_the_run_that_is_compared_with_is_a_whole_one(undisturbed: Path, begun: Path) -> None:
    """What the others compare with has all that a run writes, and going on from the half is not the whole."""
    assert committed_steps(undisturbed) == [8] and committed_steps(begun) == [4]
    names = set(contents(undisturbed))
    assert names >= {"metrics.jsonl", "samples.jsonl", "samples-rank00000.jsonl", "best", "latest", "final"}
