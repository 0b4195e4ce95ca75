"""Cross-entropy of next-token prediction, as a sum: the one place that divides is the engine.

The logits of a batch may take more memory than all else: for 8 × 2048 tokens and a vocabulary of 50,304 they are 3.3 GB
in float32, and as much again for their gradient. So beyond a limit they are made for a few tokens at a time, and what
is needed of them backward is computed at once: they are never all there, and never made twice. In bf16 it is always
computed at once, for that takes fewer passes over the logits; float32 below the limit keeps torch's order of rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everyone reads

from llmtrain.model.limits import MOST_LOGITS, tokens_at_once

IGNORE_INDEX = -100  # target that counts for nothing, torch's default


def cross_entropy_sum(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over all targets that are not -100; computed in float32, 0 when there are none."""
    return F.cross_entropy(
        logits_BSV.float().flatten(0, -2), targets_BS.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def linear_cross_entropy_sum(hidden_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor, by_row: bool = False) -> Tensor:
    """The same for the logits `hidden @ weightᵀ`, in memory that does not grow with the vocabulary.

    Args:
        hidden_BSD: in any floating type; multiplied in autocast's where that is on.
        weight_VD: of the head.
        targets_BS: int64.
        by_row: also give the sum over each row's targets, without a gradient.

    Returns:
        float32 scalar; `by_row`: float32 (1 + B,), the very same sum, then each row's.
    """
    if not torch.is_grad_enabled():
        hidden_BSD, weight_VD = hidden_BSD.detach(), weight_VD.detach()  # or gradients would be made that nobody reads
    hidden_ND, targets_N = hidden_BSD.flatten(0, -2), targets_BS.flatten()
    of_each_N = torch.zeros_like(targets_N, dtype=torch.float32) if by_row else None
    is_bf16 = _product_dtype(hidden_ND) == torch.bfloat16
    if not is_bf16 and len(targets_N) <= tokens_at_once(len(weight_VD), MOST_LOGITS):
        # What `cross_entropy_sum` does in one call; its own sum stays, for one over rows would take another order.
        log_p_NV = F.linear(hidden_ND, weight_VD).float().log_softmax(dim=-1)
        loss = F.nll_loss(log_p_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")
        if of_each_N is not None:
            _look_up(log_p_NV.detach(), targets_N, of_each_N)
    else:
        loss = _InParts.apply(hidden_ND, weight_VD, targets_N, of_each_N)  # type: ignore[no-untyped-call]
    return loss if of_each_N is None else torch.cat([loss[None], of_each_N.view(targets_BS.shape).sum(-1)])


def _look_up(log_p_NV: Tensor, targets_N: Tensor, into_N: Tensor) -> None:
    """Write -log p(target), 0 where there is none."""
    into_N.copy_(F.nll_loss(log_p_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none"))


def loss_and_correct(hidden_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor, ids: int) -> Tensor:
    """The same without a gradient, and how many targets have the highest logit of the first `ids`: (2,), float32."""
    sums = hidden_BSD.new_zeros(2, dtype=torch.float32)
    hidden_ND, targets_N = hidden_BSD.flatten(0, -2), targets_BS.flatten()
    for part in _parts(len(targets_N), weight_VD):
        logits = F.linear(hidden_ND[part], weight_VD)
        correct = (logits[:, :ids].argmax(-1) == targets_N[part]).sum()
        sums += torch.stack((cross_entropy_sum(logits, targets_N[part]), correct))
    return sums


class _InParts(torch.autograd.Function):
    """For as many tokens at a time as the limit lets; the gradients of the sum are made on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, of_each_N: Tensor | None) -> Tensor:
        dtype = _product_dtype(hidden_ND)
        wants_gradient = any(ctx.needs_input_grad)
        hidden_gradient_ND = torch.empty_like(hidden_ND) if wants_gradient else hidden_ND
        weight_gradient_VD: Tensor | None = None
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight = weight_VD.to(dtype)  # once: autocast would do it for each part
            for part in _parts(len(targets_N), weight_VD):
                hidden, targets = hidden_ND[part].to(dtype), targets_N[part]
                log_p_NV = (hidden @ weight.T).float().log_softmax(dim=-1)
                loss += F.nll_loss(log_p_NV, targets, ignore_index=IGNORE_INDEX, reduction="sum")
                if of_each_N is not None:
                    _look_up(log_p_NV, targets, of_each_N[part])
                if wants_gradient:
                    gradient_NV = _logits_gradient(log_p_NV, targets).to(dtype)
                    counts_N1 = (targets != IGNORE_INDEX)[:, None]
                    torch.mul(gradient_NV @ weight, counts_N1, out=hidden_gradient_ND[part])
                    counted = hidden * counts_N1
                    if weight_gradient_VD is None:
                        weight_gradient_VD = (gradient_NV.T @ counted).float()
                    elif dtype == torch.float32:
                        weight_gradient_VD.addmm_(gradient_NV.T, counted)
                    else:
                        weight_gradient_VD += gradient_NV.T @ counted
                    del gradient_NV
                del log_p_NV  # or it would be there beside the logits of the next part
        ctx.gradients = hidden_gradient_ND, weight_gradient_VD
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("backward through the loss a second time: its gradients are made once, with the loss")
        hidden_gradient_ND, weight_gradient_VD = ctx.gradients
        ctx.gradients = None  # scaled where they lie, for they may be large: once
        return hidden_gradient_ND.mul_(scale), weight_gradient_VD.mul_(scale), None, None


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype


def _logits_gradient(log_p_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Softmax minus one at the target, written over the argument; rows without a target are not made zero."""
    gradient_NV = log_p_NV.exp_()
    at_N1 = targets_N.clamp(min=0)[:, None]
    return gradient_NV.scatter_add_(1, at_N1, gradient_NV.new_full(at_N1.shape, -1.0))


def _parts(tokens: int, weight_VD: Tensor) -> Iterator[slice]:
    step = tokens_at_once(len(weight_VD), MOST_LOGITS)
    return (slice(begin, begin + step) for begin in range(0, max(1, tokens), step))
