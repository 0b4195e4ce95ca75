"""`config.json` of a Hugging Face model folder in the words of `model:`, and back.

Below `config`, which takes the sizes of a folder in `model.init_from` from here. Which tensor is called what is in
llmtrain/model/hf_layout.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llmtrain.errors import UserError
from llmtrain.sections import RopeScalingSection

HF_CONFIG = "config.json"
LLAMA, MISTRAL, QWEN2, QWEN3 = (f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))
GPT2 = "GPT2LMHeadModel"
# Those that a run can start from; with how many key-value heads they have where config.json does not say (None: heads).
READABLE: dict[str, int | None] = {LLAMA: None, MISTRAL: 8, QWEN2: 32, QWEN3: 32}
_MODEL_TYPES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "gpt2": GPT2}
_WHY_NOT = {GPT2: "it has biases everywhere, which this model does not have"}
# What each architecture computes, in the words of `model:`.
_LIKE_LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope"}
_LIKE_GPT2 = {"norm": "layernorm", "activation": "gelu", "qk_norm": False}
# The keys of `model:` that a folder decides.
FOLDER_KEYS = (
    "dim", "layers", "heads", "kv_heads", "head_dim", "ff_dim", "vocab_size", "tie_embeddings", "norm", "norm_eps",
    "positions", "rope_theta", "rope_scaling", "activation", "qk_norm", "qkv_bias",
)  # fmt: skip


def architecture_for(model: Mapping[str, Any], *, qwen_tokenizer: bool) -> str:
    """The architecture that computes exactly what a model with these resolved `model:` keys does.

    With biases on queries, keys and values that is Qwen2; but transformers 5 reads any tokenizer beside it as Qwen's.
    So with another it is one that has them on attention's result too, where they are zero.

    Args:
        model: resolved.
        qwen_tokenizer: whether the tokenizer is one of that make.

    Raises:
        UserError: there is none; names the key that has none.
    """
    wanted: dict[str, Any] = _LIKE_GPT2 if model["positions"] == "learned" else _LIKE_LLAMA
    for key, value in wanted.items():
        if model[key] != value:
            beside = "learned positions (GPT-2)" if wanted is _LIKE_GPT2 else "rotary positions (Llama, Qwen)"
            raise UserError(
                f"model.{key}={model[key]}: no Hugging Face architecture that export writes has it; "
                f"with {beside} it must be {value}"
            )
    if wanted is _LIKE_GPT2:
        if model["kv_heads"] != model["heads"]:
            raise UserError(f"model.kv_heads={model['kv_heads']}: GPT-2 has as many as heads, here {model['heads']}")
        if model["heads"] * model["head_dim"] != model["dim"]:
            width = f"{model['dim']} / {model['heads']}"
            raise UserError(f"model.head_dim={model['head_dim']}: GPT-2's heads are dim / heads = {width} wide")
        return GPT2
    if model["qk_norm"]:
        return QWEN3
    if model["qkv_bias"] and qwen_tokenizer:
        return QWEN2
    if model["dim"] % model["heads"]:
        raise UserError(
            f"model.heads={model['heads']}: transformers reads a Llama only where they divide dim, here {model['dim']}"
        )
    return LLAMA


def config_json(model: Mapping[str, Any], architecture: str, seq_len: int, vocab_size: int) -> dict[str, Any]:
    """The content of `config.json` for a model with these resolved `model:` keys; without dtype and special ids.

    Args:
        model: resolved.
        architecture: from `architecture_for`.
        seq_len: longest sequence it was trained on, in tokens.
        vocab_size: rows of its embedding that are written.
    """
    common = {"architectures": [architecture], "vocab_size": vocab_size, "tie_word_embeddings": model["tie_embeddings"]}
    if architecture == GPT2:
        return {
            **common,
            "model_type": "gpt2",
            "n_positions": seq_len,
            "n_embd": model["dim"],
            "n_layer": model["layers"],
            "n_head": model["heads"],
            "n_inner": model["ff_dim"],
            "activation_function": "gelu",  # the exact one; GPT-2's own is an approximation
            "layer_norm_epsilon": model["norm_eps"],
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), model["dropout"]),
        }
    rope = {"rope_type": "default", **(model["rope_scaling"] or {})}
    own = {"mlp_bias": False} if architecture == LLAMA else {"use_sliding_window": False, "sliding_window": None}
    return {
        **common,
        "model_type": next(kind for kind, name in _MODEL_TYPES.items() if name == architecture),
        "hidden_size": model["dim"],
        "num_hidden_layers": model["layers"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"],
        "head_dim": model["head_dim"],
        "intermediate_size": model["ff_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "rms_norm_eps": model["norm_eps"],
        # Once for transformers 5, once for those before it and for what reads their files.
        "rope_parameters": {**rope, "rope_theta": model["rope_theta"]},
        "rope_theta": model["rope_theta"],
        "rope_scaling": model["rope_scaling"],
        "attention_dropout": 0.0,
        **({} if architecture == QWEN2 else {"attention_bias": model["qkv_bias"]}),
        **own,
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # what is not UTF-8 is a ValueError too
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, not a {type(content).__name__}")
    return content


def model_keys(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `config.json` says in the words of `model:`.

    Args:
        config: its content.
        where: names it in errors.

    Raises:
        UserError: a model that ours cannot be; names the architecture or the key.
    """
    architecture = architecture_of(config, where)
    heads, dim = (_size(config, key, where) for key in ("num_attention_heads", "hidden_size"))
    for key, value, why in _refusals(config, architecture):
        raise UserError(f"{where}: {key} is {json.dumps(value)}, but {why}")
    default_kv = READABLE[architecture] or heads
    default_head = 128 if architecture == QWEN3 else max(1, dim // heads)
    found = {
        "dim": dim,
        "layers": _size(config, "num_hidden_layers", where),
        "heads": heads,
        "kv_heads": _size(config, "num_key_value_heads", where, default_kv),
        "head_dim": _size(config, "head_dim", where, default_head),
        "ff_dim": _size(config, "intermediate_size", where),
        "tie_embeddings": config.get("tie_word_embeddings") is True,
        "norm_eps": _positive(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        "rope_theta": _positive(_rope(config).get("rope_theta") or 10_000.0, "rope_theta", where),
        "rope_scaling": _scaling(_rope(config), where),
        "qk_norm": architecture == QWEN3,
        "qkv_bias": architecture == QWEN2 or has_output_biases(config),
        "vocab_size": _size(config, "vocab_size", where),
        **_LIKE_LLAMA,
    }
    return {key: found[key] for key in FOLDER_KEYS}


def architecture_of(config: Mapping[str, Any], where: str) -> str:
    """The architecture that a `config.json` names, one of `READABLE`.

    Raises:
        UserError: another one, or one that comes with code of its own.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else _MODEL_TYPES.get(str(config.get("model_type")))
    if name not in READABLE:
        kind = name or config.get("model_type") or "(none)"
        why = f" ({_WHY_NOT[str(kind)]})" if kind in _WHY_NOT else ""
        raise UserError(f"{where}: a run cannot start from a {kind}{why}; it can from {', '.join(READABLE)}")
    if config.get("auto_map"):
        raise UserError(f"{where}: its auto_map names code that comes with the folder, which is never run")
    return str(name)


def has_output_biases(config: Mapping[str, Any]) -> bool:
    """Whether attention has biases on queries, keys and values, and on its result, where ours has none."""
    return bool(config.get("attention_bias"))


def attention_window(config: Mapping[str, Any], where: str) -> int | None:
    """How many tokens a token sees, itself among them; None: all before it. Ours sees all.

    In Mistral it holds wherever it is given; Qwen has a switch for it, and blocks from the bottom without it.
    """
    architecture = architecture_of(config, where)
    if architecture == LLAMA or config.get("sliding_window", 4096) is None:
        return None
    if architecture != MISTRAL:
        if not config.get("use_sliding_window"):
            return None
        kinds, below = config.get("layer_types"), config.get("max_window_layers", 28)
        if isinstance(kinds, list):
            sees_all = all(kind == "full_attention" for kind in kinds)
        else:
            sees_all = isinstance(below, int) and below >= _size(config, "num_hidden_layers", where)
        if sees_all:
            return None
    return _size(config, "sliding_window", where, 4096)


def folder_config(start: Any) -> Path | None:
    """The `config.json` of a Hugging Face folder, if `model.init_from` names one that is there."""
    path = Path(start) / HF_CONFIG if isinstance(start, str) else None
    return path if path is not None and path.is_file() else None


def sizes_from_folder(model: Mapping[str, Any], run_dir: str, where: str) -> dict[str, Any]:
    """Fill in the keys of `model:` that a Hugging Face folder in its `init_from` says.

    Any other `init_from` leaves them as they are. So does a folder that is not there: what then is wrong is told where
    the weights are read. But a run that goes on does not need them; it has kept the sizes in its own `config.yaml`.

    Raises:
        UserError: a key contradicts the folder, or the folder cannot be started from.
    """
    start = model.get("init_from")
    if (path := folder_config(start)) is None:
        given = {key: value for key, value in model.items() if value is not None}
        return {**_kept_sizes(start, Path(run_dir)), **given}
    found = model_keys(read_json(path), str(path))
    for key, theirs in found.items():
        ours = model.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            ours = {**theirs, **ours}
        if ours is not None and ours != theirs:
            raise UserError(
                f"{where}: model.{key} is {ours}, but {theirs} in model.init_from {start}; leave it out (a preset sets "
                "it, too), and it is taken from there"
            )
    return {**model, **found}


def _kept_sizes(start: Any, run_dir: Path) -> dict[str, Any]:
    """What a run that began with a folder that is gone took from it; nothing where this is no such run."""
    kept = run_dir / "config.yaml"
    if not isinstance(start, str) or Path(start).exists() or not kept.is_file():
        return {}
    try:
        resolved = yaml.safe_load(kept.read_text(encoding="utf-8"))
        model = resolved["model"]
        return {key: model[key] for key in FOLDER_KEYS if key in model} if model["init_from"] == start else {}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"model.init_from {start} is not here, and {kept}, which has the sizes that the run took from it, cannot "
            "be read; put one of them back"
        ) from error


def _refusals(config: Mapping[str, Any], architecture: str) -> Iterator[tuple[str, Any, str]]:
    """Keys of a `config.json`, their values, and why a run cannot start from a model with them."""
    for key in ("mlp_bias", "bias"):
        if config.get(key):
            yield key, config[key], "this model has biases on queries, keys and values at most (model.qkv_bias)"
    if has_output_biases(config) and architecture not in (LLAMA, QWEN3):
        yield "attention_bias", config["attention_bias"], f"{architecture} has no such choice"
    if config.get("hidden_act", "silu") != "silu":
        yield "hidden_act", config["hidden_act"], "the only gated activation here is swiglu, which is silu"
    rope = _rope(config)
    if _rope_type(rope) not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        yield "rope_parameters (or rope_scaling)", rope, "rotary positions are scaled by rope_type llama3 only here"
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        yield "partial_rotary_factor", part, "all of a head is rotated here"
    if config.get("quantization_config"):
        yield "quantization_config", config["quantization_config"], "only plain weights can be trained"


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of rotary positions, wherever a version of transformers puts them."""
    top = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    inner = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return {**top, **inner} if isinstance(inner, dict) else {"rope_type": inner}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type")) or "default"


def _scaling(rope: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """What they say in the words of `model.rope_scaling`."""
    if _rope_type(rope) == "default":
        return None
    given = {key: rope[key] for key in RopeScalingSection.model_fields if key in rope}
    try:
        return RopeScalingSection.model_validate(given).model_dump()
    except ValidationError as error:
        problem = error.errors()[0]
        key = "".join(f".{part}" for part in problem["loc"])
        raise UserError(f"{where}: rope_scaling{key}: {problem['msg'].removeprefix('Value error, ')}") from error


def _size(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {key} must be a whole number from 1 on, not {json.dumps(value)}")
    return value


def _positive(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} must be a number above 0, not {json.dumps(value)}")
    return float(value)
