"""The training loss of each source of a mixture, beside the very same loss of the whole."""

from __future__ import annotations

import copy
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llmtrain.assemble import assemble
from llmtrain.config import make_config
from llmtrain.engine import make_engine
from llmtrain.engine.processes import Processes
from llmtrain.errors import Stopped
from llmtrain.observe.loss_sums import LossSums
from llmtrain.train import main
from tests.conftest import prose, records, small_config, write_data
from tests.distributed.launching import launch
from tests.faulty_steps import faulty

Config = dict[str, Any]


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Config:
    """Three sources, of which the second comes from step 10 on; the last batch of an epoch is whole in a mixture."""
    shout = write_data(tmp_path / "shout", {"train": prose(3_000, seed=3)[::-1]}, like=data)
    rare = write_data(tmp_path / "rare", {"train": "the cat sat. " * 200}, like=data)
    config = small_config(data, tmp_path / "run")
    del config["data"]["path"]
    config["data"]["sources"] = [
        {"name": "web", "path": str(data), "weight": 5},
        {"name": "shout", "path": str(shout), "weight": {10: 2}},
        {"name": "rare", "path": str(rare), "weight": 1},
    ]
    config["training"] |= {"micro_batch_size": 3, "global_batch_size": 9, "max_steps": 20, "eval_every": None}
    config["logging"] |= {"every": 6, "sample_ledger": True}
    return config


def run(config: Config, *arguments: str, name: str = "run") -> Path:
    config = copy.deepcopy(config)
    folder = Path(config["run"]["dir"]).with_name(name)
    config["run"]["dir"] = str(folder)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    main(["--config", str(path), *arguments])
    return folder


def unmoved(config: Config) -> Config:
    """A run whose weights never change, so that the loss of each of its samples can be computed afterwards."""
    config["optimizer"] = {"name": "sgd", "lr": 0.0}
    config["schedule"] = {"name": "constant", "warmup_steps": 0}
    return config


def by_hand(config: Config, folder: Path, left_out: tuple[int, ...] = ()) -> dict[int, dict[str, float]]:
    """By step of a record: the mean loss of each source's windows since the one before, in float64."""
    with closing(make_engine(60.0)) as engine:
        parts = assemble(make_config(config), engine)
        bounds = np.cumsum([len(source) for source in parts.train.sources])  # type: ignore[attr-defined]
        losses: dict[str, list[float]] = {}
        found = {}
        lines = (folder / "samples-rank00000.jsonl").read_text().splitlines()
        for step, ids in ((line["step"], line["ids"]) for line in map(json.loads, lines)):
            if step not in left_out:
                for window in ids:
                    tokens = parts.train.gather(np.array([window])).long()
                    with engine.evaluating() as model:
                        log_p = model(tokens[:, :-1]).double().log_softmax(-1)
                    loss = -log_p.gather(2, tokens[:, 1:, None]).mean().item()
                    name = config["data"]["sources"][int(np.searchsorted(bounds, window, "right"))]["name"]
                    losses.setdefault(name, []).append(loss)
            if step % 6 == 0 or step == 20:
                found[step] = {name: sum(values) / len(values) for name, values in losses.items()}
                losses = {}
    return found


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_it_is_the_mean_over_the_sources_own_targets_of_applied_steps(
    config: Config, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: bool
) -> None:
    """Step 8 is skipped; where the host does not see it at once, the device leaves it out."""
    monkeypatch.setattr(Processes, "host_sees_all", not as_on_a_gpu)
    monkeypatch.setattr("llmtrain.train.accumulate", faulty({63: "nan loss"}))
    folder = run(unmoved(config))
    rows = records(folder)
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0]
    expected = by_hand(config, folder, left_out=(8,))
    assert set(expected[6]) == {"web", "rare"} and set(expected[12]) == {"web", "shout", "rare"}
    for row in rows:
        losses = {name: source["train_loss"] for name, source in row["sources"].items()}
        assert losses == {"web": None, "shout": None, "rare": None} | {
            name: pytest.approx(loss, abs=2e-6) for name, loss in expected[row["step"]].items()
        }
        assert len({round(loss, 3) for loss in losses.values() if loss}) == len(expected[row["step"]])


def test_it_changes_no_bit_of_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = records(run(config))
    monkeypatch.setattr(LossSums, "by_row", False)
    monkeypatch.setattr(LossSums, "by_source", lambda _: None)

    def add(sums: LossSums, loss: torch.Tensor) -> None:
        sums._total = loss if sums._total is None else sums._total + loss

    monkeypatch.setattr(LossSums, "add", add)
    without = records(run(config, name="without"))
    assert [(row["train_loss"], row["grad_norm"], row["param_norm"]) for row in with_it] == [
        (row["train_loss"], row["grad_norm"], row["param_norm"]) for row in without
    ]
    assert without[-1]["sources"]["web"]["train_loss"] is None


def test_a_run_on_one_source_asks_for_no_rows(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = LossSums.add

    def add(sums: LossSums, losses: torch.Tensor) -> None:
        asked.append((sums.by_row, losses.shape))
        plain(sums, losses)

    monkeypatch.setattr(LossSums, "add", add)
    del config["data"]["sources"][1:]
    folder = run(config)
    assert set(asked) == {(False, torch.Size([]))}
    assert all("sources" not in row for row in records(folder))


def test_an_interrupted_interval_keeps_its_sums(config: Config) -> None:
    whole = run(config)
    for stop_after in (4, 11):
        with pytest.raises(Stopped):
            run(config, f"training.stop_after={stop_after}", name="cut")
    assert [row["sources"] for row in records(run(config, name="cut"))] == [row["sources"] for row in records(whole)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "micro"), [("cpu-ddp", 1), ("cpu-zero3", 3)])
def test_two_processes_log_what_one_does(config: Config, tmp_path: Path, name: str, micro: int) -> None:
    """Also where one of them began alone: three rows of a global batch of nine, then on two ranks by one or three."""
    config["training"]["global_batch_size"] = 6
    one = records(run(config))
    with pytest.raises(Stopped):
        run(config, "training.stop_after=3", name="two")
    config["run"]["dir"] = str(tmp_path / "two")
    config["training"]["micro_batch_size"] = micro
    done = launch(name, 2, config)
    assert done.returncode == 0, done.stderr[-4000:]
    two = records(tmp_path / "two")
    for ours, theirs in zip(two, one, strict=True):
        for source, values in ours["sources"].items():
            loss = theirs["sources"][source]["train_loss"]
            assert values["train_loss"] == (loss and pytest.approx(loss, rel=1e-5)), (ours["step"], source)
    assert math.isclose(two[-1]["train_loss"], one[-1]["train_loss"], rel_tol=1e-5)
