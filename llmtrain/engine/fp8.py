"""`training.fp8`: the products of the blocks' matrices in 8 bits, by torchao.

Inputs and weights are rounded to e4m3, gradients to e5m2 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning",
section 3), each tensor at a scale of its own that is computed anew in each step. The rest is as under bf16: embedding,
head, norms, attention, and the float32 weights that the optimizer updates, under the same names.
"""

from __future__ import annotations

import torch

from llmtrain.errors import UserError
from llmtrain.model.transformer import Transformer


def multiplies_fp8(device: torch.device) -> bool:
    """Whether fp8 products are in the hardware: CUDA from Ada and Hopper on (compute capability 8.9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def to_fp8(model: Transformer, device: torch.device) -> None:
    """Let the linear layers of the blocks multiply in fp8.

    Raises:
        UserError: the device or torchao is missing.
    """
    if not multiplies_fp8(device):
        raise UserError(
            f"training.fp8 needs a GPU that multiplies in fp8 (compute capability 8.9 or more), not {device}; "
            "set it to false"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        raise UserError(f"training.fp8 needs torchao ({error}); pip install -c constraints.txt -e '.[fp8]'") from error
    # Emulated is rounded to fp8 and multiplied in bf16: for the tests, as what cannot multiply in fp8 is refused above.
    convert_to_float8_training(model.blocks, config=Float8LinearConfig(emulate=device.type != "cuda"))
