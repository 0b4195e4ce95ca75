"""Weights whose first values a checkpoint brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmtrain.train
from llmtrain.assemble import Assembly, assemble
from llmtrain.checkpoint.folders import step_folder
from llmtrain.config import RunConfig, make_config
from llmtrain.engine import Engine, make_engine
from llmtrain.model.undrawn import Undrawn
from llmtrain.train import main

Config = dict[str, Any]


def test_nothing_is_drawn_and_what_nothing_overwrites_is_no_number(config_dict: Config) -> None:
    config = make_config(config_dict)
    found = []
    for is_drawn in (True, False):
        engine = make_engine(60.0)
        torch.manual_seed(config.run.seed)
        state = torch.cuda.get_rng_state if engine.device.type == "cuda" else torch.get_rng_state
        before = state()
        assemble(config, engine, is_drawn=is_drawn)
        assert torch.equal(before, state()) == (not is_drawn)
        found.append({fragment.name: fragment.values for fragment in engine.to_fill(optimizer=False)})
        engine.close()
    drawn, undrawn = found
    assert drawn.keys() == undrawn.keys()
    for name, values in undrawn.items():
        assert values.isnan().all() or torch.equal(values, drawn[name]), name
    assert sum(bool(values.isnan().any()) for values in undrawn.values()) > len(undrawn) / 2
    with Undrawn():
        assert torch.ones(2).add_(1).tolist() == [2, 2]
        assert torch.nn.init.ones_(torch.zeros(2)).tolist() == [1, 1]
    assert not torch.nn.init.normal_(torch.ones(3)).isnan().any()


@pytest.mark.parametrize(
    ("resume", "folder", "is_drawn"),
    [
        ("auto", "run", False),
        ("auto", "other", True),
        ("never", "other", True),
        ("{run}", "other", True),
        ("{other}", "other", True),
        ("{step}", "run", False),
    ],
)
def test_only_a_new_run_draws(
    trained_run: Path, config_dict: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str, folder: str,
    is_drawn: bool,
) -> None:  # fmt: skip
    """That a resumed run goes on with the same bits is in test_train.py; here, that it has not drawn any before."""
    drew: list[bool] = []

    def spied(config: RunConfig, engine: Engine, **options: Any) -> Assembly:
        drew.append(options["is_drawn"])
        return assemble(config, engine, **options)

    monkeypatch.setattr(llmtrain.train, "assemble", spied)
    run_dir = trained_run if folder == "run" else tmp_path / "other"
    config = tmp_path / "config.yaml"
    config.write_text((trained_run / "config.yaml").read_text())
    start = resume.format(run=trained_run, other=run_dir, step=step_folder(trained_run, 10))
    main(["--config", str(config), "--resume", start, "--dry-run", f"run.dir={run_dir}"])
    assert drew == [is_drawn]
