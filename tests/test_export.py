"""An exported folder is the model: `transformers` loads it, with the same logits, the same ids and the same text."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.load import load_model
from llmtrain.config import load_config
from llmtrain.data.shards import TOKENIZER_FOLDER
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_export import QWEN_WORDS, hugging_face_files, is_read_as_qwen, tokenizer_json
from llmtrain.data.tokenizer_hf import HuggingFaceTokenizer
from llmtrain.data.tokenizer_none import NoTokenizer
from llmtrain.data.tokenizer_same import first_difference
from llmtrain.engine import Fragment
from llmtrain.export import main as export
from llmtrain.generate import main as generate
from llmtrain.model.hf_layout import parameter_shapes
from llmtrain.train import main as train
from tests.conftest import Call, is_one_clear_line, prose, small_config, write_data

QWEN3 = {"kv_heads": 1}  # the default but for grouped keys
LLAMA = {"qk_norm": False, "tie_embeddings": False, "rope_theta": 5000.0, "vocab_multiple": 64, "dropout": 0.1}
BIASES = {
    "qk_norm": False, "qkv_bias": True, "kv_heads": 1,
    "rope_scaling": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
GPT2 = {"qk_norm": False, "norm": "layernorm", "activation": "gelu", "positions": "learned"}
CLOSE = {"rtol": 0, "atol": 1e-4}
PROMPT = "The cat "


def qwen_tokenizer(text: str) -> HuggingFaceTokenizer:
    """Of the make of Qwen's own: bytes, its way to cut a text into words, and its normalisation."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.normalizer = tokenizers.normalizers.NFC()
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_WORDS), "isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, level])
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator([text], trainer)
    return HuggingFaceTokenizer(library.to_str())


def trained(folder: Path, kind: str, model: dict[str, Any], **training: Any) -> Path:
    """A short run whose data has a tokenizer of the kind."""
    splits = {"train": prose(9_000), "val": prose(900, seed=1)}
    tokenizer = qwen_tokenizer(splits["train"]) if kind == "qwen" else None
    data = write_data(folder / "data", splits, kind=kind, like=tokenizer)
    raw = small_config(data, folder / "run")
    raw["model"] |= model
    raw["training"] |= {"max_steps": 12, "eval_every": None, **training}
    (folder / "config.yaml").write_text(json.dumps(raw))
    train(["--config", str(folder / "config.yaml")])
    return folder / "run"


def test_a_tokenizer_file_may_leave_keys_out() -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    assert not is_read_as_qwen(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of a folder's tensors."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def loaded(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, as transformers has them without a network."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, told = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def assert_same_model(run: Path, folder: Path, call: Call) -> None:
    """Logits, ids, what ids spell, and the greedy text."""
    model, tokenizer = loaded(folder)
    with load_model(run) as ours, ours.engine.evaluating() as own, torch.no_grad():
        ids = torch.tensor([ours.tokenizer.encode(prose(2_000, seed=7)).tolist()[:64]])
        logits = own(ids)[..., : ours.tokenizer.vocab_size]
        assert logits.abs().max() > 0.1, "or the comparison says nothing"
        theirs = model(ids).logits
        torch.testing.assert_close(theirs, logits, **CLOSE)
        for text in (PROMPT, "A mat.\nIt ran", prose(300, seed=8)):
            expected = ours.tokenizer.encode(text).tolist()
            assert tokenizer(text).input_ids == expected
            assert tokenizer.decode(expected, skip_special_tokens=True) == ours.tokenizer.decode(expected)
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == ours.tokenizer.eos_id
        assert tokenizer.pad_token_id is not None
        assert model.config.vocab_size == len(tokenizer) == ours.tokenizer.vocab_size
    code, out, err = call(generate, run, "--prompt", PROMPT, "--greedy", "--max-new-tokens", 30, "--json")
    assert code == 0, err
    inputs = tokenizer(PROMPT, return_tensors="pt")
    whole = model.generate(**inputs, max_new_tokens=30)[0]
    text = tokenizer.decode(whole[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert text == json.loads(out)["samples"][0]["text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "architecture", "model"),
    [
        ("char", "Qwen3ForCausalLM", QWEN3),
        ("byte", "LlamaForCausalLM", LLAMA),
        ("word", "GPT2LMHeadModel", GPT2),
        ("bpe", "GPT2LMHeadModel", {**GPT2, "tie_embeddings": False, "vocab_multiple": 64, "qkv_bias": True}),
        ("unigram", "LlamaForCausalLM", {**LLAMA, "tie_embeddings": True, "kv_heads": 1}),
        ("bbpe", "Qwen3ForCausalLM", {"norm_eps": 1e-3, "ff_dim": 50}),
        ("char", "LlamaForCausalLM", BIASES),
        ("byte", "Qwen3ForCausalLM", {"qkv_bias": True}),
        ("qwen", "Qwen2ForCausalLM", {**BIASES, "head_dim": 10}),
    ],
)
def test_transformers_has_the_same_logits_ids_and_text(
    kind: str, architecture: str, model: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    run, out = trained(tmp_path, kind, model), tmp_path / "hf"
    code, said, err = call(export, run, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(said)
    assert (told["architecture"], told["no_tokenizer"]) == (architecture, None)
    assert (told["padding_left_out"] > 0) == ("vocab_multiple" in model)
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    assert_same_model(run, out, call)


def test_files_of_any_size_hold_the_same_tensors_and_bf16_is_rounded(
    trained_run: Path, tmp_path: Path, call: Call
) -> None:
    whole, cut, rounded = (tmp_path / name for name in ("whole", "cut", "rounded"))
    assert call(export, trained_run, "--out", whole)[0] == 0
    assert call(export, trained_run / "final", "--out", cut, "--shard-bytes", "20KB")[0] == 0
    assert call(export, trained_run, "--out", rounded, "--dtype", "bf16")[0] == 0
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    expected = tensors(whole)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in cut.glob("*.safetensors"))
    assert len(shards) > 3 and shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    for name in shards:
        with safe_open(cut / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {key for key, place in index["weight_map"].items() if place == name} == set(file.keys())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for folder, dtype in ((cut, torch.float32), (rounded, torch.bfloat16)):
        found = tensors(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in expected.items())
        model, _ = loaded(folder)
        assert model.dtype == dtype


def altered(checkpoint: Path, folder: Path, tokenizer: Tokenizer | None = None, **model: Any) -> Path:
    """A checkpoint with the weights (only) of another model, random, or with another tokenizer."""
    (folder / "tokenizer").mkdir(parents=True)
    (tokenizer or load_tokenizer(checkpoint / "tokenizer")).save(folder / "tokenizer")
    saved = load_config(checkpoint / "config.yaml", [f"model.{key}={value}" for key, value in model.items()])
    (folder / "config.yaml").write_text(saved.to_yaml())
    shapes = parameter_shapes(saved.model, saved.data.seq_len)
    parameters = [(f"model/{name}", shape, torch.rand(math.prod(shape))) for name, shape in shapes.items()]
    fmt.write_rank(folder, 0, [Fragment(name, shape, 0, values) for name, shape, values in parameters])
    files = [fmt.describe_file(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = fmt.CheckpointReader(checkpoint).manifest.model_copy(update={"files": tuple(files), "world_size": 1})
    fmt.commit(folder, manifest)
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"activation": "relu2"}, "model.activation=relu2"),
        ({"positions": "learned"}, "model.norm=rmsnorm"),
        ({**GPT2, "kv_heads": 1}, "model.kv_heads=1"),
        ({**GPT2, "head_dim": 12}, "model.head_dim=12"),
        ({"qk_norm": False, "heads": 3, "kv_heads": 3}, "model.heads=3"),
        ({**GPT2, "qk_norm": True}, "model.qk_norm=True"),
        ({"norm": "layernorm"}, "model.norm=layernorm"),
    ],
)
def test_a_model_that_no_architecture_has_is_refused_by_the_key(
    change: dict[str, Any], named: str, trained_run: Path, tmp_path: Path, call: Call
) -> None:
    run = altered(trained_run / "step-00000010", tmp_path / "step-00000001", **change)
    code, _, err = call(export, run, "--out", tmp_path / "hf")
    assert code == 2 and is_one_clear_line(err) and named in err, err
    assert not (tmp_path / "hf").exists()


def test_ids_that_nobody_can_spell_are_exported_without_a_tokenizer(
    trained_run: Path, tmp_path: Path, call: Call
) -> None:
    """Of token files that were prepared with --vocab-size alone."""
    run = altered(trained_run / "step-00000010", tmp_path / "step-00000001", NoTokenizer(29))
    code, out, err = call(export, run, "--out", tmp_path / "hf")
    assert code == 0 and "without a tokenizer: no tokenizer is known" in out, err
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


def test_what_cannot_be_read_or_written_leaves_nothing(trained_run: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "hf"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    code, _, err = call(export, trained_run, "--out", out)
    assert code == 2 and is_one_clear_line(err) and "not an empty folder" in err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert call(export, trained_run, "--out", tmp_path / "x", "--shard-bytes", "none")[0] == 2
    code, _, err = call(export, tmp_path / "nowhere", "--out", tmp_path / "x")
    assert code == 2 and "nowhere: no such folder" in err
    run = Path(shutil.copytree(trained_run, tmp_path / "run", symlinks=True))
    path = next((run / "step-00000030").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    code, _, err = call(export, run / "step-00000030", "--out", tmp_path / "x")
    assert code == 4 and is_one_clear_line(err) and "differs from the hash" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_a_checkpoint_on_a_store_is_exported(
    trained_run: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    assert call(export, f"file://{trained_run}/step-00000020", "--out", tmp_path / "far")[0] == 0
    assert call(export, trained_run / "step-00000020", "--out", tmp_path / "near")[0] == 0
    far, near = (tensors(tmp_path / name) for name in ("far", "near"))
    assert far.keys() == near.keys() and all(torch.equal(far[name], near[name]) for name in near)


def test_what_a_tokenizer_file_adds_to_a_text_is_left_out(data: Path) -> None:
    """Llama's own files put a first id before every text; prepared data has none, so neither has the export."""
    content = json.loads(tokenizer_json(load_tokenizer(data / TOKENIZER_FOLDER)))
    special = {"id": "<eos>", "ids": [content["model"]["vocab"]["<eos>"]], "tokens": ["<eos>"]}
    template = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {"<eos>": special},
    }  # fmt: skip
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    own = HuggingFaceTokenizer(json.dumps(content))
    assert len(tokenizers.Tokenizer.from_str(own.content).encode("that").ids) == 2
    library = tokenizers.Tokenizer.from_str(hugging_face_files(own, 64)["tokenizer.json"])
    assert library.encode("that").ids == own.encode("that").tolist()
    assert first_difference(own, load_tokenizer(data / TOKENIZER_FOLDER)) is None, "it is the same tokenizer"


# The kernel's own mark of the process, set back after what a first export imports and allocates; getrusage's would
# begin with that of the parent.
MEASURE = """
import re, sys
from pathlib import Path
import torch
from llmtrain.checkpoint.hf_export import export
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
export(sys.argv[1], Path(sys.argv[2]), torch.float32, 1 << 40)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
export(sys.argv[3], Path(sys.argv[4]), torch.float32, 1 << 40)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_a_large_model_takes_no_more_memory_than_a_small_one(trained_run: Path, tmp_path: Path) -> None:
    small = trained_run / "step-00000010"
    large = altered(small, tmp_path / "step-00000001", dim=192, layers=56, head_dim=96, ff_dim=512)
    command = [sys.executable, "-c", MEASURE, small, tmp_path / "a", large, tmp_path / "b"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    size = sum(path.stat().st_size for path in (tmp_path / "b").glob("*.safetensors"))
    assert size > 90e6
    assert int(done.stdout.split()[-1]) < size / 2, done.stdout
