"""kill -9 of one rank of two, in every phase: the other ends, and the same command goes on to the same files.

LLMTRAIN_LONG_TESTS=1 kills each rank in each phase and at 60 random moments, without it a few of them.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmtrain.checkpoint.folders import committed_steps
from tests.faults.conftest import STEPS, Launcher, assert_two_as_undisturbed, copied, last_commit, two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LONG = bool(os.environ.get("LLMTRAIN_LONG_TESTS"))
DIED, LOST = -9, 5
# What all ranks go through; how long the loop waits in which phase of a save differs from machine to machine.
LOOP = (
    "between steps", "data", "forward", "backward", "update", "validation data", "validation", "logging", "sampling",
    "saving",
)  # fmt: skip
CALLS = {
    "opening data": "llmtrain.assemble:open_data",
    "building the model": "llmtrain.engine.accelerate:AccelerateEngine.build",
    "verification": "llmtrain.checkpoint.format:CheckpointReader.load",
    "what was read takes effect": "llmtrain.engine.accelerate:AccelerateEngine.publish",
    "writing": "llmtrain.checkpoint.format:write_rank",
    "its record": "llmtrain.checkpoint.format:write_whole",
    "commit": "llmtrain.checkpoint.format:commit",
    "links": "llmtrain.checkpoint.store:point",
    "deletion": "llmtrain.checkpoint.retention:_delete",
}
ONLY_RANK_0 = {"commit", "links", "deletion"}
OF_A_RESUME = {"verification", "what was read takes effect"}


class Moment(NamedTuple):
    """Which rank dies where, and how long after it has come there for the nth time."""

    name: str
    rank: int
    nth: int = 1
    delay_s: float = 0.0

    def request(self) -> dict[str, Any]:
        """For the launcher."""
        place = {"call": CALLS[self.name]} if self.name in CALLS else {"phase": self.name}
        return {**place, "victim": self.rank, "nth": self.nth, "delay_s": self.delay_s}


SHORT = [
    Moment("building the model", 1), Moment("data", 1, 3), Moment("backward", 0, 2), Moment("writing", 1),
    Moment("validation", 0), Moment("update", 1), Moment("commit", 0), Moment("verification", 1),
]  # fmt: skip
EVERY = [Moment(name, rank) for name in (*LOOP, *CALLS) for rank in (0, 1) if not (rank and name in ONLY_RANK_0)]


# Of each rank, two pieces and a rest in the first file, a rest in the second; see `small_files`.
WRITES = [
    (rank, f"rank{rank:05d}{part}.safetensors", kind, nth)
    for rank in (0, 1) for part, most in (("", 3), ("-1", 1)) for kind in ("open", "write", "fsync")
    for nth in range(1, most + 1 if kind == "write" else 2)
]  # fmt: skip
SHORT_WRITES = [(1, "rank00001.safetensors", "write", 2), (0, "rank00000-1.safetensors", "write", 1)]


def random_moments(count: int) -> list[Moment]:
    dice = random.Random(0)
    names = [*LOOP, *CALLS]
    return [
        Moment(name := dice.choice(names), 0 if name in ONLY_RANK_0 else dice.randint(0, 1), dice.randint(1, 3),
               dice.random() * 0.05)
        for _ in range(count)
    ]  # fmt: skip


def test_one_rank_killed_again_and_again(launcher: Launcher, data: Path, tmp_path: Path, undisturbed_two: Path) -> None:
    """Each launch goes on where the one before was killed; one that gets to the end is followed by a new run."""
    met, finished = set[Moment](), 0
    config = two_ranks(data, tmp_path / "run-0")
    for moment in [*EVERY, *random_moments(60)] if LONG else SHORT:
        for _ in range(2):  # what is left of a run may not have that moment; a whole one has
            run_dir = Path(config["run"]["dir"])
            if moment.name in OF_A_RESUME and not last_commit(run_dir):
                assert [one.code for one in launcher.train_ranks(2, config, "training.stop_after=3")] == [75, 75]
            before = last_commit(run_dir)
            ended = launcher.train_ranks(2, config, **moment.request())
            codes = {"victim": ended[moment.rank].code, "other": ended[1 - moment.rank].code}
            # Who is killed on its way out, with all saved, is not missed any more.
            alone = [{"victim": DIED, "other": 0}] if moment.delay_s and last_commit(run_dir) == STEPS else []
            assert codes in ({"victim": DIED, "other": LOST}, {"victim": 0, "other": 0}, *alone), (moment, ended)
            assert "Traceback" not in ended[1 - moment.rank].err, (moment, ended)
            assert last_commit(run_dir) >= before, moment
            if codes["victim"] == DIED:
                met.add(moment)
                break
            assert_two_as_undisturbed(run_dir, undisturbed_two)
            finished += 1
            config = two_ranks(data, tmp_path / f"run-{finished}")
    found = last_commit(Path(config["run"]["dir"]))
    ended = launcher.train_ranks(2, config)
    assert [one.code for one in ended] == [0, 0], ended
    assert (f"after step {found}\n" in ended[0].out) == bool(found), ended[0]
    assert_two_as_undisturbed(Path(config["run"]["dir"]), undisturbed_two)
    assert met >= set(EVERY if LONG else SHORT)
    assert committed_steps(undisturbed_two) == [8]


def test_one_rank_killed_in_a_piece_of_one_of_its_files(
    launcher: Launcher, data: Path, tmp_path: Path, undisturbed_two: Path
) -> None:
    """The checkpoint that it was writing does not exist, whatever the other has written of it."""
    launched = two_ranks(data, tmp_path / "run", async_save=False)
    assert [one.code for one in launcher.train_ranks(2, launched, "training.stop_after=4")] == [75, 75]
    begun = (tmp_path / "run").rename(tmp_path / "begun")
    for rank, name, kind, nth in WRITES if LONG else SHORT_WRITES:
        run_dir = copied(begun, tmp_path / "run")
        of = f"{kind} {run_dir}/step-00000006/{name}"
        ended = launcher.train_ranks(2, launched, victim=rank, event=nth, of=of)
        assert (ended[rank].code, ended[1 - rank].code) == (DIED, LOST), (name, kind, nth, ended)
        assert last_commit(run_dir) == 4
        ended = launcher.train_ranks(2, launched)
        assert [one.code for one in ended] == [0, 0], ended
        assert_two_as_undisturbed(run_dir, undisturbed_two)
