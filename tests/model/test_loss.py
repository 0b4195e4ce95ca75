"""The loss in parts is the loss, its gradients are its gradients, and its memory does not grow with the vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everyone reads

from llmtrain.model import limits
from llmtrain.model import loss as loss_module
from llmtrain.model.loss import IGNORE_INDEX, cross_entropy_sum, linear_cross_entropy_sum, loss_and_correct

VOCABULARY, WIDTH = 37, 16


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (2, 23, 16), a head (37, 16), and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 23, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (2, 23), generator=generator)
    targets[0, :5] = IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("tokens", [1, 7, 45, 46, 1000])
def test_any_number_of_tokens_at_a_time_gives_the_plain_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """In float64, but for the sums over parts, which are kept in float32: 46 of them at most, each off by 2⁻²⁴."""
    monkeypatch.setattr(loss_module, "MOST_LOGITS", tokens * VOCABULARY)
    monkeypatch.setattr(limits, "CACHED_LOGITS", 8 * VOCABULARY)
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # so that nothing is rounded to float32 on the way
    hidden, weight, targets = inputs(torch.float64)
    loss = linear_cross_entropy_sum(hidden, weight, targets)
    (loss * 0.25).backward()
    plain_hidden, plain_weight, _ = inputs(torch.float64)
    expected = cross_entropy_sum(plain_hidden @ plain_weight.T, targets)
    (expected * 0.25).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=46 * 2**-24)
    for ours, plain in ((hidden.grad, plain_hidden.grad), (weight.grad, plain_weight.grad)):
        assert ours is not None and plain is not None
        assert (ours - plain).abs().max() <= 46 * 2**-24 * plain.abs().max()


def test_below_the_limit_it_is_the_plain_loss_bit_for_bit() -> None:
    hidden, weight, targets = inputs()
    assert torch.equal(linear_cross_entropy_sum(hidden, weight, targets), cross_entropy_sum(hidden @ weight.T, targets))


@pytest.mark.parametrize("tokens", [7, 1000])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_the_loss_of_each_row_comes_beside_the_very_same_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, tokens: int, is_bf16: bool
) -> None:
    monkeypatch.setattr(loss_module, "MOST_LOGITS", tokens * VOCABULARY)
    found = []
    for by_row in (False, True):
        hidden, weight, targets = inputs()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            losses = linear_cross_entropy_sum(hidden, weight, targets, by_row)
            rows = [linear_cross_entropy_sum(hidden[row, None], weight, targets[row]).item() for row in range(2)]
        loss = losses[0] if by_row else losses
        (loss * 0.37).backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    assert losses.shape == (3,) and losses.dtype == torch.float32
    assert losses[1:].tolist() == pytest.approx(rows, rel=2**-9 if is_bf16 else 1e-6)
    for plain, ours in zip(*found, strict=True):
        assert plain is not None and ours is not None and torch.equal(plain, ours)


@pytest.mark.parametrize("tokens", [7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_products_are_in_its_type_and_gradients_in_the_weights(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int
) -> None:
    """Beside the plain loss of bf16 products: each is off by 2⁻⁹, the loss by less, for errors are of either sign."""
    monkeypatch.setattr(loss_module, "MOST_LOGITS", tokens * VOCABULARY)
    whole = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = cross_entropy_sum(F.linear(whole[0].to(dtype), whole[1]), whole[2])
    (expected * 0.37).backward()
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy_sum(hidden.to(dtype), weight, targets)
    assert loss.dtype == torch.float32
    (loss * 0.37).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2**-9)
    for ours, plain in ((hidden.grad, whole[0].grad), (weight.grad, whole[1].grad)):
        assert ours is not None and plain is not None and ours.dtype == torch.float32
        assert (ours - plain).norm() <= 2**-7 * plain.norm()


def test_whatever_the_type_of_the_states_the_loss_is_float32() -> None:
    """300,000 nats, which float16 does not hold."""
    hidden, weight = torch.zeros(1, 100_000, 4, dtype=torch.float16), torch.zeros(20, 4, dtype=torch.float16)
    loss = linear_cross_entropy_sum(hidden, weight, torch.zeros(1, 100_000, dtype=torch.int64))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(100_000 * math.log(20), rel=1e-4)


@pytest.mark.parametrize("is_bf16", [False, True])
def test_how_many_rows_are_in_float32_at_once_changes_no_bit(monkeypatch: pytest.MonkeyPatch, is_bf16: bool) -> None:
    monkeypatch.setattr(loss_module, "MOST_LOGITS", 20 * VOCABULARY)
    found = list[tuple[Tensor | None, ...]]()
    for rows in (1, 3, 20, 1000):
        monkeypatch.setattr(limits, "CACHED_LOGITS", rows * VOCABULARY)
        hidden, weight, targets = inputs()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = linear_cross_entropy_sum(hidden, weight, targets, by_row=True)
        loss[0].backward()
        found.append((loss, hidden.grad, weight.grad))
    for other in found[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(found[0], other, strict=True))


def test_without_a_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("gradients of logits were made")

    monkeypatch.setattr(Tensor, "scatter_add_", refuse)
    hidden, weight, targets = inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy_sum(hidden, weight, targets)


def test_a_second_backward_pass_says_what_is_wrong() -> None:
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy_sum(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_where_nothing_is_a_target_loss_and_gradients_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "MOST_LOGITS", VOCABULARY)
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("ids", [VOCABULARY, VOCABULARY // 2])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_loss_and_correct_count_as_the_whole_logits_do(monkeypatch: pytest.MonkeyPatch, tokens: int, ids: int) -> None:
    monkeypatch.setattr(loss_module, "MOST_LOGITS", tokens * VOCABULARY)
    hidden, weight, targets = inputs()
    logits = hidden @ weight.T
    loss, correct = loss_and_correct(hidden, weight, targets, ids).tolist()
    assert loss == pytest.approx(cross_entropy_sum(logits, targets).item(), rel=1e-6)
    assert correct == (logits[..., :ids].argmax(-1) == targets).sum().item()


def test_no_tensor_is_larger_than_the_limit_whatever_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the weight, its transpose and its gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (vocabulary,) and len(out) != WIDTH:
                self.numel = max(self.numel, out.numel())
            return out

    monkeypatch.setattr(loss_module, "MOST_LOGITS", 1 << 13)
    for vocabulary in (1000, 4000):
        hidden = torch.randn(4, 64, WIDTH, requires_grad=True)
        weight = torch.zeros(vocabulary, WIDTH, requires_grad=True)
        targets = torch.randint(vocabulary, (4, 64))
        with Largest() as largest:
            loss = linear_cross_entropy_sum(hidden, weight, targets)
            loss.backward()
        assert loss.item() == pytest.approx(256 * math.log(vocabulary), rel=1e-5)
        assert 0 < largest.numel <= 1 << 13
