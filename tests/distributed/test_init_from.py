"""A Hugging Face folder starts the same training under every engine, and what each saves exports as the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtrain.export import main as export
from llmtrain.train import main as train
from tests.conftest import Call, small_config
from tests.distributed.launching import launch, metrics
from tests.test_export import tensors
from tests.test_init_from import make_folder

ENGINES = {"single": 1, "cpu-ddp": 2, "cpu-zero1": 2, "cpu-zero2": 2, "cpu-zero3": 2}
STEPS = 3


@pytest.mark.slow
def test_every_engine_goes_on_from_a_folder_alike(data: Path, tmp_path: Path, call: Call) -> None:
    # Half of a matrix with 35 rows ends within one.
    odd = {
        "hidden_size": 42,
        "num_attention_heads": 7,
        "num_key_value_heads": 7,
        "head_dim": 6,
        "intermediate_size": 35,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    }  # fmt: skip
    folder = make_folder(tmp_path / "hf", data, "Qwen2", shard="20KB", dtype=torch.bfloat16, **odd)
    exported, losses = {}, {}
    for name, processes in ENGINES.items():
        config = small_config(data, tmp_path / name)
        config["model"] = {"init_from": str(folder)}
        config["training"] |= {"max_steps": STEPS, "eval_every": None, "micro_batch_size": 4}
        config["logging"]["every"] = 1
        if processes == 1:
            (tmp_path / "single.yaml").write_text(json.dumps(config))
            code, _, err = call(train, "--config", tmp_path / "single.yaml")
        else:
            done = launch(name, processes, config)
            code, err = done.returncode, done.stderr
        assert code == 0, err[-4000:]
        assert err.count("stored in bfloat16, trained as float32") == 1
        losses[name] = [record["train_loss"] for record in metrics(tmp_path / name)]
        assert call(export, tmp_path / name, "--out", tmp_path / f"{name}-hf", "--shard-bytes", "30KB")[0] == 0
        exported[name] = tensors(tmp_path / f"{name}-hf")
    for name in ENGINES:
        assert len(losses[name]) == STEPS
        assert losses[name] == pytest.approx(losses["single"], rel=2e-6), name
        assert exported[name].keys() == exported["single"].keys()
        for key, tensor in exported["single"].items():
            torch.testing.assert_close(exported[name][key], tensor, rtol=0, atol=2e-5)
