"""The optimizers step as their definitions say, and look like one to what saves and schedules them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmtrain.config import make_config
from llmtrain.model.transformer import Transformer
from llmtrain.optim import muon
from llmtrain.optim.muon import Muon, orthogonal_update
from llmtrain.optim.optimizers import Combined, make_optimizer, make_state
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
    assert isinstance(optimizer, torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW)


def test_muon_steps_matrices_like_torchs_muon_and_the_rest_like_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the same gradients. torch's products, which it makes in bf16, are made in float64 here: so what is left
    is our rounding of a number of float32, 2⁻²⁴, enlarged five times by 3.4 at most."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    model, reference = build(), build()
    ours = make_optimizer(model, make_config({"optimizer": {"name": "muon", "lr": 0.01}}).optimizer)
    matrices = [p for n, p in reference.named_parameters() if n.startswith("blocks") and p.ndim == 2]
    rest = [p for p in reference.parameters() if all(p is not m for m in matrices)]
    theirs: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        before = [p.detach().clone() for p in reference.parameters()]
        with torch.no_grad():
            for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
                mine.copy_(other)
                mine.grad = other.grad = torch.randn(other.shape, generator=generator)
        for optimizer in (ours, *theirs):
            optimizer.step()
        for mine, other, old in zip(model.parameters(), reference.parameters(), before, strict=True):
            update, expected = (mine - old).double(), (other - old).double()
            tolerance = 3.4445**5 * 2**-24 if any(other is m for m in matrices) else 0.0
            assert (update - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("rows", "columns", "count"), [(48, 48, 3), (16, 80, 2), (80, 16, 1), (1, 5, 2)])
def test_matrices_of_a_shape_are_orthogonalised_together_as_alone(rows: int, columns: int, count: int) -> None:
    """Each against the definition in float64; singular values end between 0.7 and 1.2."""
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(count, rows, columns, generator=generator)
    for given in many:
        x = (given / given.norm()).double()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        update = orthogonal_update(given, lr=1.0, product_dtype=torch.float32) / (-0.2 * max(rows, columns) ** 0.5)
        assert update.shape == given.shape and update.dtype == torch.float32
        # Float32 products of this length are off by 2⁻²⁴ √n or so; five steps enlarge what is small by 3.4 each.
        assert (update - x).abs().max() < 3.4445**5 * 2**-24 * max(rows, columns) ** 0.5
    parameters = [nn.Parameter(torch.zeros(rows, columns)) for _ in range(count)]
    optimizer = Muon(parameters, lr=1.0, momentum=0.0, weight_decay=0.0, product_dtype=torch.float32)
    for parameter, given in zip(parameters, many, strict=True):
        parameter.grad = given
    optimizer.step()
    for parameter, given in zip(parameters, many, strict=True):
        assert torch.allclose(
            parameter, orthogonal_update(given, lr=1.0, product_dtype=torch.float32), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(("rows", "columns"), [(48, 48), (16, 80), (80, 16), (128, 344)])
def test_in_bf16_muon_is_off_by_its_roundings(rows: int, columns: int) -> None:
    """Of each of fifteen products, by 2⁻⁸ at most; what is near one is not enlarged on the way."""
    given = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    exact, rounded = (orthogonal_update(given, 1.0, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 15 * 2**-8 * exact.norm()


def test_products_are_in_bf16_where_that_is_fast() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    asked = [(cpu, "fp32"), (cpu, "bf16"), (gpu, "fp32"), (gpu, "bf16")]
    assert [muon.product_dtype(*each) == torch.bfloat16 for each in asked] == [False, True, True, True]


def test_matrices_that_are_too_many_at_once_go_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [build(), build()]
    for model, limit in zip(models, (muon.BATCH_NUMEL, 1), strict=True):
        monkeypatch.setattr(muon, "BATCH_NUMEL", limit)
        stepped(model, name="muon", lr=0.01)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_made_beforehand_is_that_of_a_first_step(name: str, momentum: float) -> None:
    config = make_config({"optimizer": {"name": name, "momentum": momentum}}).optimizer
    model = build()
    stepped, made = make_optimizer(model, config), make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    stepped.step()

    def described(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, object]]:
        states = optimizer.state.items()
        return {
            parameter: {slot: (v.shape, v.dtype, v.device, v.stride()) for slot, v in state.items() if v is not None}
            for parameter, state in states
            if any(value is not None for value in state.values())
        }

    make_state(made)
    assert described(made) == described(stepped)
    before = {id(value) for state in stepped.state.values() for value in state.values()}
    make_state(stepped)  # what is there stays
    assert {id(value) for state in stepped.state.values() for value in state.values()} == before


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
