"""Steps that go wrong on one rank of two: both skip them, go back together, and give up together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.health.guard import SKIPPED, Guard
from llmtrain.train import main
from tests import faulty_steps
from tests.conftest import small_config
from tests.distributed.launching import LAUNCH, launch, metrics

pytestmark = pytest.mark.slow

# One bad step that is borne, and within eight steps three that are not: back to step 10, samples 104 to 136 left out.
BAD = {32: "nan gradient", 104: "large loss", 120: "large gradient", 128: "nan gradient"}
STRETCH = (104, 136)
FLOAT32 = 1e-5  # sums in another order, see test_equality


def config_of(data: Path, run_dir: Path, optimizer: str = "adamw") -> dict[str, Any]:
    config = small_config(data, run_dir)
    config["optimizer"]["name"] = optimizer
    config["health"] = {"spike_window": 8, "max_skips": 3}
    config["logging"] |= {"every": 2}
    return config


def reference(data: Path, folder: Path, optimizer: str = "adamw") -> Path:
    """One process in which that update and that data are left out by other means."""
    config = config_of(data, folder / "reference", optimizer)
    path = folder / "reference.yaml"
    path.write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmtrain.train.accumulate", faulty_steps.faulty({32: "left out"}))
        patch.setattr(Guard, "load_state", faulty_steps.leaving_out(STRETCH))
        main(["--config", str(path)])
    return folder / "reference"


def launch_with(wrong: dict[int, str], name: str, config: dict[str, Any], **variables: str) -> Any:
    folder = LAUNCH
    if name == "cpu-zero2-offload":  # there is no such file, as little as a machine without a GPU needs it
        folder = Path(config["run"]["dir"]).parent
        text = (LAUNCH / "cpu-zero2.yaml").read_text()
        offload = "zero_stage: 2\n  offload_optimizer_device: cpu"
        (folder / f"{name}.yaml").write_text(text.replace("zero_stage: 2", offload))
    path = str(Path(faulty_steps.__file__).parents[1])
    return launch(
        name,
        2,
        config,
        folder,
        program=("-m", "tests.faulty_steps"),
        FAULTS=json.dumps(wrong),
        PYTHONPATH=path,
        **variables,
    )


@pytest.mark.parametrize(("name", "optimizer"), [
    ("cpu-ddp", "adamw"), ("cpu-zero1", "adamw"), ("cpu-zero2", "muon"), ("cpu-zero2-offload", "adamw"),
    ("cpu-zero3", "adamw"), ("cpu-zero3-offload", "sgd"),
])  # fmt: skip
def test_both_ranks_skip_what_went_wrong_on_one_and_go_back_together(
    data: Path, tmp_path: Path, name: str, optimizer: str
) -> None:
    expected = reference(data, tmp_path, optimizer)
    done = launch_with(BAD, name, config_of(data, tmp_path / "run", optimizer))
    assert done.returncode == 0, done.stderr[-4000:]
    run_dir = tmp_path / "run"
    entries = [json.loads(line) for line in (run_dir / SKIPPED).read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [5, 14, 16, 17, 17]
    assert all(len(entry["ids"]) == 8 for entry in entries[:4])
    assert entries[4]["left_out"] == list(STRETCH) and entries[4]["back_to"] == 10
    assert done.stderr.count("not applied") == 4 and done.stderr.count("going back to") == 1
    ours, theirs = metrics(run_dir), metrics(expected)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for record, other in zip(ours, theirs, strict=True):
        for key in ("train_loss", "grad_norm", "param_norm"):
            assert record[key] == pytest.approx(other[key], rel=FLOAT32), (record["step"], key)
        for key in ("learning_rate", "tokens", "epoch", "skipped"):
            assert record[key] == other[key], (record["step"], key)


def test_all_ranks_give_up_together_with_one_line_and_exit_code_3(data: Path, tmp_path: Path) -> None:
    always = dict.fromkeys(range(104, 8 * 60, 8), "nan gradient")
    code = tmp_path / "code"
    done = launch_with(always, "cpu-ddp", config_of(data, tmp_path / "run"), LLMTRAIN_EXIT_CODE_FILE=str(code))
    assert done.returncode != 0 and code.read_text() == "3\n"
    told = [line for line in done.stderr.splitlines() if line.startswith("llmtrain: error")]
    assert len(told) == 1 and "after 2 times going back" in told[0] and SKIPPED in told[0]
    assert 'Traceback (most recent call last):\n  File "/' not in done.stderr.split("llmtrain: error")[0]
