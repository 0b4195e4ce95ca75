"""Parameter groups and the optimizers over them.

Every parameter is in exactly one group. Matrices decay (decoupled, Loshchilov and Hutter 2019); norms, biases and
embeddings do not. All groups follow the one learning rate of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from llmtrain.config import OptimizerSection

_ADJUST_LR = "match_rms_adamw"


class Combined(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters that look like one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        # The very same dicts, so that a learning rate set here is the one that is used there.
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        # One state for all, likewise: their parameters are disjoint.
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step each of them."""
        assert closure is None, "a closure would run once for each optimizer"
        for optimizer in self.optimizers:
            step_unless(optimizer, getattr(self, "found_inf", None))


class Muon(torch.optim.Muon):
    """torch's, which also honours `found_inf`, as torch's fused optimizers do: 1 leaves everything as it is.

    Without a wait for the device: each matrix is stepped, and put back where the flag says so. That costs room for one
    matrix and its momentum, and a few passes over them, beside five rounds of matrix products.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step each matrix, unless `found_inf` is 1."""
        assert closure is None, "a closure would run once for each matrix"
        refused: Tensor | None = getattr(self, "found_inf", None)
        if refused is None:
            super().step()  # type: ignore[no-untyped-call]
            return
        groups = self.param_groups
        for group in groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step_matrix(matrix, group, refused != 0)
        self.param_groups = groups

    def _step_matrix(self, matrix: Tensor, group: dict[str, Any], refused: Tensor) -> None:
        momentum = self.state[matrix].get("momentum_buffer")
        before = matrix.clone(), torch.zeros_like(matrix) if momentum is None else momentum.clone()
        self.param_groups = [{**group, "params": [matrix]}]
        super().step()  # type: ignore[no-untyped-call]
        for now, old in zip((matrix, self.state[matrix]["momentum_buffer"]), before, strict=True):
            now.copy_(torch.where(refused, old, now))


def step_unless(optimizer: torch.optim.Optimizer, refused: Tensor | None) -> None:
    """Step an optimizer of `make_optimizer`; where `refused` (float32 scalar, on its device) is 1, nothing changes."""
    # What torch's own gradient scaler sets; fused kernels look at it on the device.
    optimizer.found_inf = refused  # type: ignore[attr-defined]
    optimizer.step()


def orthogonal_update(momentum: Tensor, lr: float) -> Tensor:
    """What Muon adds to a matrix, shape (rows, columns), for what its momentum makes of the gradient."""
    change = nn.Parameter(torch.zeros_like(momentum))
    change.grad = momentum
    torch.optim.Muon([change], lr=lr, momentum=0.0, weight_decay=0.0, adjust_lr_fn=_ADJUST_LR).step()  # type: ignore[no-untyped-call]
    return change.detach()


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters into `matrices` (of the blocks), `head`, `embeddings` and `vectors` (norms, biases).

    By the module that holds them, not by their shape: cut over ranks by ZeRO-3 they have none.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "head": [], "embeddings": [], "vectors": []}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:  # a tied head is the embedding, which comes first
                continue
            seen.add(parameter)
            if isinstance(module, nn.Embedding):
                groups["embeddings"].append(parameter)
            elif isinstance(module, nn.Linear) and name == "weight":
                groups["head" if path == "head" else "matrices"].append(parameter)
            else:
                groups["vectors"].append(parameter)
    return groups


def make_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.Optimizer:
    """Build the optimizer over all parameters of `model`, which already lies on its device.

    `muon` orthogonalises the momentum of the blocks' matrices (Jordan et al. 2024), its update scaled to the size of
    AdamW's (Liu et al. 2025, section 2.2) so that one learning rate and decay serve both; AdamW takes the rest.
    """
    if config.name == "muon":
        muon, rest = muon_groups(model, config)
        return Combined([Muon(**muon, adjust_lr_fn=_ADJUST_LR), make_elementwise(config, rest)])
    groups = parameter_groups(model)
    decayed = {"params": groups["matrices"] + groups["head"], "weight_decay": config.weight_decay}
    undecayed = {"params": groups["embeddings"] + groups["vectors"], "weight_decay": 0.0}
    return make_elementwise(config, [group for group in (decayed, undecayed) if group["params"]])


def muon_groups(model: nn.Module, config: OptimizerSection) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The group of the matrices that Muon orthogonalises, and the groups that it leaves to AdamW."""
    groups = parameter_groups(model)
    decay = {"weight_decay": config.weight_decay}
    muon = {"params": groups["matrices"], "lr": config.lr, "momentum": config.momentum, **decay}
    rest = [
        {"params": groups["head"], **decay},
        {"params": groups["embeddings"] + groups["vectors"], "weight_decay": 0.0},
    ]
    return muon, [group for group in rest if group["params"]]


def make_elementwise(config: OptimizerSection, groups: ParamsT) -> torch.optim.Optimizer:
    """An optimizer that treats each number on its own, and so does not care how parameters are cut: all but Muon."""
    # fused: one kernel for all parameters, on every device we run on
    common: dict[str, Any] = {"lr": config.lr, "fused": True}
    if config.name == "sgd":
        sgd = torch.optim.SGD(groups, momentum=config.momentum, **common)
        sgd.register_step_pre_hook(_begin_momentum)
        return sgd
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, betas=config.betas, eps=config.eps, **common)


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Momentum begins at zero, which gives the same numbers; a refused first step would leave torch's unwritten."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
