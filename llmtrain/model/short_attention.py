"""Causal attention over short sequences in bf16 on a CPU, with a backward pass of our own.

torch's takes eight times as long as its forward pass there: its products are small, and not those for which a CPU has
bf16. These are batches of whole ones, 1.2 to 4 times as fast (docs/LOG.md), and round no more: scores, their gradients
and all sums are float32, and only what goes into a product is bf16 (Dao et al. 2022, section 3.1).
Letters as in transformer.py; G is the query heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from llmtrain.model.limits import LONGEST_SHORT, MOST_SCORES

_ONE_AT_A_TIME = Lock()  # for what `_products_in_bf16` changes is of the whole process


def short_attention(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
    """`scaled_dot_product_attention(..., is_causal=True, enable_gqa=True)`, forward bit for bit, of what suits it."""
    y_BHSE: Tensor = _ShortAttention.apply(q_BHSE, k_BKSE, v_BKSE)  # type: ignore[no-untyped-call]
    return y_BHSE


def suits_short_attention(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> bool:
    """Whether it is for such tensors, all of one type and device: the kernel that it calls would not check them."""
    if q_BHSE.dtype != torch.bfloat16 or q_BHSE.device.type != "cpu":
        return False
    is_laid_out = all(x.stride(-1) == 1 for x in (q_BHSE, k_BKSE, v_BKSE))
    return is_laid_out and 0 < q_BHSE.shape[2] == k_BKSE.shape[2] <= LONGEST_SHORT


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y_BHSE, log_sums_BHS = attend(q_BHSE, k_BKSE, v_BKSE, is_causal=True)
        ctx.save_for_backward(q_BHSE, k_BKSE, v_BKSE, y_BHSE, log_sums_BHS)
        return y_BHSE  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient_BHSE: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = torch.ops.llmtrain.attention_gradients(*ctx.saved_tensors, gradient_BHSE)
        return gradients


def attention_gradients(  # noqa: PLR0917 -- torch wants an operator's tensors to be positional
    q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, y_BHSE: Tensor, log_sums_BHS: Tensor, gradient_BHSE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, from that of the result.

    Args:
        q_BHSE, k_BKSE, v_BKSE, y_BHSE: bf16: what attention was given, and its result.
        log_sums_BHS: float32, the logarithm of the sum of each query's exponentiated scores.
        gradient_BHSE: bf16, of the result.
    """
    batch, kv_heads, length, _ = k_BKSE.shape
    groups = q_BHSE.shape[1] // kv_heads
    q_gradient, k_gradient, v_gradient = _alike(q_BHSE, k_BKSE, v_BKSE)
    k_BK1SE, v_BK1SE = k_BKSE.unsqueeze(2), v_BKSE.unsqueeze(2)
    with _products_in_bf16():
        for part in _parts(batch, kv_heads, max(1, MOST_SCORES // (groups * length**2))):
            of_q, of_k, of_v = _gradients(
                _float32(_grouped(q_BHSE, groups)[part]),
                _float32(k_BK1SE[part]),
                _float32(v_BK1SE[part]),
                y=_float32(_grouped(y_BHSE, groups)[part]),
                log_sums=_grouped(log_sums_BHS, groups)[part].unsqueeze(-1),
                gradient=_float32(_grouped(gradient_BHSE, groups)[part]),
            )
            _grouped(q_gradient, groups)[part] = of_q
            k_gradient[part], v_gradient[part] = _over_groups(of_k), _over_groups(of_v)
    return q_gradient, k_gradient, v_gradient


def _alike(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BHSE), torch.empty_like(k_BKSE), torch.empty_like(v_BKSE)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, *, y: Tensor, log_sums: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All float32, (B, K, G, S, E); of k and v G is 1 and of `log_sums` E."""
    scale = q.shape[-1] ** -0.5
    p = q @ k.mT
    torch.add(-log_sums, p, alpha=scale, out=p).exp_().tril_()
    of_scores = (gradient @ v.mT).sub_((gradient * y).sum(-1, keepdim=True)).mul_(p)
    return (of_scores @ k).mul_(scale), (of_scores.mT @ q).mul_(scale), p.mT @ gradient


def _grouped(x_BH: Tensor, groups: int) -> Tensor:
    """A view (B, K, G, …)."""
    return x_BH.view(x_BH.shape[0], -1, groups, *x_BH.shape[2:])


def _float32(x: Tensor) -> Tensor:
    """Laid out for products, or each of them would do it anew."""
    return x.to(torch.float32, memory_format=torch.contiguous_format)


def _over_groups(x_BKGSE: Tensor) -> Tensor:
    return x_BKGSE.sum(2) if x_BKGSE.shape[2] > 1 else x_BKGSE.squeeze(2)


def _parts(batch: int, heads: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Cut (B, K) into whole sequences, or into heads of one where not even one fits."""
    rows, columns = max(1, at_once // heads), min(heads, at_once)
    for row in range(0, batch, rows):
        for column in range(0, heads, columns):
            yield slice(row, row + rows), slice(column, column + columns)


@contextmanager
def _products_in_bf16() -> Iterator[None]:
    """Products of float32 matrices take their numbers in bf16, which those from bf16 are, and add up in float32."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _ONE_AT_A_TIME:
        before = settings.fp32_precision
        try:
            settings.fp32_precision = "bf16"
            yield
        finally:
            settings.fp32_precision = "none"  # what the settings above it say
            if settings.fp32_precision != before:
                settings.fp32_precision = before


def _register() -> None:
    """Make it one operator to a compiler. (`torch.library.custom_op` would import that at its first call.)"""
    torch.library.define(
        "llmtrain::attention_gradients",
        "(Tensor q, Tensor k, Tensor v, Tensor y, Tensor log_sums, Tensor gradient) -> (Tensor, Tensor, Tensor)",
    )
    torch.library.impl("llmtrain::attention_gradients", "CPU", attention_gradients)
    torch.library.register_fake("llmtrain::attention_gradients", _alike)


_register()
