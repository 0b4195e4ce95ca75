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
from llmtrain.optim.eager import EagerOptimizer, eager
from llmtrain.optim.muon import Muon


class Combined(EagerOptimizer):
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


def step_unless(optimizer: torch.optim.Optimizer, refused: Tensor | None) -> None:
    """Step an optimizer of `make_optimizer`; where `refused` (float32 scalar, on its device) is 1, nothing changes."""
    # What torch's own gradient scaler sets; fused kernels look at it on the device.
    optimizer.found_inf = refused  # type: ignore[attr-defined]
    optimizer.step()


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter of an optimizer of `make_optimizer` what its first step would, where there is none yet.

    The values are undefined, for they are about to be read from a checkpoint: memory that nothing has touched yet is
    written once then, and not three times.
    """
    if isinstance(optimizer, Combined):
        for part in optimizer.optimizers:
            make_state(part)
        return
    is_adam = isinstance(optimizer, torch.optim.Adam)  # AdamW is one, too
    slots: tuple[str, ...]
    for group in optimizer.param_groups:
        slots = ("exp_avg", "exp_avg_sq") if is_adam else ("momentum_buffer",)
        if isinstance(optimizer, torch.optim.SGD) and not group["momentum"]:
            slots = ()
        for parameter in group["params"] if slots else ():
            state = optimizer.state[parameter]
            if state:
                continue
            if is_adam:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update((slot, torch.empty_like(parameter)) for slot in slots)


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


def make_optimizer(
    model: nn.Module, config: OptimizerSection, product_dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Build the optimizer over all parameters of `model`, which already lies on its device.

    `muon` takes the blocks' matrices, which it multiplies in `product_dtype`, AdamW the rest, at one learning rate and
    decay.
    """
    if config.name == "muon":
        muon, rest = muon_groups(model, config)
        return Combined([Muon(**muon, product_dtype=product_dtype), make_elementwise(config, rest)])
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
        sgd = eager(torch.optim.SGD)(groups, momentum=config.momentum, **common)
        sgd.register_step_pre_hook(_begin_momentum)
        return sgd
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return eager(kind)(groups, betas=config.betas, eps=config.eps, **common)


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Momentum begins at zero, which gives the same numbers; a refused first step would leave torch's unwritten."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
