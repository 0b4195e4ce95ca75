"""evaluate on all sources of a mixture; and by windows that overlap."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llmtrain.checkpoint.load import load_model
from llmtrain.data.shards import TokenDataset
from llmtrain.data.sliding import SlidingWindows
from llmtrain.evaluate import main
from llmtrain.train import main as train
from tests.conftest import Call, is_one_clear_line, prose, records, small_config, write_data


@pytest.fixture
def mixture(data: Path, tmp_path: Path) -> Path:
    """The folder of a run on three sources, one of weight 0 at its end and one without validation data."""
    shout = write_data(tmp_path / "shout", {"train": prose(3_000), "val": prose(1_000, seed=5)[::-1]}, like=data)
    bare = write_data(tmp_path / "bare", {"train": prose(3_000, seed=6)}, like=data)
    config = small_config(data, tmp_path / "run")
    config["data"] = {"seq_len": 64, "sources": [
        {"name": "web", "path": str(data), "weight": 3}, {"path": str(shout), "weight": 1},
        {"path": str(bare), "weight": {0: 1, 5: 0}},
    ]}  # fmt: skip
    config["training"] |= {"max_steps": 8, "eval_every": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    train(["--config", str(tmp_path / "config.yaml")])
    return tmp_path / "run"


def result(call: Call, *arguments: object) -> dict[str, Any]:
    code, out, err = call(main, *arguments, "--json")
    assert (code, err) == (0, "")
    values: dict[str, Any] = json.loads(out)
    return values


def test_a_mixture_is_its_sources_and_their_mean_as_the_trainer_has_it(call: Call, mixture: Path) -> None:
    values = result(call, mixture / "step-00000004")
    trained = next(record for record in records(mixture) if record["step"] == 4)
    assert values["loss"] == pytest.approx(trained["val_loss"], abs=1e-6)
    assert values["accuracy"] == pytest.approx(trained["val_accuracy"], abs=1e-6)
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    assert values["sources"]["bare"] is None and set(values["sources"]) == {"web", "shout", "bare"}
    web, shout = values["sources"]["web"], values["sources"]["shout"]
    for name, one in (("web", web), ("shout", shout)):
        assert one["loss"] == pytest.approx(trained["sources"][name]["val_loss"], abs=1e-6)
        alone = result(call, mixture / "step-00000004", "--data", one["data"])
        assert {key: one[key] for key in one if key != "weight"} == {key: alone[key] for key in one if key != "weight"}
    assert (web["weight"], shout["weight"]) == (3.0, 1.0) and web["loss"] != shout["loss"]
    assert values["tokens"] == web["tokens"] + shout["tokens"]
    # A token of this text is a byte, so bits per byte weigh as tokens do.
    assert values["bits_per_byte"] == pytest.approx(0.75 * web["bits_per_byte"] + 0.25 * shout["bits_per_byte"])


def test_people_get_a_line_for_each_source(call: Call, mixture: Path) -> None:
    code, out, err = call(main, mixture)
    assert (code, err) == (0, "")
    table = out.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["source", "web", "shout", "bare"]
    assert table[3].endswith("no window of that split")
    assert call(main, mixture, "--split", "train")[0] == 0
    code, _, err = call(main, mixture, "--split", "test")
    assert code == 2 and is_one_clear_line(err) and "none of its sources has a window of 65 tokens in a test" in err


@pytest.mark.parametrize("stride", [1, 24, 64])
def test_overlapping_windows_count_every_target_once_with_all_the_model_can_see(
    call: Call, trained_run: Path, data: Path, tmp_path: Path, stride: int
) -> None:
    """By hand, target by target: how far back its window reaches follows from its place alone."""
    short = write_data(tmp_path / "short", {"train": prose(2_000), "val": prose(300, seed=9)}, like=data)
    values = result(call, trained_run, "--data", short, "--stride", stride)
    stream = TokenDataset(short).split("val")
    ids = torch.from_numpy(stream.gather(np.array([0]), len(stream))[0].astype(np.int64))
    nats = 0.0
    with load_model(trained_run) as trained, trained.engine.evaluating() as model:
        for target in range(1, len(ids)):
            # The first 64 are in the first window; then one ends every `stride` targets, and the last with the stream.
            later = max(0, -(-(target - 64) // stride))
            end = min(64 + later * stride, len(ids) - 1)
            inputs = ids[end - 64 : target]
            nats -= model(inputs[None])[0, -1].double().log_softmax(-1)[ids[target]].item()
    assert values["tokens"] == len(ids) - 1 and values["stride"] == stride
    assert values["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-6)


def test_more_context_is_a_lower_perplexity(call: Call, trained_run: Path) -> None:
    far, near = (result(call, trained_run, "--stride", stride)["perplexity"] for stride in (64, 8))
    assert near < far


@pytest.mark.parametrize(("tokens", "longest", "stride"), [(2, 8, 3), (9, 8, 8), (10, 8, 8), (30, 8, 3), (33, 8, 1)])
def test_every_target_is_counted_once_in_a_window_of_full_length(
    tmp_path: Path, tokens: int, longest: int, stride: int
) -> None:
    data = write_data(tmp_path / "data", {"train": prose(500)[:tokens]})
    windows = SlidingWindows(TokenDataset(data).split("train"), longest, stride)
    ids = np.arange(len(windows))
    rows, counted = windows.gather(ids), windows.counted(ids)
    assert rows.shape == (len(ids), min(longest, tokens - 1) + 1) and counted.sum() == tokens - 1
    seen = [token for row, count in zip(rows, counted.tolist(), strict=True) for token in row[-count:].tolist()]
    stream = windows.stream.gather(np.array([0]), tokens)[0].tolist()
    assert seen == stream[1:] and (counted[1:] <= stride).all() and (counted > 0).all()


def test_bad_strides_are_one_clear_line(call: Call, trained_run: Path) -> None:
    for stride, message in (("65", "--stride 65: is above the 64 tokens"), ("0", "must be a whole number")):
        code, out, err = call(main, trained_run, "--stride", stride)
        assert code == 2 and is_one_clear_line(err) and message in err and out == ""
