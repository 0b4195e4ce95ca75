"""More sets to evaluate beside the main one: each under its name, and none of them decides but where no other can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.errors import Stopped, UserError
from llmtrain.evaluate import main as evaluate
from llmtrain.observe.record import Record
from llmtrain.observe.sinks import scalars
from llmtrain.train import main
from tests.conftest import Call, prose, records, small_config, write_data

Config = dict[str, Any]


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Config:
    write_data(tmp_path / "held", {"train": prose(2_000), "val": prose(700, seed=7)}, like=data)
    write_data(tmp_path / "back", {"train": prose(2_000)[::-1], "test": prose(500, seed=8)[::-1]}, like=data)
    config = small_config(data, tmp_path / "run")
    config["training"] |= {"max_steps": 12, "eval_every": 4}
    config["data"]["validation"] = [
        {"path": str(tmp_path / "held")}, {"path": str(tmp_path / "back"), "name": "backwards", "split": "test"},
    ]  # fmt: skip
    return config


def run(config: Config, *arguments: str, name: str = "run") -> Path:
    folder = Path(config["run"]["dir"]).with_name(name)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | {"run": {"dir": str(folder)}}))
    main(["--config", str(path), *arguments])
    return folder


def test_each_set_is_evaluated_on_its_own_and_decides_nothing(
    config: Config, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(config)
    assert "val/held " in capsys.readouterr().out
    rows = records(folder)
    assert ["validation" in row for row in rows] == [row["val_loss"] is not None for row in rows]
    last = rows[-1]["validation"]
    assert set(last) == {"held", "backwards"} and last["held"]["loss"] < last["backwards"]["loss"]
    for name, arguments in (("held", []), ("backwards", ["--split", "test"])):
        path = next(one["path"] for one in config["data"]["validation"] if one.get("name", "held") == name)
        _, out, _ = call(evaluate, folder / "step-00000012", "--data", path, *arguments, "--json")
        assert last[name]["loss"] == pytest.approx(json.loads(out)["loss"], abs=1e-6)
        assert last[name]["accuracy"] == pytest.approx(json.loads(out)["accuracy"], abs=1e-6)
    record = Record.from_json(json.dumps(rows[-1]))
    assert record.to_json() == json.dumps(rows[-1])
    assert scalars(record)["val/held/loss"] == last["held"]["loss"]
    plain = config | {"data": {key: value for key, value in config["data"].items() if key != "validation"}}
    for ours, theirs in zip(rows, records(run(plain, name="plain")), strict=True):
        assert (ours["train_loss"], ours["val_loss"]) == (theirs["train_loss"], theirs["val_loss"])


def test_evaluate_has_a_row_for_each_set(config: Config, call: Call, tmp_path: Path) -> None:
    folder = run(config)
    trained = records(folder)[-1]
    _, out, _ = call(evaluate, folder / "step-00000012", "--json")
    values = json.loads(out)
    assert values["loss"] == pytest.approx(trained["val_loss"], abs=1e-6)
    assert list(values["validation"]) == ["held", "backwards"] and values["validation"]["backwards"]["split"] == "test"
    for name, one in values["validation"].items():
        assert one["loss"] == pytest.approx(trained["validation"][name]["loss"], abs=1e-6)
        _, alone, _ = call(evaluate, folder / "step-00000012", "--data", one["data"], "--split", one["split"], "--json")
        assert one == {key: json.loads(alone)[key] for key in one}
    text = call(evaluate, folder / "step-00000012")[1].split("\n\n")[1].splitlines()
    assert [line.split()[:2] for line in text] == [["set", "split"], ["held", "val"], ["backwards", "test"]]
    assert f"{values['validation']['held']['loss']:.6g}" in text[1]
    held = tmp_path / "held"
    held.rename(tmp_path / "elsewhere")
    values["validation"]["held"] = None
    assert json.loads(call(evaluate, folder / "step-00000012", "--json")[1]) == values
    assert "held  not here, or no window of that split" in call(evaluate, folder / "step-00000012")[1]


def test_evaluate_without_validation_data_of_its_own_is_of_the_first_set(
    config: Config, call: Call, tmp_path: Path
) -> None:
    bare = write_data(tmp_path / "bare", {"train": prose(3_000)}, like=Path(config["data"]["path"]))
    config["data"]["path"] = str(bare)
    folder = run(config)
    values = json.loads(call(evaluate, folder / "step-00000012", "--json")[1])
    assert values["loss"] == values["validation"]["held"]["loss"]
    assert values["loss"] == pytest.approx(records(folder)[-1]["val_loss"], abs=1e-6)
    assert values["data"] == str(tmp_path / "held")
    assert "no split 'tset'" in call(evaluate, folder, "--split", "tset")[2]


def test_without_validation_data_of_its_own_a_run_is_judged_by_the_first_set(config: Config, tmp_path: Path) -> None:
    """Another set first on a resume: what is best is found anew."""
    bare = write_data(tmp_path / "bare", {"train": prose(3_000)}, like=Path(config["data"]["path"]))
    config["data"]["path"] = str(bare)
    config["training"]["early_stopping_patience"] = 9
    with pytest.raises(Stopped):
        run(config, "training.stop_after=8")
    config["data"]["validation"].reverse()
    rows = [row for row in records(run(config)) if row["val_loss"] is not None]
    assert [row["val_loss"] == row["validation"]["held"]["loss"] for row in rows] == [True, True, False]
    assert rows[-1]["val_loss"] == rows[-1]["validation"]["backwards"]["loss"]
    assert (tmp_path / "run" / "best").resolve().name == "step-00000012"


def test_a_set_of_the_same_name_with_other_tokens_is_another_judge(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(config["data"]["path"])
    config["data"]["path"] = str(write_data(tmp_path / "bare", {"train": prose(3_000)}, like=own))
    config["data"]["validation"] = config["data"]["validation"][:1]
    with pytest.raises(Stopped):
        run(config, "training.stop_after=8")
    other = write_data(tmp_path / "other" / "held", {"val": prose(600)[::-1]}, like=own)
    config["data"]["validation"][0] |= {"path": str(other)}
    run(config)
    assert "changed since then: what validation measures; the best checkpoint is chosen anew" in capsys.readouterr().out


def test_a_resume_may_change_the_sets_and_says_so(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped):
        run(config, "training.stop_after=5")
    del config["data"]["validation"][1]
    rows = records(run(config))
    assert "changed since then: data.validation: " in capsys.readouterr().out
    assert set(rows[-1]["validation"]) == {"held"}


def test_sets_of_a_mixture_may_have_the_names_of_sources(config: Config) -> None:
    held = config["data"]["validation"][0]["path"]
    own = config["data"].pop("path")
    config["data"]["sources"] = [{"path": own, "weight": 1, "name": "held"}, {"path": held, "weight": 1, "name": "b"}]
    last = records(run(config))[-1]
    assert last["sources"]["b"]["val_loss"] == last["validation"]["held"]["loss"] != last["sources"]["held"]["val_loss"]


@pytest.mark.parametrize(("change", "reason"), [
    ({"name": "backwards"}, "two sets of validation are called 'backwards'"),
    ({"split": "dev"}, "no split 'dev'"),
    ({"path": "nowhere"}, "nowhere: not prepared data"),
    ({"heft": 1}, "data.validation.0.heft"),
    ({"path": "OTHER"}, "was prepared with another tokenizer"),
    ({"path": "SHORT"}, "the val split of SHORT has 9 tokens, and one window takes 65"),
])  # fmt: skip
def test_bad_sets_are_one_clear_line(config: Config, tmp_path: Path, change: Config, reason: str) -> None:
    data = Path(config["data"]["path"])
    write_data(tmp_path / "OTHER", {"train": prose(900).upper(), "val": prose(900).upper()})
    write_data(tmp_path / "SHORT", {"train": prose(900), "val": "the cats."}, like=data)
    for name in ("OTHER", "SHORT"):
        if change.get("path") == name:
            change = {"path": str(tmp_path / name)}
            reason = reason.replace(name, str(tmp_path / name))
    config["data"]["validation"][0].update(change)
    with pytest.raises(UserError) as error:
        run(config)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert not Path(config["run"]["dir"]).exists()
