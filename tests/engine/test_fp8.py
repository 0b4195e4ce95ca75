"""fp8: who may, what it changes, and that a run with it is a run like others. Emulated: there is no GPU here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from llmtrain import evaluate
from llmtrain.config import make_config
from llmtrain.engine import fp8
from llmtrain.errors import UserError
from llmtrain.model.transformer import Transformer
from llmtrain.resolve import resolve
from llmtrain.train import main
from tests.conftest import Call, is_one_clear_line, records

FACTS: dict[str, Any] = {"vocab_size": 65, "world_size": 1, "compile_auto": False}


@pytest.fixture
def train(call: Call, config_dict: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Train in the folder `name`, with these settings of `training`; return the exit code and stderr."""

    def run(name: str, *overrides: str, **training: Any) -> tuple[int, str]:
        config = {**config_dict, "run": {"dir": str(tmp_path / name)}}
        config["training"] = {**config["training"], "precision": "bf16", **training}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        code, _, err = call(main, "--config", tmp_path / "config.yaml", *overrides)
        return code, err

    return run


def test_without_the_hardware_it_is_refused_in_one_line(train: Any, tmp_path: Path) -> None:
    code, err = train("run", fp8=True)
    assert code == 2 and is_one_clear_line(err) and "compute capability 8.9" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("model", "training", "reason"),
    [
        ({}, {"precision": "fp32"}, "training.precision is fp32"),
        ({"dim": 40, "heads": 2}, {}, "model.dim is 40"),
        ({"dim": 64, "heads": 8, "kv_heads": 1}, {}, "keys' width .* is 8"),
        ({"dim": 64, "ff_dim": 100}, {}, "model.ff_dim is 100"),
        ({}, {"micro_batch_size": 1, "seq_len": 250}, "micro_batch_size × seq_len is 250"),
    ],
)
def test_what_it_does_not_fit_is_refused(model: dict[str, Any], training: dict[str, Any], reason: str) -> None:
    settings = {"fp8": True, **training}
    data = {"seq_len": settings.pop("seq_len", 256)}
    config = make_config({"data": data, "model": model, "training": settings})
    with pytest.raises(UserError, match=reason):
        resolve(config, bf16_native=True, **FACTS)


def test_only_the_matrices_of_the_blocks_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By at most half a unit in the last of three binary places, and so the result by no more than its terms."""
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda _: True)
    config = resolve(make_config({"model": {"dim": 64, "layers": 1}}), bf16_native=True, **FACTS)
    torch.manual_seed(0)
    model = Transformer(config.model, 32)
    model.init_weights()
    linear = model.blocks[0].ff.up
    x = torch.randn(128, 64)
    exact = linear(x)
    bound = linear.weight.abs()
    names = [name for name, _ in model.named_parameters()]
    fp8.to_fp8(model, torch.device("cpu"))
    converted = [path for path, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert len(converted) == 7 and all(path.startswith("blocks.0.") for path in converted)
    assert type(model.head).__name__ == "Head" and [name for name, _ in model.named_parameters()] == names
    assert all(isinstance(model.get_submodule(path), nn.Linear) for path in converted)
    rounded = model.blocks[0].ff.up(x)
    # e4m3 has 3 binary places: a factor of 1 ± 2^-4 for normal numbers, of inputs and of weights; numbers below the
    # smallest normal one lose at most half of its last place, 2^-10 of a largest of 448 and so next to nothing.
    allowed = (x.abs() @ bound.T) * ((1 + 2**-4) ** 2 - 1 + 2**-8)
    assert (rounded - exact).abs().max() > 0
    assert bool(((rounded - exact).abs() <= allowed + 2**-8).all())


@pytest.mark.slow
def test_a_run_with_it_learns_resumes_and_is_evaluated(
    call: Call, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "multiplies_fp8", lambda _: True)
        assert train("ours", "training.stop_after=10", fp8=True)[0] == 75
        assert train("ours", fp8=True)[0] == 0
    assert train("plain")[0] == 0
    ours, plain = (records(tmp_path / name) for name in ("ours", "plain"))
    assert [record["step"] for record in ours] == [record["step"] for record in plain]
    learned = plain[0]["train_loss"] - plain[-1]["train_loss"]
    assert learned > 0.3
    # Rounding errors are a few percent of each product and have no direction: far less than a tenth of what is learned.
    assert 0 < abs(ours[-1]["train_loss"] - plain[-1]["train_loss"]) < 0.1 * learned
    # Weights are float32 and have the names of any run's, so it can be looked at, and go on, without fp8.
    code, _, err = call(evaluate.main, tmp_path / "ours")
    assert code == 0, err
    assert train("ours", "training.max_steps=40")[0] == 0
    assert records(tmp_path / "ours")[-1]["step"] == 40
