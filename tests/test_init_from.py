"""A run that starts from a Hugging Face folder has its weights, bit for bit, or says why it cannot start from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmtrain.checkpoint.load import load_model
from llmtrain.data.shards import TOKENIZER_FOLDER
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.data.tokenizer_export import hugging_face_files
from llmtrain.errors import UserError
from llmtrain.export import main as export
from llmtrain.prepare import main as prepare
from llmtrain.train import main as train
from tests.conftest import Call, is_one_clear_line, prose, records, small_config, write_data
from tests.test_export import CLOSE, loaded, qwen_tokenizer, tensors

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.2, "rms_norm_eps": 1e-4,
}  # fmt: skip
FAMILIES = {
    "Llama": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}},
    "Qwen3": {"attention_bias": True, "head_dim": 16},
    "Qwen2": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 64, "head_dim": 12},
    # Of four wavelengths (6, 63, 628 and 6,283 tokens) one stays, one is stretched by part, two whole.
    "Llama 3.1": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 100,
        },
    },
}  # fmt: skip


def make_folder(
    folder: Path, data: Path, family: str = "Llama", *, shard: str = "5GB", dtype: torch.dtype = torch.float32,
    **changed: Any,
) -> Path:  # fmt: skip
    """A random model as transformers saves it, and the tokenizer of the data."""
    import transformers

    tokenizer = load_tokenizer(data / TOKENIZER_FOLDER)
    architecture = family.removesuffix(" 3.1")
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=tokenizer.vocab_size, **{**SIZES, **FAMILIES.get(family, {}), **changed}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
        elif "bias" in name and "o_proj" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name, content in hugging_face_files(tokenizer, 128).items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="session")
def llama(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests copy before they change it."""
    return make_folder(tmp_path_factory.mktemp("hf") / "llama", data)


def start(run_dir: Path, data: Path, folder: Path, **model: Any) -> Path:
    """The config of one step that changes nothing; its sizes are those of the folder."""
    raw = small_config(data, run_dir)
    raw["model"] = {"init_from": str(folder), **model}
    raw["optimizer"] = {"lr": 0.0}
    raw["schedule"] = {"min_lr": 0.0}
    raw["training"] |= {"max_steps": 1, "eval_every": None}
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps(raw))
    return path


def refused(call: Call, config: Path, *overrides: str, code: int = 2) -> str:
    """What a launch that may not begin says."""
    found, _, err = call(train, "--config", config, *overrides)
    assert found == code and is_one_clear_line(err), err
    return err


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_comes_back_bit_for_bit(family: str, data: Path, tmp_path: Path, call: Call) -> None:
    if family == "Qwen2":  # beside another make of tokenizer it is written as a Llama, which has all of its biases
        splits = {"train": prose(12_000), "val": prose(1_500, seed=1)}
        data = write_data(tmp_path / "data", splits, like=qwen_tokenizer(splits["train"]))
    folder = make_folder(tmp_path / "hf", data, family, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    code, _, err = call(train, "--config", start(tmp_path / "run", data, folder))
    assert code == 0, err
    assert f"{family.removesuffix(' 3.1')}ForCausalLM, stored in float32\n" in err
    assert call(export, tmp_path / "run", "--out", tmp_path / "out")[0] == 0
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.tensor([load_tokenizer(data / TOKENIZER_FOLDER).encode(prose(64, seed=9)).tolist()])
    with load_model(tmp_path / "run") as ours, ours.engine.evaluating() as own, torch.no_grad():
        logits = own(ids)
    assert logits.abs().max() > 1, "or the comparison says nothing"
    for place in (folder, tmp_path / "out"):
        torch.testing.assert_close(loaded(place)[0](ids).logits, logits, **CLOSE)


def test_a_run_comes_back_from_its_export_bit_for_bit(
    data: Path, trained_run: Path, tmp_path: Path, call: Call
) -> None:
    assert call(export, trained_run, "--out", tmp_path / "first")[0] == 0
    code, _, err = call(train, "--config", start(tmp_path / "run", data, tmp_path / "first"))
    assert code == 0, err
    assert call(export, tmp_path / "run", "--out", tmp_path / "second")[0] == 0
    first, second = (tensors(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text(), name


def test_the_resolved_config_goes_on_without_the_folder(data: Path, llama: Path, tmp_path: Path, call: Call) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "hf"))
    config = start(tmp_path / "run", data, folder)
    assert call(train, "--config", config, "training.max_steps=4", "training.stop_after=2")[0] == 75
    shutil.rmtree(folder)
    assert call(train, "--config", tmp_path / "run" / "config.yaml", "training.stop_after=null")[0] == 0
    assert records(tmp_path / "run")[-1]["step"] == 4


def test_the_same_command_goes_on_when_the_folder_is_gone(data: Path, tmp_path: Path, call: Call) -> None:
    folder = make_folder(tmp_path / "folder", data, "Qwen2", **FAMILIES["Llama 3.1"])
    config = start(tmp_path / "run", data, folder)
    assert call(train, "--config", config)[0] == 0
    shutil.rmtree(folder)
    assert call(train, "--config", config, "training.max_steps=2")[0] == 0
    assert len(records(tmp_path / "run")) == 2
    kept = tmp_path / "run" / "config.yaml"
    older = yaml.safe_load(kept.read_text())
    del older["model"]["norm"]  # a version that did not have this key
    kept.write_text(yaml.safe_dump(older))
    assert "model.qkv_bias=True, this run has False" in refused(call, config, "model.qkv_bias=false")
    (tmp_path / "run" / "config.yaml").write_text("model: [")
    code, _, err = call(train, "--config", config, "training.max_steps=3")
    assert code == 2 and is_one_clear_line(err) and "put one of them back" in err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_trained_as_float32(
    dtype: torch.dtype, data: Path, llama: Path, tmp_path: Path, call: Call
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "hf"))
    stored = {name: tensor.to(dtype) for name, tensor in tensors(llama).items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    code, _, err = call(train, "--config", start(tmp_path / "run", data, folder))
    assert code == 0 and f"stored in {str(dtype).removeprefix('torch.')}, trained as float32" in err, err
    assert call(export, tmp_path / "run", "--out", tmp_path / "out")[0] == 0
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model.dim=64", "model.dim is 64, but 32 in model.init_from"),
        ("model.rope_theta=1e4", "model.rope_theta is 10000.0, but 7000.0"),
        ("model.tie_embeddings=false", "model.tie_embeddings is False, but True"),
        ("model.qk_norm=true", "model.qk_norm is True, but False"),
        ("model.preset=1m", "model.dim is 128, but 32"),
        ("model.vocab_size=512", "model.vocab_size is 512, but "),
    ],
)
def test_a_size_that_contradicts_the_folder_is_named_with_both_values(
    given: str, said: str, data: Path, llama: Path, tmp_path: Path, call: Call
) -> None:
    assert said in refused(call, start(tmp_path / "run", data, llama), given)


def test_sizes_that_agree_may_be_given_and_the_rate_follows_the_width(data: Path, llama: Path, tmp_path: Path) -> None:
    from llmtrain.config import load_config
    from llmtrain.presets import auto_lr

    config = load_config(
        start(tmp_path / "run", data, llama), ["model.dim=32", "model.kv_heads=2", "optimizer.lr=auto"]
    )
    assert (config.model.heads, config.model.norm_eps, config.model.ff_dim) == (4, 1e-4, 48)
    assert config.optimizer.lr == auto_lr("adamw", 32)


def test_sizes_of_a_file_step_back_before_a_folder_given_as_an_override(
    data: Path, llama: Path, tmp_path: Path
) -> None:
    from llmtrain.config import load_config

    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"model": {"preset": "1m", "dim": 64, "qk_norm": True, "dropout": 0.1}}))
    model = load_config(path, [f"model.init_from={llama}"]).model
    assert (model.preset, model.dim, model.qk_norm, model.dropout) == (None, 32, False, 0.1)
    with pytest.raises(UserError, match=r"model\.dim is 64, but 32"):
        load_config(path, [f"model.init_from={llama}", "model.dim=64"])


Change = Callable[[Path], None]


def config_change(**changed: Any) -> Change:
    """Write other values into config.json; None takes a key out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = {**json.loads(path.read_text()), **changed}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def tensor_change(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    """Write other tensors."""

    def write(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return write


def index_change(place: str) -> Change:
    """An index that puts every tensor into a file of this name."""

    def write(folder: Path) -> None:
        names = load_file((folder / "model.safetensors").rename(folder / "a.safetensors"))
        index = {"weight_map": dict.fromkeys(names, place)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["c"], vocab["e"] = vocab["e"], vocab["c"]
    path.write_text(json.dumps(content))


def output_biases(folder: Path) -> None:
    config_change(attention_bias=True)(folder)

    def add(found: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            for part, size in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
                found[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = torch.zeros(size)
        found["model.layers.1.self_attn.o_proj.bias"][7] = 1e-6

    tensor_change(add)(folder)


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
BAD: dict[str, tuple[Change, str]] = {
    "pickle": (pickled, "pytorch_model.bin is a pickle, which can run any code"),
    "nothing": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
    "architecture": (
        config_change(architectures=["PhiForCausalLM"]),
        "cannot start from a PhiForCausalLM; it can from LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
        "Qwen3ForCausalLM",
    ),
    "no biases": (config_change(architectures=["Qwen2ForCausalLM"]), "no tensor 'model.layers.0.self_attn.q_proj.bi"),
    "code": (config_change(auto_map={"AutoModel": "x.y"}), "which is never run"),
    "biases": (config_change(mlp_bias=True), "mlp_bias is true, but this model has biases on queries, keys and val"),
    "output biases": (output_biases, "'model.layers.1.self_attn.o_proj.bias' is not zero, but this model has no bias"),
    "activation": (config_change(hidden_act="gelu"), 'hidden_act is "gelu"'),
    "head_dim": (config_change(head_dim=16), "q_proj.weight' has shape [32, 32], by config.json it has [64, 32]"),
    "scaled": (config_change(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "scaled by rope_type llama3"),
    "old scaled": (config_change(rope_scaling={"type": "linear", "factor": 2.0}), "scaled by rope_type llama3 only"),
    "quantized": (config_change(quantization_config={"bits": 4}), "only plain weights"),
    "no size": (config_change(hidden_size=None), "hidden_size must be a whole number from 1 on, not null"),
    "a text": (config_change(num_hidden_layers="2"), "num_hidden_layers must be a whole number"),
    "window": (
        config_change(architectures=["MistralForCausalLM"], sliding_window=63), "choose a seq_len of at most 63",
    ),
    "index": (index_change("model-00002-of-00002.safetensors"), "names model-00002-of-00002.safetensors, which is not"),
    "outside": (index_change("../model.safetensors"), "'../model.safetensors', which is no .safetensors file of the"),
    "absolute": (index_change("/etc/x.safetensors"), "'/etc/x.safetensors', which is no .safetensors file of the"),
    "missing": (tensor_change(lambda found: found.__delitem__(NORM)), f"has no tensor '{NORM}'"),
    "shape": (
        tensor_change(lambda found: found.update({NORM: torch.ones(31)})),
        f"'{NORM}' has shape [31], by config.json it has [32]",
    ),
    "turned": (
        tensor_change(lambda found: found.update({EMBEDDING: found[EMBEDDING].T.contiguous()})),
        f"'{EMBEDDING}' has shape [32, ",
    ),
    "more": (tensor_change(lambda found: found.update(bias=torch.ones(1))), "has a tensor 'bias'"),
    "integers": (
        tensor_change(lambda found: found.update({NORM: torch.ones(32, dtype=torch.int8)})), "is stored as I8",
    ),
    "tokenizer": (other_tokenizer, "is 'e', the data's is 'c'; prepare the data with --tokenizer"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer here"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_started_from_is_refused(
    name: str, data: Path, llama: Path, tmp_path: Path, call: Call
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "hf"))
    change, said = BAD[name]
    change(folder)
    assert said in refused(call, start(tmp_path / "run", data, folder))
    assert not (tmp_path / "run").exists()


def test_a_file_that_was_cut_off_is_damaged(data: Path, llama: Path, tmp_path: Path, call: Call) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "hf"))
    truncated(folder)
    assert "model.safetensors: ends at byte" in refused(call, start(tmp_path / "run", data, folder), code=4)


def test_data_is_prepared_with_the_tokenizer_of_a_folder(data: Path, llama: Path, tmp_path: Path, call: Call) -> None:
    """And only then can a run start from it: of other data it is told in what the tokenizers differ."""
    (tmp_path / "text.txt").write_text(prose(9_000, seed=3))
    arguments = ("--input", tmp_path / "text.txt", "--tokenizer", llama, "--val-split", "0.1")
    assert call(prepare, *arguments, "--out", tmp_path / "same")[0] == 0
    assert "already prepared" in call(prepare, *arguments, "--out", tmp_path / "same")[1]
    code, _, err = call(train, "--config", start(tmp_path / "run", tmp_path / "same", llama))
    assert code == 0, err
    lowered = write_data(tmp_path / "other", {"train": prose(9_000).lower(), "val": prose(900).lower()})
    err = refused(call, start(tmp_path / "second", lowered, llama))
    ids = [load_tokenizer(place / TOKENIZER_FOLDER).vocab_size for place in (data, lowered)]
    assert f"it has {ids[0]} ids, the data's {ids[1]}; prepare the data with --tokenizer {llama}" in err
