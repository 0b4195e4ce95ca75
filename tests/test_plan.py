"""`llmtrain plan`: what it says comes from the formulas that real steps were compared with, and it answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config import CheckpointSection, load_config
from llmtrain.data.shards import read_manifest
from llmtrain.errors import UserError
from llmtrain.model.peak import peak_memory
from llmtrain.model.transformer import Transformer
from llmtrain.optim.optimizers import make_optimizer, make_state
from llmtrain.plan import main
from llmtrain.planning.budget import checkpoints_kept
from llmtrain.planning.layout import ENGINES
from llmtrain.resolve import resolve

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = str(ROOT / "configs/debug.yaml")


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main([*words, "--json"])
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_plans(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = plan(capsys, "--config", str(path), "--price-per-gpu-hour", "2")
    assert set(facts["memory"]["engines"]) == set(ENGINES)
    run = facts["run"]
    assert run["cost"] == pytest.approx(2 * run["gpu_hours"])
    assert run["seconds"] == pytest.approx(run["tokens"] / facts["layout"]["tokens_per_second"])
    assert 0 < facts["layout"]["mfu"] < facts["layout"]["mfu_palm"] < 1
    main(["--config", str(path)])
    assert "scaling" in capsys.readouterr().out


def test_memory_is_that_of_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "configs/7b.yaml"
    facts = plan(capsys, "--config", str(path), "model.vocab_size=32000", "--gpus", "64")
    config = load_config(path, ["model.vocab_size=32000"])
    model = resolve(config, vocab_size=32000, world_size=64, bf16_native=True, compile_auto=True).model
    for engine in ("ddp", "zero1", "zero2", "zero3"):
        peak = peak_memory(
            model,
            4096,
            1,
            engine=engine,
            world_size=64,
            checkpointing="selective",
            compiled=True,  # type: ignore[arg-type]
        )
        assert facts["memory"]["engines"][engine]["peak"] == peak.bytes
    assert facts["memory"]["engines"]["zero3-offload"]["host"] > 0


def test_the_checkpoint_has_the_bytes_of_a_real_state(capsys: pytest.CaptureFixture[str]) -> None:
    facts = plan(capsys, "--config", SMALL, "model.vocab_size=300", "optimizer.name=muon")
    config = load_config(SMALL, ["model.vocab_size=300", "optimizer.name=muon"])
    model = Transformer(
        resolve(config, vocab_size=300, world_size=1, bf16_native=False, compile_auto=False).model, config.data.seq_len
    )
    optimizer = make_optimizer(model, config.optimizer)
    make_state(optimizer)
    tensors = [value for state in optimizer.state.values() for value in state.values() if getattr(value, "ndim", 0)]
    assert facts["checkpoint"]["bytes"] == sum(tensor.nbytes for tensor in [*model.parameters(), *tensors])
    assert facts["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_prepared_data_gives_vocabulary_and_tokens(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--config", SMALL, f"data.path={data}", "training.epochs=3")
    manifest = read_manifest(data)
    facts = plan(capsys, *words)
    assert facts["config"]["vocab_size"] == manifest.tokenizer.vocab_size
    assert facts["run"]["tokens"] == 3 * manifest.splits["train"].tokens
    assert facts["notes"] == []


def test_what_is_not_prepared_is_assumed_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    facts = plan(capsys, "--config", SMALL, "data.path=nowhere", "training.epochs=1")
    assert facts["config"]["vocab_size"] == 50_304
    assert facts["run"]["tokens"] == 20 * facts["parameters"]["total"]
    assert any("nowhere: not prepared" in note for note in facts["notes"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "h10"], "did you mean 'h100'?.* known: .*a100"),
        (["--gpu", "abacus"], "known: a100, .*h200"),
        (["--engine", "zero4"], "did you mean 'zero3'"),
        (["--engine", "single", "--gpus", "2"], "one GPU, not 2"),
        (["--gpus", "3"], "not divisible by 3 GPUs; --gpus 2 fits"),
        (["--tokens", "none"], "must be a number"),
        (["--price-per-gpu-hour", "0"], "above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_a_line(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        main(["--config", SMALL, *words])


def test_it_needs_neither_torch_nor_a_gpu(tmp_path: Path) -> None:
    run = f"import sys, llmtrain.cli; llmtrain.cli.main(['plan', '--config', {SMALL!r}])"
    code = f"{run}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "\x1b" not in done.stdout, "plain where it is piped"


def test_checkpoints_kept_for_good_take_room_too() -> None:
    config = load_config(ROOT / "configs/7b.yaml", [])
    saving = config.checkpoint
    assert (saving.save_every, saving.keep_last, saving.keep_every) == (1000, 3, 10_000)
    assert checkpoints_kept(config, 30_500) == 3 + 2 + 3
    assert checkpoints_kept(config.model_copy(update={"checkpoint": CheckpointSection(keep_last=1)}), 30_500) == 1 + 2
