"""Muon (Jordan et al. 2024): a matrix moves along its momentum with all singular values made one.

The same definition as `torch.optim.Muon`, which takes one matrix at a time: here those of a shape, or of its transpose,
go through the products together. That is several times faster where matrices are small, and the same where they are
large. The update is scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so that one learning rate and decay
serve both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from llmtrain.model.limits import BATCH_NUMEL
from llmtrain.optim.eager import EagerOptimizer

# One step maps a singular value s to 3.4445 s − 4.7750 s³ + 2.0315 s⁵; five bring all to between 0.7 and 1.2 (Jordan et
# al. 2024) but those that are very small beside the norm.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPS = 1e-7


class Muon(EagerOptimizer):
    """For matrices only.

    The products are made in `product_dtype`; see the function of that name.

    `found_inf`, where it is set (float32 scalar on the device), is honoured as by torch's fused optimizers: 1 leaves
    everything as it is, and the host does not wait to see it.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float, weight_decay: float, *, product_dtype: torch.dtype):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._product_dtype = product_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all matrices that have a gradient."""
        assert closure is None, "nobody asks for the loss here"
        refused: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for matrices in _batches([matrix for matrix in group["params"] if matrix.grad is not None]):
                self._step_batch(matrices, group, None if refused is None else refused != 0)

    def _step_batch(self, matrices: list[Tensor], group: dict[str, Any], refused: Tensor | None) -> None:
        beta, lr = group["momentum"], group["lr"]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        momenta = [self._momentum(matrix) for matrix in matrices]
        moved = torch._foreach_lerp(momenta, gradients, 1 - beta)
        directions = torch._foreach_lerp(gradients, moved, beta)
        updates = orthogonalised(torch.stack([_wide(direction) for direction in directions]), self._product_dtype)
        decay: Tensor | float = 1 - lr * group["weight_decay"]
        if refused is not None:
            moved = tuple(torch.where(refused, old, new) for old, new in zip(momenta, moved, strict=True))
            updates = torch.where(refused, 0.0, updates)
            decay = torch.where(refused, 1.0, decay)
        torch._foreach_copy_(momenta, moved)
        torch._foreach_mul_(matrices, decay)
        turned = [update if _is_wide(matrix) else update.mT for matrix, update in zip(matrices, updates, strict=True)]
        torch._foreach_add_(matrices, turned, alpha=-lr * _scale(matrices[0]))

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def orthogonal_update(momentum: Tensor, lr: float, product_dtype: torch.dtype) -> Tensor:
    """What Muon adds to a matrix, float32 (rows, columns), for what its momentum makes of the gradient."""
    update = orthogonalised(_wide(momentum)[None], product_dtype)[0]
    return (update if _is_wide(momentum) else update.mT) * (-lr * _scale(momentum))


def orthogonalised(matrices_NRC: Tensor, product_dtype: torch.dtype) -> Tensor:
    """Make all singular values of each matrix about one, by Newton-Schulz steps.

    Args:
        matrices_NRC: float32, no more rows than columns.
        product_dtype: of the products.

    Returns:
        float32 (N, R, C).
    """
    norms_N11 = matrices_NRC.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    x_NRC = (matrices_NRC / norms_N11.clamp(min=_EPS)).to(product_dtype)
    linear, cubic, quintic = _COEFFICIENTS
    for _ in range(_STEPS):
        gram_NRR = x_NRC @ x_NRC.mT
        mixed_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=cubic, alpha=quintic)
        x_NRC = torch.baddbmm(x_NRC, mixed_NRR, x_NRC, beta=linear)
    return x_NRC.float()


def product_dtype(device: torch.device, precision: str) -> torch.dtype:
    """What the products are made in: bf16 is enough for them (Jordan et al. 2024), wherever that is fast.

    That is on a GPU, and where the run's `precision` is bf16.
    """
    return torch.bfloat16 if device.type == "cuda" or precision == "bf16" else torch.float32


def _batches(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Sort matrices by what they are when laid wide, and cut what is too many numbers at once."""
    alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        alike[tuple(sorted(matrix.shape))].append(matrix)
    for shape, members in alike.items():
        count = max(1, BATCH_NUMEL // math.prod(shape))
        for begin in range(0, len(members), count):
            yield members[begin : begin + count]


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if _is_wide(matrix) else matrix.mT


def _scale(matrix: Tensor) -> float:
    """The root mean square of AdamW's updates is about 0.2; that of an orthogonal matrix is 1 / √(longer side)."""
    return 0.2 * math.sqrt(max(matrix.shape))
