"""evaluate: the trainer's own validation loss again, on the run's data or other data of the same tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.checkpoint.load import load_model
from llmtrain.data.shards import TokenDataset
from llmtrain.evaluate import main
from llmtrain.train import main as train
from tests.conftest import Call, Command, is_one_clear_line, prose, records, small_config, write_data


@pytest.fixture
def result(call: Call):
    def run(*arguments: object) -> dict[str, Any]:
        code, out, err = call(main, *arguments, "--json")
        assert (code, err) == (0, "")
        values: dict[str, Any] = json.loads(out)
        return values

    return run


@pytest.mark.parametrize("step", [10, 20, 30])
def test_it_equals_the_validation_of_the_trainer(result, trained_run: Path, step: int) -> None:
    trained = next(record for record in records(trained_run) if record["step"] == step)
    values = result(trained_run / f"step-{step:08d}")
    assert values["loss"] == pytest.approx(trained["val_loss"], abs=1e-6)
    assert values["accuracy"] == pytest.approx(trained["val_accuracy"], abs=1e-6)
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.precision=bf16"],
        ["training.eval_batches=2"],
        ["model.dropout=0.3", "model.tie_embeddings=false"],
        ["training.micro_batch_size=2", "data.stride=50"],
    ],
)
def test_it_does_so_for_any_setting(result, data: Path, tmp_path: Path, overrides: list[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small_config(data, tmp_path / "run")))
    train(["--config", str(config), "training.max_steps=3", *overrides])
    batches = ["--batches", "2"] if "training.eval_batches=2" in overrides else []
    [trained] = records(tmp_path / "run")
    with load_model(tmp_path / "run") as opened:
        same_precision = opened.config.training.precision == (
            "bf16" if "training.precision=bf16" in overrides else "fp32"
        )
    if not same_precision:
        pytest.skip("this device does not compute bf16 natively, so the model is evaluated in float32")
    assert result(tmp_path / "run", *batches)["loss"] == pytest.approx(trained["val_loss"], abs=1e-6)


def test_the_numbers_are_those_of_the_definition(result, trained_run: Path, data: Path) -> None:
    """Token by token over every whole window, in float64, without the code that batches."""
    values = result(trained_run, "--split", "val")
    dataset = TokenDataset(data)
    stream = dataset.split("val")
    ids = torch.from_numpy(stream.gather(np.array([0]), len(stream))[0].astype(np.int64))
    nats, right, count = 0.0, 0, 0
    with load_model(trained_run) as trained, trained.engine.evaluating() as model:
        for begin in range(0, len(ids) - 64, 64):
            window = ids[begin : begin + 65]
            log_probabilities = model(window[None, :-1])[0].double().log_softmax(-1)
            nats -= log_probabilities.gather(1, window[1:, None]).sum().item()
            right += int((log_probabilities.argmax(-1) == window[1:]).sum())
            count += 64
    assert values["tokens"] == count
    assert values["loss"] == pytest.approx(nats / count, abs=1e-6)
    assert values["accuracy"] == pytest.approx(right / count)
    info = dataset.manifest.splits["val"]
    assert values["bits_per_byte"] == pytest.approx(
        nats / count / math.log(2) * info.tokens / info.text_bytes, abs=1e-6
    )


def test_other_data_and_another_split(result, trained_run: Path, data: Path, tmp_path: Path) -> None:
    text = prose(12_000)
    other = write_data(tmp_path / "other", {"train": text, "val": prose(1_500, seed=1), "test": text[:2000]})
    values = result(trained_run, "--data", other, "--split", "test")
    assert values["data"] == str(other)
    assert values["tokens"] == (2000 - 1) // 64 * 64
    assert result(trained_run, "--split", "train")["tokens"] == (12_000 - 1) // 64 * 64


def test_people_get_a_table(call: Call, trained_run: Path) -> None:
    code, out, err = call(main, trained_run)
    assert (code, err) == (0, "")
    names = [line.split("  ")[-2].strip() for line in out.splitlines()]
    assert names == ["checkpoint", "data", "loss", "perplexity", "accuracy", "bits per byte"]


def test_bad_input_gets_one_clear_line(call: Call, trained_run: Path, data: Path, tmp_path: Path) -> None:
    foreign = write_data(tmp_path / "foreign", {"train": "another alphabet: äöü " * 200, "val": "äöü " * 100})
    short = write_data(tmp_path / "short", {"train": prose(12_000), "val": prose(1_500, seed=1), "test": "The cat"})
    for arguments, message in [
        ([trained_run, "--data", foreign], "another tokenizer"),
        ([trained_run, "--split", "test"], "no split 'test'; it has train, val"),
        ([trained_run, "--data", short, "--split", "test"], "7 tokens, and one window of this model takes 65"),
        ([trained_run, "--data", tmp_path / "none"], "not prepared data (no such folder)"),
        ([trained_run, "--batches", "0"], "--batches: must be a whole number of at least 1"),
        ([tmp_path / "none"], "no such folder"),
    ]:
        code, out, err = call(main, *arguments)
        assert code == 2 and is_one_clear_line(err) and message in err, err
        assert out == ""


@pytest.mark.slow
def test_data_that_has_moved_is_asked_for(result, tmp_path: Path, llmtrain: Command) -> None:
    here = write_data(tmp_path / "here", {"train": prose(3000), "val": prose(500)})
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small_config(here, tmp_path / "run")))
    train(["--config", str(config), "training.max_steps=1"])
    here.rename(tmp_path / "there")
    refused = llmtrain("evaluate", tmp_path / "run")
    assert refused.returncode == 2 and is_one_clear_line(refused.stderr) and "name it by --data" in refused.stderr
    assert result(tmp_path / "run", "--data", tmp_path / "there")["data"] == str(tmp_path / "there")
