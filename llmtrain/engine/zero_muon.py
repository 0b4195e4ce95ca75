"""Muon under ZeRO, with the numbers of the plain one.

ZeRO hands an optimizer flat slices, but Muon orthogonalises whole matrices. Its momentum is element-wise and stays cut;
what is to be orthogonalised is put together from the slices of all ranks, one matrix at a time, which costs one more
exchange of the size of the matrices in each step. (DeepSpeed's own Muon scales and rounds differently.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config import OptimizerSection
from llmtrain.engine.zero_layout import OwnedSlice, ZeroLayout
from llmtrain.optim.muon import orthogonal_update
from llmtrain.optim.optimizers import make_elementwise, muon_groups


class FlatMuon(torch.optim.Optimizer):
    """Does to flat slices what plain Muon and AdamW do to whole parameters; ZeRO steps one group at a time."""

    def __init__(self, model: nn.Module, config: OptimizerSection, device: torch.device, product_dtype: torch.dtype):
        muon, rest = muon_groups(model, config)
        self._adamw = make_elementwise(config, rest)
        super().__init__([muon, *self._adamw.param_groups], {})
        self._adamw.state = self.state
        self._product_dtype = product_dtype
        self._device = device  # where the ranks can exchange; offloaded slices lie elsewhere
        self._matrices: dict[Tensor, list[tuple[torch.Size, OwnedSlice | None]]] = {}

    def bind(self, layout: ZeroLayout) -> None:
        """Learn which matrices lie in which flat tensor; before the first step."""
        self._matrices = {flat: layout.members(group) for group, flat in enumerate(layout.flats)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the flat tensors that `param_groups` names now."""
        assert closure is None, "ZeRO has none"
        for group in self.param_groups:
            if "momentum" not in group:  # one of AdamW's
                self._adamw.param_groups = [group]
                self._adamw.step()
                continue
            for flat in group["params"]:
                self._step_matrices(flat, group)

    def _step_matrices(self, flat: Tensor, group: dict[str, Any]) -> None:
        assert flat.grad is not None
        state = self.state[flat]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        momentum = state["momentum_buffer"].lerp_(flat.grad, 1 - group["momentum"])
        nesterov = flat.grad.lerp(momentum, group["momentum"])
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for shape, owned in self._matrices[flat]:
            whole = torch.zeros(shape.numel(), device=self._device)
            if owned:
                there = slice(owned.start, owned.start + owned.numel)
                here = slice(owned.offset, owned.offset + owned.numel)
                whole[there] = nesterov[here]
            dist.all_reduce(whole)  # each element comes from one rank, so the sum is exact
            update = orthogonal_update(whole.view(shape), group["lr"], self._product_dtype).flatten()
            if owned:
                flat[here] += update[there].to(flat.device)
