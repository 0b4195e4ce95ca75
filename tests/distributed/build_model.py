"""Build a model as the trainer does, and say how much of it this rank holds, and when gradients are exchanged.

Run by test_build.py, in each rank.
"""

from __future__ import annotations

import json
import sys

import torch

from llmtrain.config import OptimizerSection, make_config
from llmtrain.engine import make_engine
from llmtrain.errors import run_main
from llmtrain.model.transformer import Transformer
from llmtrain.resolve import resolve


def main(_argv: list[str]) -> None:
    config = make_config({"model": {"dim": 64}, "training": {"precision": "fp32", "micro_batch_size": 1}})
    config = resolve(config, vocab_size=256, world_size=2, bf16_native=False, compile_auto=False)
    held: list[int] = []

    def make_model() -> Transformer:
        model = Transformer(config.model, 64)
        # Everything but the root is complete here, and nothing has been written yet.
        held.append(sum(parameter.numel() for parameter in model.parameters()))
        return model

    engine = make_engine(60.0)
    torch.manual_seed(1)
    engine.build(make_model, config.training, OptimizerSection())
    with engine.evaluating() as model:
        weight = model.blocks[0].ff.down.weight
    gradient_norms = []
    for micro_step in range(2):
        ids = torch.randint(256, (1, 65), generator=torch.Generator().manual_seed(10 * micro_step + engine.rank))
        engine.forward_backward(ids[:, :-1], ids[:, 1:], global_targets=256, sync=micro_step == 1)
        gradient_norms.append(None if weight.grad is None else weight.grad.norm().item())
    fragments = [fragment for fragment in engine.fragments() if fragment.name.startswith("model/")]
    found = {
        "held_when_made": held[0],
        "owned": sum(fragment.values.numel() for fragment in fragments),
        "dtypes": sorted({str(fragment.values.dtype) for fragment in fragments}),
        "gradient_norms": gradient_norms,
        "norm": engine.parameter_norm().item(),
        "compiles": {
            kind: engine.may_compile(config.training.model_copy(update={"activation_checkpointing": kind}))
            for kind in ("none", "selective", "full")
        },
    }
    everybody = engine.gather(found)
    if engine.rank == 0:
        print("FOUND", json.dumps(everybody), flush=True)
    engine.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
