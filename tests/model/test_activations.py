"""Activation formulas: the peak that they give is that of a real step, operator by operator.

Small steps are real; large ones go through the same code with tensors that have shapes and no memory (and were equal to
real ones where both were tried).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.held import peak_bytes, step_config
from llmtrain.model import limits, transformer
from llmtrain.model.activations import activation_memory
from llmtrain.model.peak import PeakMemory, peak_of_run

SMALL = {"dim": 256, "layers": 4, "heads": 8, "vocab_size": 1000}
WITHIN = 0.03
SIZES = {"10m": (256, 16), "124m": (1024, 8), "1.3b": (2048, 2)}
CHECKPOINTING = ["none", "selective", "full"]


def compare(config: Any, fake: bool, device: str = "cpu") -> PeakMemory:
    expected, held = peak_of_run(config, device=device), peak_bytes(config, fake)
    print(f"formula {expected.bytes / 1e6:.1f} MB ({expected.moment}), held {held / 1e6:.1f} MB")
    assert expected.bytes == pytest.approx(held, rel=WITHIN)
    return expected


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "bf16"),
        ({}, "fp32"),
        ({"activation": "gelu", "norm": "layernorm"}, "fp32"),
        ({"activation": "relu2", "tie_embeddings": False}, "bf16"),
        ({"kv_heads": 2, "qk_norm": False, "qkv_bias": True}, "fp32"),
        ({"kv_heads": 4, "positions": "learned"}, "bf16"),
        ({"kv_heads": 2, "head_dim": 64}, "bf16"),
    ],
)
def test_a_step_holds_what_the_formulas_say(changes: dict[str, Any], precision: str, checkpointing: str) -> None:
    config = step_config({**SMALL, **changes}, 256, 4, precision=precision, activation_checkpointing=checkpointing)
    compare(config, fake=True)


def test_fake_tensors_are_held_like_real_ones() -> None:
    config = step_config(SMALL, 128, 2, activation_checkpointing="selective")
    fake, real = peak_bytes(config, fake=True), peak_bytes(config, fake=False)
    print(f"{fake} bytes of fake tensors, {real} of real ones")
    assert fake == pytest.approx(real, rel=1e-4)  # a fake step is judged on the device, in a few numbers more


MOMENTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("loss", {"vocab_size": 60_000, "tie_embeddings": False}, {"micro_batch": 8, "precision": "bf16"}),  # in parts
    ("backward of the loss", {"vocab_size": 4000}, {"micro_batch": 4}),
    ("backward of the last block", {"vocab_size": 256}, {"micro_batch": 8}),
    ("backward of the last block", {"vocab_size": 256, "kv_heads": 2}, {"micro_batch": 8, "precision": "bf16"}),
    ("backward of the first block", {}, {"micro_batch": 8, "activation_checkpointing": "full"}),
    ("backward of the embedding", {"vocab_size": 30_000}, {"micro_batch": 1, "seq_len": 32, "accumulation": 2}),
    ("update", {}, {"micro_batch": 1, "seq_len": 32, "optimizer": "muon"}),
    ("update", {}, {"micro_batch": 1, "seq_len": 32, "optimizer": "muon", "precision": "bf16"}),
]


@pytest.mark.parametrize(("moment", "model", "settings"), MOMENTS, ids=lambda value: value if str(value) else None)
def test_each_moment_can_be_the_peak_and_is_right_then(
    moment: str, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = step_config({**SMALL, **model}, settings.pop("seq_len", 256), **settings)
    assert compare(config, fake=True).moment == moment


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("size", SIZES)
def test_named_sizes_hold_what_the_formulas_say(size: str, precision: str, checkpointing: str) -> None:
    model = {"preset": size, "vocab_size": 50_304}
    compare(step_config(model, *SIZES[size], precision=precision, activation_checkpointing=checkpointing), fake=True)


class FusedRMSNorm(torch.autograd.Function):
    """Keeps what the one kernel of a GPU keeps (torch's derivatives.yaml, _fused_rms_norm) and lays its result out
    as that does (at::native::_fused_rms_norm_cuda): there is none on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale * weight).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_with_the_norm_of_a_gpu(monkeypatch: pytest.MonkeyPatch, precision: str, checkpointing: str) -> None:
    """It keeps what ours keeps on a CPU, and holds less in its backward pass; the kernel itself needs a GPU."""
    fused = lambda self, x: FusedRMSNorm.apply(x.float(), self.weight, self.eps)  # noqa: E731
    monkeypatch.setattr(transformer.RMSNorm, "forward", fused)
    monkeypatch.setattr(limits, "CACHED_LOGITS", limits.OTHER_LOGITS)
    config = step_config(SMALL, 512, 8, precision=precision, activation_checkpointing=checkpointing)
    compare(config, fake=True, device="cuda")
    moments, on_a_cpu = (peak_of_run(config, device=device).moments for device in ("cuda", "cpu"))
    assert {moment for moment in moments if moments[moment] < on_a_cpu[moment]} == {"backward of the final norm"}


def test_checkpointing_keeps_what_it_says() -> None:
    """Full: each block's input only, float32. Selective: beside it results of products and of attention, bf16."""
    model = step_config({**SMALL, "dim": 256}, 256, 4).model
    tokens, layers, dim, ff_dim = 1024, 4, 256, model.ff_dim or 0
    none, selective, full = (activation_memory(model, 256, 4, "bf16", kind) for kind in CHECKPOINTING)
    assert full.kept == full.stream == layers * tokens * 4 * dim
    products = 2 * (3 * dim + dim + dim + dim + 2 * ff_dim)  # q, k, v; attention and its projection; down; gate, up
    assert selective.kept - full.kept == layers * tokens * (products + 4 * model.heads)
    assert none.recomputed == 0 < selective.recomputed < full.recomputed
    assert none.kept > selective.kept > full.kept
