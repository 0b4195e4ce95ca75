"""Cross-entropy of next-token prediction, as a sum: the one place that divides is the engine.

The logits of a batch may take more memory than all else: for 8 × 2048 tokens and a vocabulary of 50,304 they are 3.3 GB
in float32, and as much again for their gradient. So beyond a limit they are made for a few tokens at a time, and what
is needed of them backward is computed at once: they are never all there, and never made twice. In bf16 it is always
computed at once, for that takes fewer passes over the logits; float32 below the limit keeps torch's order of rounding.
Their gradient takes their place a few rows at a time, which on a CPU stay in its cache meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everyone reads

from llmtrain.model.limits import MOST_LOGITS, tokens_at_once, tokens_in_float32

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
    """For as many tokens at a time as the limit lets; the gradients of the sum are made on the way forward.

    R is the tokens of a part.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, of_each_N: Tensor | None) -> Tensor:
        dtype = _product_dtype(hidden_ND)
        wants_gradient = any(ctx.needs_input_grad)
        hidden_gradient_ND = torch.empty_like(hidden_ND) if wants_gradient else hidden_ND
        weight_gradient_VD: Tensor | None = None
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        columns_N = targets_N.clamp(max=0)  # of the log-probabilities of the targets alone; -100 stays
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight = weight_VD.to(dtype)  # once: autocast would do it for each part
            for part in _parts(len(targets_N), weight_VD):
                hidden_RD, targets_R = hidden_ND[part].to(dtype), targets_N[part]
                logits_RV = hidden_RD @ weight.T
                log_p_R1 = _log_p(logits_RV, targets_R, wants_gradient)
                loss += F.nll_loss(log_p_R1, columns_N[part], ignore_index=IGNORE_INDEX, reduction="sum")
                if of_each_N is not None:
                    _look_up(log_p_R1, columns_N[part], of_each_N[part])
                if wants_gradient:
                    gradient_RV = logits_RV
                    counts_R1 = (targets_R != IGNORE_INDEX)[:, None]
                    torch.mul(gradient_RV @ weight, counts_R1, out=hidden_gradient_ND[part])
                    counted_RD = hidden_RD * counts_R1
                    if weight_gradient_VD is None:
                        weight_gradient_VD = (gradient_RV.T @ counted_RD).float()
                    elif dtype == torch.float32:
                        weight_gradient_VD.addmm_(gradient_RV.T, counted_RD)
                    else:
                        weight_gradient_VD += gradient_RV.T @ counted_RD
                    del gradient_RV
                del logits_RV  # or they would be there beside those of the next part
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


def _log_p(logits_RV: Tensor, targets_R: Tensor, wants_gradient: bool) -> Tensor:
    """The log-probability of each target, (R, 1) in float32; of none it is that of some token.

    If it is wanted, the gradient of the sum of -log p is written over the logits: softmax, less one at the target. Rows
    without a target are not made zero.
    """
    at_R1 = targets_R.clamp(min=0)[:, None]
    found = list[Tensor]()
    step = tokens_in_float32(logits_RV.shape[1], logits_RV.device.type)
    for begin in range(0, len(logits_RV), step):
        rows = slice(begin, begin + step)
        log_p = logits_RV[rows].float().log_softmax(dim=-1)
        found.append(log_p.gather(1, at_R1[rows]))
        if wants_gradient:
            logits_RV[rows] = log_p.exp_().scatter_add_(1, at_R1[rows], torch.full_like(found[-1], -1.0))
    return torch.cat(found)


def _parts(tokens: int, weight_VD: Tensor) -> Iterator[slice]:
    step = tokens_at_once(len(weight_VD), MOST_LOGITS)
    return (slice(begin, begin + step) for begin in range(0, max(1, tokens), step))
