"""What the parameters of the transformer are called in a Hugging Face folder, and how they lie in its tensors.

Queries and keys need no permutation: both rotate the pairs (i, i + E/2) of a head, and normalise before they do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from llmtrain.config import ModelSection
from llmtrain.hf_config import GPT2, QWEN2
from llmtrain.model.transformer import Transformer

Shape = tuple[int, ...]
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_VOCABULARY = ("embedding.weight", "head.weight")  # one row an id
_LIKE_LLAMA = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.q.bias": "self_attn.q_proj.bias",
    "attention.k.bias": "self_attn.k_proj.bias",
    "attention.v.bias": "self_attn.v_proj.bias",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ff_norm.weight": "post_attention_layernorm.weight",
    "ff.gate.weight": "mlp.gate_proj.weight",
    "ff.up.weight": "mlp.up_proj.weight",
    "ff.down.weight": "mlp.down_proj.weight",
}
_LIKE_GPT2 = {
    "embedding.weight": "transformer.wte.weight",
    "position.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "head.weight": "lm_head.weight",
    "attention_norm.weight": "ln_1.weight",
    "attention.q.weight": "attn.c_attn.weight",  # k and v follow in the same tensor
    "attention.out.weight": "attn.c_proj.weight",
    "ff_norm.weight": "ln_2.weight",
    "ff.up.weight": "mlp.c_fc.weight",
    "ff.down.weight": "mlp.c_proj.weight",
}
OUTPUT_BIAS = "self_attn.o_proj.bias"  # which only folders have
_UNDER_QUERIES = ("attention.k.weight", "attention.v.weight")
_BIASES = ("attention.q.bias", "attention.k.bias", "attention.v.bias")


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a folder.

    `parts` are the parameters that, one under the other, make it, transposed where it is stored as inputs × outputs;
    without parts it is zero: a bias that ours has not.
    """

    name: str
    shape: Shape
    parts: tuple[str, ...]
    is_transposed: bool = False


def parameter_shapes(config: ModelSection, seq_len: int) -> dict[str, Shape]:
    """The shape of every parameter of a model; a tied head is none."""
    with torch.device("meta"):
        model = Transformer(config, seq_len)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def llama_name(parameter: str) -> str:
    """The name in a Llama, Mistral or Qwen folder: `blocks.3.ff.up.weight` → `model.layers.3.mlp.up_proj.weight`."""
    block = _BLOCK.fullmatch(parameter)
    return f"model.layers.{block[1]}.{_LIKE_LLAMA[block[2]]}" if block else _LIKE_LLAMA[parameter]


def tensors_to_write(architecture: str, shapes: Mapping[str, Shape], vocab_size: int) -> list[HFTensor]:
    """The tensors of a folder, in the order of the model.

    Args:
        architecture: from `architecture_for`.
        shapes: of all parameters.
        vocab_size: ids of the tokenizer: rows after them pad the vocabulary and are left out.
    """
    written = {name: (vocab_size, *shape[1:]) if name in _VOCABULARY else shape for name, shape in shapes.items()}
    if architecture == GPT2:
        return [tensor for name in written for tensor in _of_gpt2(name, written)]
    tensors = []
    has_output_biases = architecture != QWEN2 and any(name.endswith(_BIASES) for name in shapes)
    for name, shape in written.items():
        tensors.append(HFTensor(llama_name(name), shape, (name,)))
        if has_output_biases and name.endswith("attention.out.weight"):
            tensors.append(HFTensor(llama_name(name).removesuffix("weight") + "bias", shape[:1], ()))
    return tensors


def _of_gpt2(parameter: str, shapes: Mapping[str, Shape]) -> Iterator[HFTensor]:
    """A weight and its bias; matrices of the blocks are stored as inputs × outputs."""
    block = _BLOCK.fullmatch(parameter)
    inner = block[2] if block else parameter
    if inner in _UNDER_QUERIES + _BIASES:
        return
    name = f"transformer.h.{block[1]}.{_LIKE_GPT2[inner]}" if block else _LIKE_GPT2[inner]
    below = _UNDER_QUERIES if inner == "attention.q.weight" else ()
    parts = (parameter, *(parameter.replace("attention.q.weight", other) for other in below))
    outputs = sum(shapes[part][0] for part in parts)
    is_matrix = block is not None and len(shapes[parameter]) == 2
    shape = (shapes[parameter][1], outputs) if is_matrix else shapes[parameter]
    yield HFTensor(name, shape, parts, is_transposed=is_matrix)
    if block is not None or inner == "norm.weight":
        biases = (part.removesuffix("weight") + "bias" for part in parts)
        yield HFTensor(
            name.removesuffix("weight") + "bias", (outputs,), tuple(bias for bias in biases if bias in shapes)
        )
