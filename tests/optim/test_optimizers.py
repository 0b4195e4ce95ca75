"""The optimizers step as their definitions say, and look like one to what saves and schedules them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmtrain.config import make_config
from llmtrain.model.transformer import Transformer
from llmtrain.optim.optimizers import Combined, make_optimizer
from tests.model.test_transformer import build


def stepped(model: Transformer, **settings: object) -> tuple[torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """Take two steps; return the optimizer and the weights before."""
    optimizer = make_optimizer(model, make_config({"optimizer": settings}).optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in (1, 2):
        ids = torch.randint(101, (2, 32), generator=torch.Generator().manual_seed(seed))
        model(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, before


def test_adamw_decays_apart_from_the_gradient_and_only_matrices() -> None:
    model = build()
    optimizer = make_optimizer(model, make_config({"optimizer": {"lr": 0.01, "weight_decay": 0.5}}).optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.01 * 0.5 if name.startswith("blocks") and "norm" not in name else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


def test_adam_couples_the_decay_into_the_gradient() -> None:
    model = build()
    optimizer = make_optimizer(model, make_config({"optimizer": {"name": "adam"}}).optimizer)
    assert type(optimizer) is torch.optim.Adam


def test_muon_steps_matrices_like_torchs_muon_and_the_rest_like_adamw() -> None:
    model, reference = build(), build()
    _, before = stepped(model, name="muon", lr=0.01)
    matrices = [p for n, p in reference.named_parameters() if n.startswith("blocks") and p.ndim == 2]
    rest = [p for p in reference.parameters() if all(p is not m for m in matrices)]
    alone: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for seed in (1, 2):
        ids = torch.randint(101, (2, 32), generator=torch.Generator().manual_seed(seed))
        reference(ids, ids).backward()
        for optimizer in alone:
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert not torch.equal(ours, before[name])


def test_together_is_one_optimizer_to_whoever_looks() -> None:
    model = build()
    optimizer, _ = stepped(model, name="muon")
    assert isinstance(optimizer, Combined)
    assert set(optimizer.state) == set(model.parameters())
    assert all(optimizer.state[p] for p in model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_a_biased_layer_would_not_decay_its_bias(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = make_optimizer(model, make_config({"optimizer": {"name": name}}).optimizer)
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {model[0].weight}
