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
LLAMA_3_SCALING = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
LLAMA_3_2 = {
    **LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "rope_scaling": LLAMA_3_SCALING, "tie_word_embeddings": True,
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
QWEN_2_5 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
# 0.6B; its heads are wider than hidden_size / num_attention_heads.
SMALL_QWEN_3 = {
    **QWEN_3, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28,
    "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL_NEMO = {
    **MISTRAL, "hidden_size": 5120, "head_dim": 128, "num_hidden_layers": 40, "rope_theta": 1000000.0,
    "sliding_window": None, "vocab_size": 131072,
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
        (SMALL_QWEN_3, 596_049_920, 1e6, None),
        # Where it is not said, Qwen3's heads are of 128.
        ({key: value for key, value in SMALL_QWEN_3.items() if key != "head_dim"}, 596_049_920, 1e6, None),
        (MISTRAL_NEMO, 12_247_782_400, 1e6, None),
        (LLAMA_3_2, 1_235_814_400, 5e5, None),
        (QWEN_2_5, 494_032_768, 1e6, None),
        ({**QWEN_2_5, "use_sliding_window": True}, 494_032_768, 1e6, 32768),
        ({**QWEN_2_5, "use_sliding_window": True, "max_window_layers": 24}, 494_032_768, 1e6, None),
        ({**QWEN_2_5, "use_sliding_window": True, "layer_types": ["full_attention"] * 24}, 494_032_768, 1e6, None),
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
    architecture = architecture_for(keys, qwen_tokenizer=True)
    assert architecture == config["architectures"][0].replace("Mistral", "Llama")
    written = config_json(resolved.model_dump(), architecture, 2048, config["vocab_size"])
    assert model_keys(written, "config.json") == keys
    # Beside another tokenizer transformers would misread Qwen2's.
    other = architecture_for(keys, qwen_tokenizer=False)
    assert other == architecture.replace("Qwen2", "Llama")
    assert model_keys(config_json(resolved.model_dump(), other, 2048, config["vocab_size"]), "config.json") == keys


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**LLAMA_3, "rope_scaling": {"factor": 8.0, "type": "dynamic"}}, "scaled by rope_type llama3 only"),
        ({**QWEN_2_5, "rope_scaling": {"factor": 4.0, "rope_type": "yarn"}}, "scaled by rope_type llama3 only"),
        ({**LLAMA_3, "rope_scaling": {**LLAMA_3_SCALING, "factor": 0.5}}, "rope_scaling.factor: Input should be gr"),
        ({**LLAMA_3, "rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor: Field required"),
        (
            {**LLAMA_3, "rope_scaling": {**LLAMA_3_SCALING, "high_freq_factor": 1}},
            "high_freq_factor 1 is not",
        ),
        ({**MISTRAL, "attention_bias": True}, "attention_bias is true, but MistralForCausalLM has no such choice"),
        ({**LLAMA_3, "mlp_bias": True}, "mlp_bias is true"),
        ({**LLAMA_3, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but all of a head is rotated"),
        ({**QWEN_2_5, "hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({**QWEN_3, "head_dim": 0}, "head_dim must be a whole number from 1 on, not 0"),
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
