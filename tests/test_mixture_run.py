"""A run on several sources: what it trains on, what it says of each, and going on with it."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.assemble import assemble
from llmtrain.checkpoint.progress import Progress
from llmtrain.config import make_config
from llmtrain.engine import make_engine
from llmtrain.errors import Stopped, UserError
from llmtrain.observe.record import Record
from llmtrain.observe.validation import Validation, mixed
from llmtrain.train import main
from tests.conftest import prose, records, small_config, write_data

Config = dict[str, Any]
WEB_WINDOWS, CODE_WINDOWS = 187, 14


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Config:
    """Three quarters of a source that lasts, one quarter of one that is gone through many times."""
    code = write_data(tmp_path / "code", {"train": prose(925, seed=3), "val": prose(300, seed=4)}, like=data)
    config = small_config(data, tmp_path / "run")
    del config["data"]["path"]
    config["data"]["sources"] = [
        {"name": "web", "path": str(data), "weight": 0.75},
        {"path": str(code), "weight": 0.25},
    ]
    config["logging"]["sample_ledger"] = True
    return config


def run(config: Config, *arguments: str) -> Path:
    folder = Path(config["run"]["dir"])
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    main(["--config", str(path), *arguments])
    return folder


def steps_of(folder: Path) -> list[list[int]]:
    return [json.loads(line)["ids"] for line in (folder / "samples-rank00000.jsonl").read_text().splitlines()]


def of_code(ids: list[int]) -> int:
    return sum(window >= WEB_WINDOWS for window in ids)


def test_every_step_has_its_shares_and_every_source_its_record(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(config)
    assert [of_code(ids) for ids in steps_of(folder)] == [2] * 30
    seen = Counter(window for ids in steps_of(folder) for window in ids)
    assert {count for window, count in seen.items() if window >= WEB_WINDOWS} == {4, 5}  # 60 samples of 14 windows
    rows = records(folder)
    last = rows[-1]["sources"]
    assert last["web"]["epochs"] == 180 / WEB_WINDOWS and last["code"]["epochs"] == 60 / CODE_WINDOWS
    assert last["code"]["tokens"] == 60 * 64
    mean = 0.75 * last["web"]["val_loss"] + 0.25 * last["code"]["val_loss"]
    assert (
        rows[-1]["val_loss"] == pytest.approx(mean, rel=1e-12) and last["web"]["val_loss"] != last["code"]["val_loss"]
    )
    assert Record.from_json(json.dumps(rows[-1])).to_json() == json.dumps(rows[-1])
    assert rows[0]["sources"]["web"]["val_loss"] is None
    told = capsys.readouterr().out
    assert "source code: all of it was seen, and it comes in a new order for the 2nd time" in told
    assert "source web: all of it" not in told


def test_an_interrupted_mixture_goes_on_as_if_it_had_not_been(config: Config, tmp_path: Path) -> None:
    config["data"]["sources"][1]["weight"] = {0: 0.25, 12: 0.5, 20: 0}
    config["data"]["sources"][0]["weight"] = {0: 0.75, 12: 0.5}
    whole = run(config)
    assert [of_code(ids) for ids in steps_of(whole)] == [2] * 12 + [4] * 8 + [0] * 10
    cut = copy.deepcopy(config)
    cut["run"]["dir"] = str(tmp_path / "cut")
    for stop_after in (7, 8, 9):
        with pytest.raises(Stopped):
            run(cut, f"training.stop_after={stop_after}")
    folder = run(cut)
    assert steps_of(folder) == steps_of(whole)
    for ours, theirs in zip(records(folder), records(whole), strict=True):
        assert (ours["train_loss"], ours["val_loss"], ours["sources"]) == (
            theirs["train_loss"], theirs["val_loss"], theirs["sources"]
        )  # fmt: skip


def test_other_weights_and_batches_from_now_on_repeat_nothing(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sources go on where they were: over the whole run each window of an epoch comes once."""
    with pytest.raises(Stopped):
        run(config, "training.stop_after=10")
    config["data"]["sources"][1]["weight"] = {0: 0.75, 20: 0.25}
    config["training"]["global_batch_size"] = 4
    folder = run(config)
    assert "changed since then: data.sources" in capsys.readouterr().out
    steps = steps_of(folder)
    assert [of_code(ids) for ids in steps] == [2] * 10 + [2] * 10 + [1] * 10
    own = [window for ids in steps for window in ids if window >= WEB_WINDOWS]
    epochs = [own[at : at + CODE_WINDOWS] for at in range(0, len(own), CODE_WINDOWS)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs) and len(epochs) == 4
    web = [window for ids in steps for window in ids if window < WEB_WINDOWS]
    assert len(set(web)) == len(web) == 6 * 10 + 2 * 10 + 3 * 10


def test_one_source_is_the_same_run_as_its_path(config: Config, data: Path, tmp_path: Path) -> None:
    del config["data"]["sources"][1]
    one = run(config)
    plain = small_config(data, tmp_path / "plain")
    plain["logging"]["sample_ledger"] = True
    assert steps_of(run(plain)) == steps_of(one)
    with pytest.raises(UserError, match="holds another run"):
        run(config | {"run": {"dir": plain["run"]["dir"]}}, "--resume", "never")
    plain["training"]["max_steps"] = 40
    plain["run"]["dir"] = str(one)
    assert len(steps_of(run(plain))) == 40


@pytest.mark.parametrize(("change", "reason"), [
    ({"weight": -1}, "data.sources.1.weight: Input should be greater than or equal to 0"),
    ({"weight": float("nan")}, "data.sources.1.weight"),
    ({"weight": {}}, "data.sources.1.weight"),
    ({"weight": {-5: 1.0}}, "data.sources.1.weight"),
    ({"weight": "much"}, "data.sources.1.weight"),
    ({"name": "web"}, "two sources are called 'web'"),
    ({"heft": 1}, "data.sources.1.heft"),
    ({"path": "nowhere"}, "nowhere: not prepared data"),
])  # fmt: skip
def test_bad_sources_are_one_clear_line(config: Config, change: Config, reason: str) -> None:
    config["data"]["sources"][1].update(change)
    with pytest.raises(UserError) as error:
        run(config)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert not Path(config["run"]["dir"]).exists()


def test_sources_that_do_not_fit_together_are_named(config: Config, tmp_path: Path) -> None:
    sources = config["data"]["sources"]

    def refused(*arguments: str) -> str:
        with pytest.raises(UserError) as error:
            run(config, *arguments)
        return str(error.value)

    for source in sources:
        source["weight"] = {0: 1, 10: 0}
    assert "all weights of sources are 0 after 10 steps" in refused()
    for source in sources:
        source["weight"] = {5: 1}
    assert "all weights of sources are 0 after 0 steps" in refused()
    sources[0]["weight"] = sources[1]["weight"] = 1
    write_data(tmp_path / "letters", {"train": prose(9_000).upper(), "val": prose(900).upper()})
    other = f"[{{path: {sources[0]['path']}, weight: 1}}, {{path: {tmp_path / 'letters'}, weight: 1}}]"
    assert f"{tmp_path / 'letters'} was prepared with another tokenizer (char" in refused(f"data.sources={other}")
    short = write_data(tmp_path / "short", {"train": prose(9_000)[:50] + prose(9_000)[50:64]})
    assert f"{short} has 64 training tokens" in refused(f"data.sources=[{{path: {short}, weight: 1}}]")
    assert "sources is empty" in refused("data.sources=[]")
    config["data"]["path"] = "data/book"
    assert "path and sources contradict each other" in refused()


def test_what_the_validation_loss_of_a_mixture_weighs(config: Config) -> None:
    """The sources as in the last step, not as after it; those of weight 0 not at all."""
    config["data"]["sources"][1]["weight"] = {0: 0.25, 20: 0.5, 30: 0}
    with closing(make_engine(60.0)) as engine:
        parts = assemble(make_config(config), engine)
        assert parts.warnings == []
        assert parts.last_weights(30) == {"web": 0.75, "code": 0.5} and parts.last_weights(31)["code"] == 0
    web, code = Validation(1.0, 0.5, 10), Validation(math.nan, 0.0, 10)
    assert mixed({"web": web, "code": code}, {"web": 0.75, "code": 0.0}).loss == 1.0
    assert math.isnan(mixed({"web": web, "code": code}, {"web": 0.75, "code": 0.5}).loss)
    assert mixed({"web": web}, {"web": 0.0, "code": 1.0}).loss == 1.0
    progress = Progress()
    assert not progress.judge_by([{"web": 1.0}, False]) and progress.validated(2.0)
    assert not progress.judge_by([{"web": 1.0}, False]) and progress.best_val_loss == 2.0
    assert progress.judge_by([{"web": 0.5}, False]) and progress.best_val_loss is None


def test_what_is_not_as_one_would_think_is_told(config: Config, tmp_path: Path) -> None:
    code = write_data(tmp_path / "bare", {"train": prose(925, seed=3)}, like=Path(config["data"]["sources"][0]["path"]))
    config["data"]["sources"][1] = {"path": str(code), "weight": 1e-6}
    with closing(make_engine(60.0)) as engine:
        told = assemble(make_config(config), engine).warnings
    assert "bare has 1.3e-06 of all tokens by its weight and gets 1e-05" in told[0]
    assert "bare has no validation window, so val_loss is that of the others" in told[1]
