"""The one meaning of `training.precision`, whatever the engine."""

from __future__ import annotations

import logging

import torch
from torch import nn

from llmtrain.config import TrainingSection
from llmtrain.engine.fp8 import to_fp8
from llmtrain.model.transformer import Transformer


def set_precision(model: Transformer, training: TrainingSection, device: torch.device) -> None:
    """Make the model compute in the run's precision from float32 weights, compiled where that is asked for.

    `bf16` is autocast: matrix products and attention in bf16, norms, the residual stream and the loss in float32.

    Raises:
        UserError: `fp8` where that cannot be.
    """
    if training.fp8:
        to_fp8(model, device)
    if training.compile is True:
        # Each block on its own: they share one compiled graph, so compile time does not grow with depth.
        # torch would cut each block's graph again, where DDP ends a bucket, to send it earlier: it is small as it is.
        torch._dynamo.config.optimize_ddp = False
        for block in model.blocks:
            block.compile()
        # It warns of operators in place in what is recomputed selectively; a block has none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    if training.precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]


def require_float32(weights: list[nn.Parameter] | list[torch.Tensor]) -> None:
    """Assert that what the optimizer updates is float32: small updates to bf16 weights would vanish in rounding."""
    kinds = {weight.dtype for weight in weights}
    assert kinds == {torch.float32}, f"master weights are {kinds}, not float32"
