"""A checkpoint of any engine at any number of processes goes on in any other, as if nothing had happened.

Each engine is launched twice: to save, and to go on from what every engine has saved. LLMTRAIN_LONG_TESTS=1 goes on
to the end of the run, without it only across the next epoch's border.
"""

from __future__ import annotations

import itertools
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
from tests.test_train import numbers

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
OFFLOAD = Kind("cpu-zero3-offload", 2, 2)
THREE = Kind("ddp", 3, 4)
# What a rank drops is a function of (seed, step, rank): the same ranks draw it again after a resume.
DROPPING = [KINDS[1], KINDS[4]]
# Each interrupted in bf16; what one has saved the next one loads, and THREE at last.
IN_BF16 = [KINDS[1], KINDS[4], OFFLOAD]
HANDED_ON = list(itertools.pairwise([*IN_BF16, THREE]))
# 1 → 2 → 4 → 2 → 3 processes in one run: until which step each trains. What it did after its last save is done again.
ON_THE_WAY = {KINDS[0]: 6, KINDS[2]: 14, KINDS[5]: 22, OFFLOAD: 26, THREE: UNTIL}
# The launches of an uninterrupted run and of an interrupted one: which of them, and until which step.
IN_PARTS = ((True, 8), (False, 5), (False, 8))


@pytest.fixture(scope="module")
def folder(trained: Trained, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do everything: every engine goes on from every engine's checkpoint, one launch for each."""
    folder = tmp_path_factory.mktemp("resumed")
    for index, kind in enumerate([*KINDS, OFFLOAD, THREE]):
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
        for what, kinds, settings in (
            ("dropout", DROPPING, ["model.dropout=0.2"]),
            ("bf16", IN_BF16, ["training.precision=bf16", "training.eval_every=4"]),
        ):
            for is_whole, stop_after in IN_PARTS if kind in kinds else ():
                jobs.append(job(data, part_folder(folder, what, kind, is_whole), kind, stop_after, *settings))
        for saved, resumed in HANDED_ON:
            if kind == resumed:
                checkpoint = step_folder(part_folder(folder, "bf16", saved, is_whole=False), 5)
                handed = handed_folder(folder, saved)
                jobs.append(job(data, handed, kind, 5, "--resume", checkpoint, "training.precision=bf16"))
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


def part_folder(folder: Path, what: str, kind: Kind, is_whole: bool) -> Path:
    return folder / f"{what}-{kind.name}-{'whole' if is_whole else 'broken'}"


def handed_folder(folder: Path, saved: Kind) -> Path:
    return folder / f"handed-on-by-{saved.name}"


def assert_goes_on(run_dir: Path, reference: Path, after: int, until: int, rel: float) -> None:
    """Numbers and samples of the steps `after` to `until` are those of the uninterrupted run."""
    ours, theirs = metrics(run_dir), metrics(reference)[after:until]
    assert [record["step"] for record in ours] == list(range(after + 1, until + 1))
    for record, expected in zip(ours, theirs, strict=True):
        for key in ("train_loss", "val_loss"):
            assert (record[key] is None) == (expected[key] is None)
            assert record[key] is None or record[key] == pytest.approx(expected[key], rel=rel, abs=0.0), record["step"]
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


def test_a_run_on_1_then_2_then_4_then_2_then_3_processes_is_the_run_on_one(trained: Trained, folder: Path) -> None:
    """Each of them was killed after some steps that were not saved, which the next one does again. One offloads."""
    launches = json.loads((folder / "mixed" / "run.json").read_text())["launches"]
    assert [launch["launch"]["world_size"] for launch in launches] == [1, 2, 4, 2, 3]
    assert_goes_on(folder / "mixed", trained(*KINDS[0]), 0, UNTIL, FLOAT32)


def assert_the_same_bits(folder: Path, what: str, kind: Kind) -> Path:
    """Numbers, samples and state of the run that was interrupted are those of the other, which is returned."""
    broken, whole = (part_folder(folder, what, kind, is_whole) for is_whole in (False, True))
    assert_goes_on(broken, whole, 0, 8, rel=0.0)
    assert numbers(broken) == numbers(whole)
    assert different(joined(step_folder(whole, 8)), joined(step_folder(broken, 8))) == []
    return whole


@pytest.mark.parametrize("kind", DROPPING, ids=lambda kind: kind.name)
def test_every_rank_drops_what_it_would_have_dropped(trained: Trained, folder: Path, kind: Kind) -> None:
    whole = assert_the_same_bits(folder, "dropout", kind)
    without = [record["train_loss"] for record in metrics(trained(*KINDS[0]))[:8]]
    assert all(a["train_loss"] != b for a, b in zip(metrics(whole), without, strict=True))


@pytest.mark.parametrize("kind", IN_BF16, ids=lambda kind: kind.name)
def test_in_bf16_the_same_ranks_go_on_bit_for_bit(trained: Trained, folder: Path, kind: Kind) -> None:
    whole = assert_the_same_bits(folder, "bf16", kind)
    assert [record["step"] for record in metrics(whole) if record["val_loss"] is not None] == [4, 8]
    in_float32 = [record["train_loss"] for record in metrics(trained(*KINDS[0]))[:8]]
    assert all(a["train_loss"] != b for a, b in zip(metrics(whole), in_float32, strict=True))


@pytest.mark.parametrize(("saved", "resumed"), HANDED_ON, ids=lambda kind: kind.name)
def test_in_bf16_other_engines_and_ranks_get_every_bit_of_the_state(folder: Path, saved: Kind, resumed: Kind) -> None:
    """Loaded, and saved again before any step. From then on sums in another order turn roundings to bf16 about."""
    before = joined(step_folder(part_folder(folder, "bf16", saved, is_whole=False), 5))
    after = joined(step_folder(handed_folder(folder, saved), 5))
    [launch] = json.loads((handed_folder(folder, saved) / "run.json").read_text())["launches"]
    assert launch["launch"]["world_size"] == resumed.processes
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    assert {name.rsplit("/", 1)[1] for name in before} >= {"exp_avg", "exp_avg_sq", "step"}
    assert different(before, after) == []


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


def different(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """The tensors that differ in a bit, or that only one of the two has."""
    names = sorted(before.keys() | after.keys())
    return [n for n in names if n not in before or n not in after or not torch.equal(before[n], after[n])]


@pytest.mark.parametrize("index", range(1, len(KINDS)), ids=lambda index: f"in-{KINDS[index].name}")
def test_what_is_loaded_is_what_was_saved_bit_for_bit(folder: Path, index: int) -> None:
    """Weights, AdamW's moments and Muon's momentum, saved again by another engine before any step."""
    before: dict[str, Any] = joined(step_folder(folder / "muon", 3 * index))
    after = joined(step_folder(copy_folder(folder, index), 3 * index))
    assert {name.rsplit("/", 1)[1] for name in before} >= {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert not any(name.startswith("model/head") for name in before)  # tied: saved once
    assert different(before, after) == []
