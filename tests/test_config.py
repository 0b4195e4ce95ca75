"""The config: what is read is what is meant, what is wrong is named, and nothing can be changed later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config import RunConfig, default_ff_dim, load_config, make_config
from llmtrain.errors import UserError
from llmtrain.presets import PRESETS, auto_lr
from llmtrain.resolve import resolve


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, list(overrides))


def settled(config: RunConfig, **facts: Any) -> RunConfig:
    defaults = {"vocab_size": 100, "world_size": 1, "bf16_native": False, "compile_auto": False}
    return resolve(config, **{**defaults, **facts})


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == RunConfig()


def test_overrides_win_over_the_file_and_take_yaml_values(tmp_path: Path) -> None:
    config = load(
        tmp_path, "optimizer: {lr: 1e-3}\n", "optimizer.lr=3e-4", "run.name=my run", "model.tie_embeddings=false",
        "optimizer.betas=[0.9, 0.99]", "optimizer.clip_norm=null",
    )  # fmt: skip
    assert (config.optimizer.lr, config.run.name, config.model.tie_embeddings) == (3e-4, "my run", False)
    assert (config.optimizer.betas, config.optimizer.clip_norm) == ((0.9, 0.99), None)


SCALING = "{factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 100}"


@pytest.mark.parametrize(("text", "overrides", "reason"), [
    ("optimizr: {lr: 1}", [], "unknown section 'optimizr': did you mean 'optimizer'?"),
    ("optimizer: {lrr: 1}", [], "unknown key 'optimizer.lrr': did you mean 'lr'?"),
    ("", ["trainig.epochs=3"], "unknown section 'trainig': did you mean 'training'?"),
    ("", ["training.epoch=3"], "did you mean 'epochs'?"),
    ("", ["lr=3"], "write it as section.key=value"),
    ("model: {dim: 10, heads: 3}", [], "dim 10 is not divisible by heads 3"),
    ("model: {heads: 4, kv_heads: 3}", [], "heads 4 is not divisible by kv_heads 3"),
    ("model: {dim: 6, heads: 2}", [], "dim / heads = 3 is odd"),
    ("model: {dim: 6, heads: 2, head_dim: 5}", [], "head_dim = 5 is odd"),
    ("model: {rope_scaling: 8}", [], "model.rope_scaling: should hold keys: {key: value, …} (given: 8)"),
    ("model: {rope_scaling: {rope_type: yarn}}", [], "model.rope_scaling.rope_type: Input should be 'llama3'"),
    ("model: {rope_scaling: {factr: 8}}", [], "model.rope_scaling.factr: Extra inputs are not permitted (given: 8)"),
    (f"model: {{rope_scaling: {SCALING}, positions: learned}}", [], "rope_scaling is for positions: rope, not learned"),
    (f"model: {{rope_scaling: {SCALING}}}", ["model.rope_scaling={factor: 1}"], "low_freq_factor: Field required"),
    (
        "training: {micro_batch_size: 6}", [],
        "global_batch_size 16 is not divisible by micro_batch_size 6; choose a micro_batch_size of 4",
    ),
    ("training: {max_steps: 5, max_tokens: 5}", [], "max_steps and max_tokens are both set"),
    ("schedule: {min_lr: 1}", [], "above optimizer.lr"),
    ("model: {preset: 9b}", [], "did you mean '8b'?"),
    ("optimizer: {lr: -1}", [], "optimizer.lr: Input should be greater than or equal to 0 (given: -1)"),
    ("optimizer: {lr: fast}", [], "optimizer.lr"),
    ("training: {compile: maybe}", [], "training.compile: "),
    ("data: {sources: [1]}", [], "data.sources.0: should hold keys: {key: value, …} (given: 1)"),
    ("model: {dim: 1, dim: 2}", [], "key 'dim' stands twice"),
    ("model: [", [], "not valid YAML"),
    ("just words", [], "must hold sections"),
    ("model: 3", [], "'model' must hold keys"),
    ("run: !!python/object/apply:os.system ['true']", [], "not valid YAML"),
    ("run: {}\nmodel: {dim: \a8}", [], "yaml:2: not valid YAML: the character U+0007 is not allowed; remove it"),
    ("", ["run.name=a\0b"], "not valid YAML: the character U+0000 is not allowed"),
    ("model: 3", ["model.dim=64"], "'model' must hold keys, not 3"),
    ("training: {max_steps: true}", [], "training.max_steps: should be a number, not true or false"),
    ("", ["optimizer.lr=false"], "optimizer.lr: should be a number"),
    ("", ["optimizer.betas=[0.9, false]"], "optimizer.betas: should be a number"),
])  # fmt: skip
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, text: str, overrides: list[str], reason: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, text, *overrides)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")


def test_nothing_can_be_changed_after_loading() -> None:
    config = RunConfig()
    with pytest.raises(pydantic.ValidationError):
        config.optimizer.lr = 1.0  # type: ignore[misc]


def test_a_preset_is_a_start_and_explicit_keys_win() -> None:
    assert make_config({"model": {"preset": "10m"}}).model.dim == 256
    assert make_config({"model": {"preset": "10M", "layers": 3}}).model.layers == 3


def test_a_learning_rate_by_the_width() -> None:
    """It falls with the width, a preset's too; what is given wins; and the resolved config holds the number."""
    model = {"preset": "124m"}
    config = make_config({"model": model, "optimizer": {"lr": "auto"}})
    assert config.optimizer.lr == auto_lr("adamw", 768) == pytest.approx(2e-3 * (256 / 768) ** 0.7, rel=1e-2)
    assert config.schedule.min_lr == pytest.approx(config.optimizer.lr / 10, rel=1e-2)
    given = make_config({"model": model, "optimizer": {"lr": "auto", "name": "muon"}, "schedule": {"min_lr": 0.0}})
    assert given.optimizer.lr == auto_lr("muon", 768) and given.schedule.min_lr == 0.0
    for name in ("adam", "adamw", "muon"):
        rates = [auto_lr(name, dim) for dim in (64, 128, 256, 768, 2048, 4096, 8192)]
        assert rates == sorted(rates, reverse=True) and rates[-1] > 1e-4 and rates[0] < 2e-2
    assert yaml.safe_load(config.to_yaml())["optimizer"]["lr"] == config.optimizer.lr
    for optimizer, dim in (
        ({"name": "sgd"}, 64),
        ({}, 0),
        ({}, "wide"),
        ({"name": "lion"}, 64),
        ({"name": ["adamw"]}, 64),
    ):
        with pytest.raises(UserError, match="set a number"):
            make_config({"model": {"dim": dim}, "optimizer": {"lr": "auto", **optimizer}})


def test_true_and_false_are_values_where_they_mean_something(tmp_path: Path) -> None:
    config = load(tmp_path, "training: {compile: true}\nlogging: {csv: false}\ndata: {document_mask: false}")
    assert (config.training.compile, config.logging.csv) == (True, False)


def test_a_preset_given_as_an_override_wins_over_the_file(tmp_path: Path) -> None:
    text = "model: {dim: 64, layers: 2, heads: 2, dropout: 0.1}"
    assert (
        load(tmp_path, text, "model.preset=10m").model
        == make_config({"model": {"preset": "10m", "dropout": 0.1}}).model
    )
    assert load(tmp_path, text, "model.preset=10m", "model.layers=3").model.layers == 3
    assert load(tmp_path, "", "model.preset=10m").model.dim == 256
    assert load(tmp_path, text, "model.preset=null").model.dim == 64


@pytest.mark.parametrize("old", [None, "8b"])
def test_a_preset_wins_over_a_resolved_config_too(tmp_path: Path, old: str | None) -> None:
    resolved = settled(make_config({"model": {"preset": old, "dropout": 0.1}})).to_yaml()
    expected = make_config({"model": {"preset": "124m", "dropout": 0.1}})
    assert settled(load(tmp_path, resolved, "model.preset=124m")).model == settled(expected).model


@pytest.mark.parametrize(("text", "overrides", "expected"), [
    ("training: {max_steps: 200}", ["epochs=3"], (3, None, None)),
    ("training: {max_tokens: 900}", ["max_steps=5"], (10, 5, None)),
    ("training: {max_steps: 200, epochs: 2}", ["max_tokens=7"], (10, None, 7)),
    ("training: {epochs: 2}", ["max_steps=5", "epochs=3"], (3, 5, None)),
    ("training: {max_steps: 200, epochs: 2}", ["max_steps=null"], (2, None, None)),
])  # fmt: skip
def test_a_length_given_as_an_override_wins_over_the_lengths_in_the_file(
    tmp_path: Path, text: str, overrides: list[str], expected: tuple[int | None, ...]
) -> None:
    for file in (text, load(tmp_path, text).to_yaml()):
        training = load(tmp_path, file, *(f"training.{override}" for override in overrides)).training
        assert (training.epochs, training.max_steps, training.max_tokens) == expected


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_written_and_read_again_is_the_same(tmp_path: Path, preset: str | None) -> None:
    config = settled(make_config({"model": {"preset": preset}, "data": {"seq_len": 64}}))
    assert load(tmp_path, config.to_yaml()) == config
    assert settled(load(tmp_path, config.to_yaml())) == config


def test_resolving_settles_what_the_data_and_the_machine_decide() -> None:
    config = settled(RunConfig(), vocab_size=77, bf16_native=True, compile_auto=True)
    model = config.model
    assert (model.vocab_size, model.kv_heads, model.head_dim, model.ff_dim) == (
        77,
        2,
        64,
        default_ff_dim(128, "swiglu"),
    )
    assert (config.training.precision, config.training.compile, config.data.stride) == ("bf16", True, 256)
    assert settled(make_config({"training": {"precision": "fp32"}}), bf16_native=True).training.precision == "fp32"


@pytest.mark.parametrize(("facts", "reason"), [
    ({"world_size": 3}, "choose a global_batch_size that is a multiple of 3"),
    ({"world_size": 4}, "training.micro_batch_size=4 fits"),
])  # fmt: skip
def test_contradictions_with_data_and_ranks_are_refused(facts: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as error:
        settled(RunConfig(), **facts)
    assert reason in str(error.value)


@pytest.mark.slow
@given(lr=st.floats(1e-12, 1e3), exponent=st.integers(-9, 3), tokens=st.integers(1, 99), zeros=st.integers(0, 12))
def test_numbers_keep_their_value_in_any_spelling(
    tmp_path_factory: pytest.TempPathFactory, lr: float, exponent: int, tokens: int, zeros: int
) -> None:
    folder = tmp_path_factory.mktemp("spelling")
    for text in (repr(lr), f"{lr:.17e}", f"1e{exponent}", f"1.0E{exponent}", f"+.5e{exponent}"):
        assert load(folder, f"optimizer: {{lr: {text}}}\nschedule: {{min_lr: 0}}").optimizer.lr == float(text)
        assert load(folder, "schedule: {min_lr: 0}", f"optimizer.lr={text}").optimizer.lr == float(text)
    # A whole number shows that YAML itself took it for one: a string such as '2e9' would be refused.
    for text in (f"{tokens}e{zeros}", f"{tokens}.0E+{zeros}", f"{tokens}{'0' * zeros}"):
        assert load(folder, f"training: {{max_tokens: {text}}}").training.max_tokens == tokens * 10**zeros


SMALL = ("debug", "char", "demo", "10m")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_small_configs_take_a_real_step(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.train import main

    path = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    prompts = "training.sample_prompts=[the]"
    main(["--config", str(path), f"data.path={data}", f"run.dir={tmp_path / 'run'}", prompts, "--dry-run"])
    assert "all checks passed" in capsys.readouterr().out


SHIPPED = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_builds(path: Path) -> None:
    import torch

    from llmtrain.model.transformer import Transformer

    config = settled(load_config(path), vocab_size=259)
    with torch.device("meta"):
        Transformer(config.model, config.data.seq_len)
