"""A vocabulary padded to a multiple: trained, resumed and evaluated like any other; no padded id is ever written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.checkpoint.load import load_model
from llmtrain.data.shards import TokenDataset
from llmtrain.evaluate import main as evaluate
from llmtrain.generate import main as generate
from llmtrain.train import main as train
from tests.conftest import Call, is_one_clear_line, records, small_config

MULTIPLE = 512  # nearly all ids are padding, so that a fresh model would choose it all the time
WRITTEN = 40


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    raw = small_config(data, tmp_path / "run")
    raw["model"]["vocab_multiple"] = MULTIPLE
    raw["optimizer"] = {"lr": 1e-6}  # the model stays as it begins
    raw["schedule"] = {"min_lr": 0.0}
    raw["training"] |= {"max_steps": 4, "eval_every": 2, "sample_every": 2, "sample_tokens": WRITTEN}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw))
    return path


def test_no_padded_id_is_written_or_counted(config: Path, data: Path, tmp_path: Path, call: Call) -> None:
    assert call(train, "--config", config, "training.stop_after=2")[0] == 75
    assert call(train, "--config", config)[0] == 0, "a resume keeps the padding"
    run = tmp_path / "run"
    with load_model(run / "final") as trained, trained.engine.evaluating() as model:
        vocab_size = trained.tokenizer.vocab_size
        assert vocab_size < MULTIPLE // 8
        assert trained.config.model.vocab_size == model.embedding.weight.shape[0] == MULTIPLE
        stream = TokenDataset(data).split("val")
        windows = (len(stream) - 1) // 64
        ids = torch.tensor(stream.gather(np.arange(windows) * 64, 65).astype(np.int64))
        with torch.no_grad():
            logits = model(ids[:, :-1])
        own = (logits[..., :vocab_size].argmax(-1) == ids[:, 1:]).double().mean().item()
        among_all = (logits.argmax(-1) == ids[:, 1:]).double().mean().item()
        assert own > 2 * among_all, "or this test could not fail"
    code, out, _ = call(evaluate, run / "final", "--json")
    assert code == 0
    assert json.loads(out)["accuracy"] == pytest.approx(own)
    assert records(run)[-1]["val_accuracy"] == pytest.approx(own)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 4]
    # Every id is a character, but for the end of a document; a padded id would be none.
    assert all(len(sample["text"]) >= WRITTEN - 8 for sample in samples)
    code, out, _ = call(generate, run, "--json", "--num-samples", 8, "--max-new-tokens", 30, "--temperature", 2)
    assert code == 0
    for sample in json.loads(out)["samples"]:
        assert len(sample["text"]) == sample["tokens"]


def test_a_run_keeps_its_padding_and_padding_cannot_be_added_later(config: Path, tmp_path: Path, call: Call) -> None:
    assert call(train, "--config", config, "training.stop_after=2")[0] == 75
    for change in ("model.vocab_multiple=1", "model.vocab_multiple=1024"):
        code, _, err = call(train, "--config", config, change)
        assert code == 2 and is_one_clear_line(err) and "model.vocab_size" in err, err
    saved = tmp_path / "run" / "config.yaml"
    assert f"vocab_size: {MULTIPLE}" in saved.read_text()
    assert call(train, "--config", saved, "training.stop_after=null")[0] == 0, "the resolved config is the same run"


@pytest.mark.parametrize(("ids", "multiple", "padded"), [(50_257, 128, 50_304), (50_304, 128, 50_304), (7, 1, 7)])
def test_the_multiple_is_the_next_and_a_size_that_is_given_wins(ids: int, multiple: int, padded: int) -> None:
    from tests.test_config import make_config, settled

    model: dict[str, Any] = {"vocab_multiple": multiple}
    assert settled(make_config({"model": model}), vocab_size=ids).model.vocab_size == padded
    given = make_config({"model": {**model, "vocab_size": 60_001}})
    assert settled(given, vocab_size=ids).model.vocab_size == 60_001
