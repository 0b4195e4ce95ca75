"""Attention with a backward pass of our own is torch's, and rounds no more."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everyone reads
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.config import make_config
from llmtrain.model import short_attention as module
from llmtrain.model.short_attention import attention_gradients, short_attention, suits_short_attention
from llmtrain.model.transformer import Transformer
from llmtrain.resolve import resolve


def inputs(heads: int, kv_heads: int, length: int, width: int) -> list[Tensor]:
    """Queries, keys, values as the model lays them out, (B, S, H, E) in memory, and a gradient of the result."""
    generator = torch.Generator().manual_seed(heads * length)
    return [
        torch.randn(3, length, count, width, generator=generator).bfloat16().transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def gradients(attend: Any, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attend(*leaves)
    return y.detach(), list(torch.autograd.grad(y, leaves, gradient))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "width"), [(4, 4, 256, 64), (6, 2, 100, 40), (4, 1, 33, 16), (2, 2, 1, 8)]
)
@pytest.mark.parametrize("at_once", [1, 3, 1000])  # scores of so many key-value heads
def test_it_is_torchs_forward_and_no_less_exact_backward(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, length: int, width: int, at_once: int
) -> None:
    """Against float64 of the same inputs, by the norm of what each is off; 5 % for luck in the last bit. What one
    position has of queries and keys is zero, and both get that to float32's rounding."""
    monkeypatch.setattr(module, "MOST_SCORES", at_once * heads // kv_heads * length**2)
    q, k, v, gradient = inputs(heads, kv_heads, length, width)
    ours, of_ours = gradients(short_attention, q, k, v, gradient)
    torchs, of_torchs = gradients(plain, q, k, v, gradient)
    _, exact = gradients(plain, q.double(), k.double(), v.double(), gradient.double())
    assert torch.equal(ours, torchs)
    for our, torch_, true in zip(of_ours, of_torchs, exact, strict=True):
        assert our.dtype == torch.bfloat16 and our.shape == true.shape
        off, torch_off = ((x.double() - true).norm() for x in (our, torch_))
        assert off <= 1.05 * torch_off + 2**-20 * gradient.norm()


def model_gradients(is_bf16: bool, dropout: float = 0.0, compiled: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    config = make_config({"model": {"dim": 64, "layers": 2, "heads": 4, "dropout": dropout}})
    config = resolve(config, vocab_size=101, world_size=1, bf16_native=True, compile_auto=False)
    model = Transformer(config.model, seq_len=48)
    model.init_weights()
    for block in model.blocks if compiled else ():
        block.compile()
    ids = torch.randint(101, (2, 48), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        loss = model(ids, ids)
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_a_model_in_bf16_takes_it_and_float32_and_dropout_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[dict[str, Any]] = [{"is_bf16": True}, {"is_bf16": False}, {"is_bf16": True, "dropout": 0.1}]
    with_it = [model_gradients(**case) for case in cases]
    monkeypatch.setattr(module, "LONGEST_SHORT", 47)
    without = [model_gradients(**case) for case in cases]
    same = [all(map(torch.equal, a, b)) for a, b in zip(with_it, without, strict=True)]
    assert same == [False, True, True]


def test_without_a_gradient_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("taken where there is no backward pass")

    monkeypatch.setattr("llmtrain.model.transformer.short_attention", refuse)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        model_gradients(True)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the norm of all gradients as near to float32's as torch's way, to 5 %: fused operators round elsewhere."""
    exact, compiled = flat(model_gradients(False)), flat(model_gradients(True, compiled=True))
    eager = flat(model_gradients(True))
    monkeypatch.setattr(module, "LONGEST_SHORT", 0)
    torchs = flat(model_gradients(True))
    for ours in (eager, compiled):
        assert (ours - exact).norm() <= 1.05 * (torchs - exact).norm()


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("before", ["none", "ieee", "tf32", "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_precision_of_products_is_bf16_within_and_as_before_afterwards(before: str, fails: bool) -> None:
    settings = torch.backends.mkldnn.matmul
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(settings.fp32_precision)
            return func(*args, **(kwargs or {}))

    q, k, v, gradient = inputs(2, 2, 8, 8)
    y, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
    settings.fp32_precision = before
    try:
        with Seen(), pytest.raises(RuntimeError) if fails else nullcontext():
            attention_gradients(q, k, v, y, log_sums, gradient[..., :4] if fails else gradient)
        assert settings.fp32_precision == before and "bf16" in seen
    finally:
        settings.fp32_precision = "none"


def test_an_inherited_precision_stays_inherited() -> None:
    q, k, v, gradient = inputs(2, 2, 8, 8)
    try:
        torch.backends.fp32_precision = "tf32"
        short_attention(q.requires_grad_(), k, v).backward(gradient)
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_what_its_kernel_would_not_check_does_not_suit_it() -> None:
    q, k, v, _ = inputs(4, 2, 16, 8)
    assert suits_short_attention(q, k, v)
    assert not suits_short_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0])
    assert not suits_short_attention(q[:, :, :1], k, v)
    assert not suits_short_attention(q, k, v.mT.contiguous().mT)
    assert not suits_short_attention(q.float(), k, v)


def test_a_compiler_may_trust_what_is_said_of_the_operator() -> None:
    q, k, v, gradient = inputs(4, 2, 16, 8)
    y, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
    torch.library.opcheck(torch.ops.llmtrain.attention_gradients, (q, k, v, y, log_sums, gradient))
