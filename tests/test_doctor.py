"""doctor: a healthy set-up passes, and each thing that is wrong is named and fails."""

from __future__ import annotations

import json
import math
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.config import make_config
from llmtrain.data.shards import TokenStream
from llmtrain.doctor import _run_folder, main
from llmtrain.health import checklist, rate_finder
from llmtrain.model.transformer import FeedForward, Transformer
from tests.conftest import Call, Command, is_one_clear_line


@pytest.fixture
def config(config_dict: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config_dict))
    return path


@pytest.fixture
def examine(call: Call, config: Path):
    """Run the doctor on the config; return the exit code and the findings by name, the last of each."""

    def run(*arguments: object) -> tuple[int, dict[str, dict[str, str]]]:
        code, out, err = call(main, "--config", config, "--json", *arguments)
        report = json.loads(out)
        assert report["ok"] is (code == 0)
        failed = sum(finding["status"] == "FAIL" for finding in report["findings"])
        assert (code, is_one_clear_line(err)) == ((2, True) if failed else (0, False)), err
        return code, {finding["name"]: finding for finding in report["findings"]}

    return run


def failures(findings: dict[str, dict[str, str]]) -> dict[str, str]:
    return {name: finding["detail"] for name, finding in findings.items() if finding["status"] == "FAIL"}


@pytest.mark.slow
def test_the_machine_alone(llmtrain: Command) -> None:
    result = llmtrain("doctor")
    assert (result.returncode, result.stderr) == (0, "")
    names = [line[6:20].strip() for line in result.stdout.splitlines()]
    assert {"python", "torch", "libraries", "device", "bf16", "cores", "memory", "disk"} <= set(names)
    assert all(line[:4].strip() in ("ok", "warn") for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("change", "named"), [("logging.wandb=true", "wandb"), ("checkpoint.remote=nothing://speaks/this", "nothing")]
)
def test_what_the_config_needs_and_is_not_there_fails(
    examine, change: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version("no such package" if name == "wandb" else name))
    code, found = examine(change)
    assert code == 2 and named in failures(found)["config"]


def test_a_run_folder_that_is_closed_fails(config_dict: dict[str, Any], closed: Path) -> None:
    for place in (closed / "run", closed):
        (found,) = _run_folder(make_config({**config_dict, "run": {"dir": str(place)}}), 1, 9)
        assert found.status == "FAIL"
        assert f"{place}: cannot be written: {closed}: Permission denied; " in found.detail


def test_a_healthy_run_passes_the_checklist_and_nothing_is_written(examine, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, findings = examine()
    assert code == 0
    for name in ("config", "data", "batch", "token ids", "targets", "first loss", "gradients", "updates"):
        assert findings[name]["status"] == "ok", findings[name]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.tie_embeddings=false"],
        ["optimizer.name=muon", "model.norm=layernorm", "model.positions=learned", "model.activation=gelu"],
        ["optimizer.name=sgd", "optimizer.lr=0.1", "model.dropout=0.3"],
    ],
)
def test_any_model_and_optimizer_passes(examine, overrides: list[str]) -> None:
    assert examine(*overrides)[0] == 0


def test_inputs_and_targets_stand_side_by_side(examine) -> None:
    detail = examine()[1]["targets"]["detail"]
    inputs, targets = (part.split("|") for part in detail.split("inputs ")[-1].split("  targets "))
    assert len(inputs) == 12 and inputs[1:] == targets[:-1]


def test_the_learning_rates_ahead_are_those_of_the_schedule(examine) -> None:
    assert examine()[1]["learning rate"]["detail"] == (
        "by step 0: 0.0e+00 · 1: 6.0e-04 · 5: 3.0e-03 · 7: 3.0e-03 · 15: 2.0e-03 · 22: 7.7e-04 · 30: 1.0e-04"
    )
    code, findings = examine("schedule.warmup_steps=40")
    assert code == 0 and findings["learning rate"]["status"] == "warn"


def test_a_parameter_without_a_gradient_is_named(examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: FeedForward, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate = torch.nn.functional.silu(self.gate(x))
        return self.down(gate * self.up(x))

    monkeypatch.setattr(FeedForward, "forward", forward)
    code, findings = examine("optimizer.weight_decay=0")
    assert code == 2
    told = failures(findings)
    assert set(told) == {"gradients", "updates"}
    assert "for blocks.0.ff.gate.weight, blocks.1.ff.gate.weight;" in told["gradients"]
    assert told["updates"].startswith("blocks.0.ff.gate.weight, blocks.1.ff.gate.weight did not move")


def test_a_parameter_that_the_optimizer_forgot_is_named(examine, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.optim import optimizers

    groups = optimizers.parameter_groups
    monkeypatch.setattr(optimizers, "parameter_groups", lambda model: {**groups(model), "embeddings": []})
    code, findings = examine()
    assert code == 2
    assert failures(findings)["updates"].startswith("embedding.weight did not move")


def test_a_bad_initialisation_is_told(examine, monkeypatch: pytest.MonkeyPatch) -> None:
    init = Transformer.init_weights

    def too_large(self: Transformer) -> None:
        init(self)
        with torch.no_grad():
            self.embedding.weight *= 100

    monkeypatch.setattr(Transformer, "init_weights", too_large)
    assert "look at the initialisation" in failures(examine()[1])["first loss"]
    monkeypatch.setattr(Transformer, "init_weights", lambda self: [p.data.fill_(math.nan) for p in self.parameters()])
    assert "not finite" in failures(examine()[1])["first loss"]


def test_targets_that_are_not_shifted_are_told(examine, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = checklist.inputs_and_targets
    monkeypatch.setattr(checklist, "inputs_and_targets", lambda *a: (cut(*a)[0], cut(*a)[0]))
    assert "not the inputs shifted by one" in failures(examine()[1])["targets"]


def test_a_token_id_outside_the_vocabulary_is_told(examine, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = TokenStream.__init__

    def with_a_smaller_vocabulary(self: TokenStream, *arguments: Any) -> None:
        opened(self, *arguments)
        self.vocab_size = 5

    monkeypatch.setattr(TokenStream, "__init__", with_a_smaller_vocabulary)
    assert "is outside the vocabulary of 5" in failures(examine()[1])["data"]


def test_a_learning_rate_of_zero_is_told(examine) -> None:
    _, findings = examine("optimizer.lr=0", "schedule.min_lr=0")
    assert failures(findings) == {"updates": findings["updates"]["detail"]}
    assert "optimizer.lr is 0" in findings["updates"]["detail"]


def test_a_model_that_does_not_fit_is_not_even_built(examine) -> None:
    _, findings = examine("model.dim=8192", "model.layers=1000000", "model.heads=64")
    assert "choose a smaller model or a larger machine" in failures(findings)["model memory"]


def test_a_run_folder_that_holds_a_run_is_told(examine, trained_run: Path) -> None:
    _, findings = examine(f"run.dir={trained_run}")
    assert findings["run folder"]["status"] == "warn" and "after step 30" in findings["run folder"]["detail"]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["training.precision=bf16", "model.dropout=0.5", "optimizer.name=sgd"]])
def test_overfit_learns_one_batch_by_heart(examine, overrides: list[str]) -> None:
    code, findings = examine("--overfit", *overrides)
    assert code == 0
    assert "4 × 64 tokens known by heart after" in findings["overfit"]["detail"]


def test_overfit_fails_where_nothing_can_be_learned(examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checklist, "OVERFIT_STEPS", 3)
    code, findings = examine("--overfit")
    assert code == 2 and "after 3 steps on one batch" in failures(findings)["overfit"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_learning_rate_is_found_and_compared_with_the_configs(examine, optimizer: str) -> None:
    suggestions = set()
    for lr, status in (("1e-7", "warn"), ("3e-2", "ok"), ("30", "warn")):
        _, findings = examine("--find-lr", f"optimizer.name={optimizer}", f"optimizer.lr={lr}", "schedule.min_lr=0")
        assert findings["find lr"]["status"] == status, findings["find lr"]
        suggestions.add(findings["find lr"]["detail"].split("optimizer.lr=")[1].split(",")[0])
    assert len(suggestions) == 1  # whatever the config says


def test_where_steps_are_no_longer_finite_is_a_turn(examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1e30 weights overflow in a step or two, long before the smoothed loss has risen."""
    monkeypatch.setattr(rate_finder, "STEPS", 25)
    monkeypatch.setattr(rate_finder, "LOWEST", 3e-3)
    monkeypatch.setattr(rate_finder, "HIGHEST", 1e30)
    monkeypatch.setattr(rate_finder, "_RISEN", 1e30)
    code, findings = examine("--find-lr")
    assert code == 0 and "the loss of a fresh model turns at" in findings["find lr"]["detail"]


def test_a_range_without_a_turn_suggests_nothing(examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_finder, "STEPS", 40)
    monkeypatch.setattr(rate_finder, "HIGHEST", 2e-3)
    code, findings = examine("--find-lr")
    assert code == 0 and findings["find lr"]["status"] == "warn"
    assert "still falls at 2.0e-03" in findings["find lr"]["detail"]
    assert not rate_finder.RangeTest([1.0, 2.0], [3.0, 2.0]).has_turned
    assert rate_finder.RangeTest([1.0, 2.0], [3.0, 2.0], is_lost=True).has_turned
    # Risen by more than batches differ, but by less than what ends the test: it does not "still fall" there.
    risen = rate_finder.RangeTest([1.0, 2.0, 3.0], [3.34, 1.528, 1.882])
    assert risen.has_turned and not risen.is_over and risen.turn == 2.0
    monkeypatch.setattr(rate_finder, "HIGHEST", 1e-5)
    code, findings = examine("--find-lr")
    assert code == 2 and "does not fall at any rate" in failures(findings)["find lr"]


def test_rows_that_contradict_each_other_have_a_loss_of_their_own() -> None:
    """Two rows begin alike and go on differently: one bit at one of four places, for each of them."""
    inputs, targets = torch.tensor([[1, 2], [1, 3]]), torch.tensor([[2, 5], [3, 6]])
    assert checklist._irreducible_loss(inputs, targets) == pytest.approx(math.log(2) * 2 / 4)
    rows = torch.from_numpy(np.arange(12).reshape(3, 4))
    assert checklist._irreducible_loss(rows[:, :-1], rows[:, 1:]) == 0


@pytest.mark.slow
def test_bad_input_gets_one_clear_line(call: Call, llmtrain: Command, config: Path, tmp_path: Path) -> None:
    code, out, err = call(main, "--overfit")
    assert (code, out) == (2, "") and is_one_clear_line(err) and "add --config FILE" in err
    assert call(main, "--find-lr")[0] == 2
    for overrides, message in [
        (["model.heads=3"], "dim 32 is not divisible by heads 3"),
        (["model.layer=3"], "did you mean 'layers'?"),
        (["data.seq_len=100000"], "longer than the data"),
        (["data.path=none"], "not prepared data"),
    ]:
        code, out, err = call(main, "--config", config, *overrides)
        assert code == 2 and is_one_clear_line(err) and "1 of" in err
        assert [message in line for line in out.splitlines() if line.startswith("FAIL")] == [True]
    result = llmtrain("doctor", "--config", tmp_path / "none.yaml")
    assert result.returncode == 2 and is_one_clear_line(result.stderr) and "No such file" in result.stdout


def test_the_rendezvous_is_looked_at_from_here(call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _, taken, _ = call(main, "--rendezvous", f"127.0.0.1:{port}")
    assert f"warn  rendezvous      127.0.0.1 (127.0.0.1, which is this machine): port {port} is taken" in taken
    _, free, _ = call(main, "--rendezvous", f"127.0.0.1:{port}")
    assert f"port {port} is free for machine_rank 0" in free
    for unreachable in ("255.255.255.255:29500", "no-such-host.invalid:29500"):
        code, out, err = call(main, "--rendezvous", unreachable)
        assert code == 2
        assert f"FAIL  rendezvous      {unreachable.partition(':')[0]}" in out
        assert is_one_clear_line(err)
    code, _, err = call(main, "--rendezvous", "10.0.0.1")
    assert code == 2
    assert "write it as HOST:PORT" in err
