"""What published models say in `config.json` is read as what they are: their parameter counts come out."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.config import make_config
from llmtrain.errors import UserError
from llmtrain.hf_config import FOLDER_KEYS, architecture_for, attention_window, config_json, model_keys
from llmtrain.model.cost import parameter_count
from llmtrain.resolve import resolve

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "model_type": "llama"}
LLAMA_2 = {
    **LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "vocab_size": 32000, "pretraining_tp": 1,
}  # fmt: skip
LLAMA_3 = {
    **LLAMA_2, "intermediate_size": 14336, "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
# Without grouped heads, as the first folders of Llama were.
LLAMA_1 = {key: value for key, value in LLAMA_2.items() if key != "num_key_value_heads"}
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000,
}  # fmt: skip
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "hidden_size": 4096,
    "head_dim": 128, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None, "vocab_size": 151936,
    "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None, "attention_bias": False,
}  # fmt: skip
# As transformers 5 writes it.
NEW_QWEN_3 = {key: value for key, value in QWEN_3.items() if not key.startswith("rope")}
NEW_QWEN_3["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000}


@pytest.mark.parametrize(
    ("config", "parameters", "rope_theta", "window"),
    [
        (LLAMA_1, 6_738_415_616, 1e4, None),
        (LLAMA_2, 6_738_415_616, 1e4, None),
        (LLAMA_3, 8_030_261_248, 5e5, None),
        (MISTRAL, 7_241_732_096, 1e4, 4096),
        ({**MISTRAL, "sliding_window": None}, 7_241_732_096, 1e4, None),
        (QWEN_3, 8_190_735_360, 1e6, None),
        (NEW_QWEN_3, 8_190_735_360, 1e6, None),
    ],
)
def test_a_published_model_has_its_published_size(
    config: dict[str, Any], parameters: int, rope_theta: float, window: int | None
) -> None:
    keys = model_keys(config, "config.json")
    assert tuple(keys) == FOLDER_KEYS
    assert keys["rope_theta"] == rope_theta
    assert attention_window(config, "config.json") == window
    resolved = resolve(
        make_config({"model": keys}), vocab_size=config["vocab_size"], world_size=1, bf16_native=True, compile_auto=True
    ).model
    assert parameter_count(resolved, 2048) == parameters
    # And back: what is exported is read as the same model.
    written = config_json(resolved.model_dump(), 2048, config["vocab_size"])
    assert model_keys(written, "config.json") == keys
    assert architecture_for(keys) == config["architectures"][0].replace("Mistral", "Llama")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**LLAMA_3, "rope_scaling": {"factor": 8.0, "rope_type": "llama3"}}, "not scaled here"),  # Llama 3.1
        ({**QWEN_3, "hidden_size": 1024, "num_attention_heads": 16}, "head_dim is 128"),  # Qwen3 0.6B
        ({**QWEN_3, "architectures": ["Qwen2ForCausalLM"]}, "biases"),
        ({**QWEN_3, "use_sliding_window": True}, "use_sliding_window"),
        ({**LLAMA_2, "architectures": ["LlamaModel"]}, "cannot start from a LlamaModel"),
        ({"model_type": "gpt2"}, "cannot start from a GPT2LMHeadModel (it has biases"),
        ({}, "cannot start from a (none)"),
        ({**LLAMA_2, "rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
    ],
)
def test_a_model_that_ours_cannot_be_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        model_keys(config, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ") and said in str(error.value)
