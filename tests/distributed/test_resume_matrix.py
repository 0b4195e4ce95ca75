"""A checkpoint of any engine at any number of processes goes on in any other, as if nothing had happened.

Each engine is launched twice: to save, and to go on from what every engine has saved. LLMTRAIN_LONG_TESTS=1 goes on
to the end of the run, without it only across the next epoch's border.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open

from llmtrain.checkpoint.folders import committed_steps, step_folder
from tests.distributed.engines import STEPS, Trained, config_of
from tests.distributed.launching import environment, launch_command, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FLOAT32 = 1e-5  # the bound
ENTRY = Path(__file__).with_name("train_each.py")
SAVED = 30
UNTIL = STEPS if os.environ.get("LLMTRAIN_LONG_TESTS") else 34  # the third epoch begins with step 33


class Kind(NamedTuple):
    """An engine as a launch file names it, its number of processes, and a micro-batch size that suits that."""

    name: str
    processes: int
    micro: int


KINDS = [
    Kind("single", 1, 4), Kind("cpu-ddp", 2, 2), Kind("cpu-zero1", 2, 2), Kind("cpu-zero2", 2, 3),
    Kind("cpu-zero3", 2, 3), Kind("zero3", 4, 3),
]  # fmt: skip
THREE = Kind("ddp", 3, 4)
# What a rank drops is a function of (seed, step, rank): the same ranks draw it again after a resume.
DROPPING = [KINDS[1], KINDS[4]]
# 1 → 2 → 4 → 3 processes in one run: until which step each trains. What it did after its last save is done again.
ON_THE_WAY = {KINDS[0]: 6, KINDS[2]: 14, KINDS[5]: 22, THREE: UNTIL}


@pytest.fixture(scope="module")
def folder(trained: Trained, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do everything: every engine goes on from every engine's checkpoint, one launch for each."""
    folder = tmp_path_factory.mktemp("resumed")
    for index, kind in enumerate([*KINDS, THREE]):
        jobs = []
        if kind in KINDS:
            for saved in KINDS:
                checkpoint = step_folder(trained(*saved), SAVED)
                jobs.append(job(data, pair_folder(folder, saved, kind), kind, UNTIL, "--resume", checkpoint))
            # Muon: a chain in which each engine goes on with what the one before has saved, and first saves it again.
            chain = folder / "muon"
            if index:
                before = step_folder(chain, 3 * index)
                jobs.append(
                    job(data, copy_folder(folder, index), kind, 3 * index, "--resume", before, optimizer="muon")
                )
            jobs.append(job(data, chain, kind, 3 * (index + 1), optimizer="muon"))
        if kind in DROPPING:
            whole, broken = dropout_folders(folder, kind)
            for run_dir, stop_after in ((whole, 8), (broken, 5), (broken, 8)):
                jobs.append(job(data, run_dir, kind, stop_after, "model.dropout=0.2"))
        if kind in ON_THE_WAY:
            mixed = folder / "mixed"
            if index:  # as if it had been killed before its last save
                shutil.rmtree(step_folder(mixed, committed_steps(mixed)[-1]))
            jobs.append(job(data, mixed, kind, ON_THE_WAY[kind], "checkpoint.save_every=4"))
        list_of_jobs = folder / f"jobs-{index}.json"
        list_of_jobs.write_text(json.dumps(jobs))
        command = launch_command(kind.name, kind.processes, ENTRY, list_of_jobs)
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment())
        assert done.returncode == 0, f"{kind}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    return folder


def job(data: Path, run_dir: Path, kind: Kind, stop_after: int, *more: object, optimizer: str = "adamw") -> list[str]:
    """The arguments of `llmtrain train` for one launch in a run folder."""
    file = run_dir.parent / f"{run_dir.name}-{kind.name}-{kind.processes}.yaml"
    file.write_text(json.dumps(config_of(data, run_dir, kind.micro, optimizer=optimizer)))
    return ["--config", str(file), f"training.stop_after={stop_after}", *map(str, more)]


def pair_folder(folder: Path, saved: Kind, resumed: Kind) -> Path:
    return folder / "-".join(map(str, (*saved[:2], "to", *resumed[:2])))


def copy_folder(folder: Path, index: int) -> Path:
    return folder / f"again-{index}"


def dropout_folders(folder: Path, kind: Kind) -> tuple[Path, Path]:
    return folder / f"dropout-{kind.name}-whole", folder / f"dropout-{kind.name}-broken"


def assert_goes_on(run_dir: Path, reference: Path, after: int, until: int, rel: float) -> None:
    """Numbers and samples of the steps `after` to `until` are those of the uninterrupted run."""
    ours, theirs = metrics(run_dir), metrics(reference)[after:until]
    assert [record["step"] for record in ours] == list(range(after + 1, until + 1))
    for record, expected in zip(ours, theirs, strict=True):
        for key in ("train_loss", "val_loss"):
            assert (record[key] is None) == (expected[key] is None)
            assert record[key] is None or record[key] == pytest.approx(expected[key], rel=rel), record["step"]
        for key in ("learning_rate", "tokens", "epoch"):
            assert record[key] == expected[key]
    samples = samples_by_step(reference)
    assert samples_by_step(run_dir) == {step: samples[step] for step in range(after + 1, until + 1)}


def samples_by_step(run_dir: Path) -> dict[int, list[int]]:
    """What all ranks that ever were have trained on, by step."""
    steps: dict[int, list[int]] = defaultdict(list)
    for path in run_dir.glob("samples-rank*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            steps[entry["step"]] += entry["ids"]
    return {step: sorted(ids) for step, ids in steps.items()}


@pytest.mark.parametrize("resumed", KINDS, ids=lambda kind: f"in-{kind.name}-{kind.processes}")
@pytest.mark.parametrize("saved", KINDS, ids=lambda kind: f"of-{kind.name}-{kind.processes}")
def test_the_run_goes_on_with_the_same_losses_and_samples(
    trained: Trained, folder: Path, saved: Kind, resumed: Kind
) -> None:
    assert_goes_on(pair_folder(folder, saved, resumed), trained(*KINDS[0]), SAVED, UNTIL, FLOAT32)


def test_a_run_on_1_then_2_then_4_then_3_processes_is_the_run_on_one(trained: Trained, folder: Path) -> None:
    """Each of them was killed after some steps that were not saved, which the next one does again."""
    launches = json.loads((folder / "mixed" / "run.json").read_text())["launches"]
    assert [launch["launch"]["world_size"] for launch in launches] == [1, 2, 4, 3]
    assert_goes_on(folder / "mixed", trained(*KINDS[0]), 0, UNTIL, FLOAT32)


@pytest.mark.parametrize("kind", DROPPING, ids=lambda kind: kind.name)
def test_every_rank_drops_what_it_would_have_dropped(trained: Trained, folder: Path, kind: Kind) -> None:
    whole, broken = dropout_folders(folder, kind)
    assert_goes_on(broken, whole, 0, 8, rel=0.0)
    without = [record["train_loss"] for record in metrics(trained(*KINDS[0]))[:8]]
    assert all(a["train_loss"] != b for a, b in zip(metrics(whole), without, strict=True))


def test_muon_goes_on_from_engine_to_engine(trained: Trained, folder: Path) -> None:
    whole = trained(*KINDS[0], optimizer="muon")
    assert_goes_on(folder / "muon", whole, 0, 3 * len(KINDS), FLOAT32)


def joined(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, flat, put together from the ranks' fragments."""
    pieces: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for file in sorted(checkpoint.glob("rank*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, start = key.rsplit("@", 1)
                pieces[name][int(start)] = tensors.get_tensor(key)
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


@pytest.mark.parametrize("index", range(1, len(KINDS)), ids=lambda index: f"in-{KINDS[index].name}")
def test_what_is_loaded_is_what_was_saved_bit_for_bit(folder: Path, index: int) -> None:
    """Weights, AdamW's moments and Muon's momentum, saved again by another engine before any step."""
    before: dict[str, Any] = joined(step_folder(folder / "muon", 3 * index))
    after = joined(step_folder(copy_folder(folder, index), 3 * index))
    assert {name.rsplit("/", 1)[1] for name in before} >= {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert before.keys() == after.keys()
    assert not any(name.startswith("model/head") for name in before)  # tied: saved once
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
