"""What the time of a step counts of bytes and operators is what the operators of a real block read and write."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from docs.plan_table import TITAN_ROPE_BYTES
from llmtrain.config import default_ff_dim, make_config
from llmtrain.model.cost import block_matrix_parameters
from llmtrain.model.transformer import Transformer
from llmtrain.planning.compute import BACKWARD_BYTES, BACKWARD_KERNELS, Work, _block_bytes, _kernels

SEQ_LEN, ROWS = 256, 2
MOVES_NOTHING = (
    "view", "aten.t.", "transpose", "expand", "detach", "slice", "select", "split", "squeeze", "unbind", "alias",
    "empty",
)  # fmt: skip
PRODUCTS = ("mm", "attention")


class Counts(TorchDispatchMode):
    """Adds up, by operator, how often it ran and the bytes of its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if not any(word in name for word in MOVES_NOTHING):
            self.operators[name] += 1
            self.bytes[name] += size_of(args) + size_of(result)
        return result


def size_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0


def counted(layers: int, changes: dict[str, Any]) -> tuple[Counts, Counts, Any]:
    model = make_config({"model": {"dim": 256, "heads": 4, "layers": layers, "vocab_size": 64, **changes}}).model
    ff_dim = model.ff_dim or default_ff_dim(model.dim, model.activation)
    model = model.model_copy(update={"kv_heads": model.kv_heads or model.heads, "ff_dim": ff_dim})
    transformer = Transformer(model, SEQ_LEN)
    transformer.init_weights()
    ids = torch.zeros(ROWS, SEQ_LEN, dtype=torch.long)
    forward, backward = Counts(), Counts()
    with torch.autocast("cpu", torch.bfloat16):
        with forward:
            loss = transformer(ids, ids)
        with backward:
            loss.backward()
    return forward, backward, model


def test_torchtitans_rotation_moves_what_the_table_says() -> None:
    """Its `apply_rotary_emb`, in our words; the angles are shared by all rows and heads."""
    x = torch.ones(8, SEQ_LEN, 16, 64, dtype=torch.bfloat16)
    angles = torch.polar(torch.ones(SEQ_LEN, 1, 32), torch.ones(SEQ_LEN, 1, 32))
    with Counts() as counts:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * angles
        torch.view_as_real(turned).flatten(3).to(x.dtype)
    assert sum(counts.bytes.values()) == pytest.approx(TITAN_ROPE_BYTES * x.numel(), rel=0.01)


# LayerNorm, as the CPU has no fused RMSNorm; a norm of queries and keys is one, so it is left out.
@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "gelu", "positions": "learned"},
        {},
        {"kv_heads": 2, "activation": "relu2"},
        {"qkv_bias": True},
        {"head_dim": 96},
    ],
    ids=["gelu, learned", "swiglu, rope", "relu2, grouped keys", "biases", "wide heads"],
)
def test_bytes_and_operators_of_a_block_are_those_of_a_real_one(changes: dict[str, Any]) -> None:
    changes = {"norm": "layernorm", "qk_norm": False, **changes}
    (one, one_back, model), (two, two_back, _) = (counted(layers, changes) for layers in (1, 2))

    def of_a_block(first: Counts, second: Counts) -> tuple[float, int]:
        moved = {name: size - first.bytes[name] for name, size in second.bytes.items()}
        other = sum(size for name, size in moved.items() if not any(word in name for word in PRODUCTS))
        # The casts of weights and of their gradients, 6 bytes each, count apart.
        return other - 6 * block_matrix_parameters(model), sum((second.operators - first.operators).values())

    work = Work(model, SEQ_LEN, ROWS)
    moved, operators = of_a_block(one, two)
    assert moved == pytest.approx(_block_bytes(work) * work.tokens, rel=0.02)
    assert operators == _kernels(work)
    moved_back, operators_back = of_a_block(one_back, two_back)
    assert moved_back == pytest.approx(BACKWARD_BYTES * moved, rel=0.15)
    assert operators_back == pytest.approx(BACKWARD_KERNELS * operators, rel=0.1)
