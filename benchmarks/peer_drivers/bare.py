"""A bare PyTorch loop over a trainer's own model and optimizer: what a step costs without the trainer around it.

    python bare.py llmtrain|nanogpt|litgpt|transformers SPEC.json

Float32 and eager, one batch over and over. Before the first step there is one line of JSON: parameters, threads,
versions; with no steps in SPEC, that is all. Run by the python that has the trainer.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokens import Windows
from torch import Tensor, nn

Parts = tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor, Tensor], Tensor]]


def llmtrain(spec: dict[str, Any]) -> Parts:
    from llmtrain.config import load_config
    from llmtrain.model.transformer import Transformer
    from llmtrain.optim.optimizers import make_optimizer

    config = load_config(spec["llmtrain_config"])
    with torch.device(spec["device"]):
        model = Transformer(config.model, spec["seq_len"])
    model.init_weights()
    return model, make_optimizer(model, config.optimizer), lambda x, y: model(x, y) / y.numel()


def nanogpt(spec: dict[str, Any]) -> Parts:
    sys.path.insert(0, spec["nanogpt"])
    from model import GPT, GPTConfig

    torch.backends.cuda.matmul.allow_tf32 = True  # as its train.py does
    size = {"n_layer": spec["layers"], "n_head": spec["heads"], "n_embd": spec["dim"], "block_size": spec["seq_len"]}
    model = GPT(GPTConfig(**size, vocab_size=spec["vocab_size"], dropout=0.0, bias=False)).to(spec["device"])
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), spec["device"])
    return model, optimizer, lambda x, y: model(x, y)[1]


def litgpt(spec: dict[str, Any]) -> Parts:
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer

    torch.set_float32_matmul_precision("high")  # as its command line does
    with torch.device(spec["device"]):
        model = GPT(Config(**spec["litgpt_config"]))
    model.transformer.wte.weight = model.lm_head.weight
    optimizer = instantiate_torch_optimizer("AdamW", model.parameters(), fused=spec["device"] == "cuda")
    return model, optimizer, lambda x, y: chunked_cross_entropy(model(x), y)


def transformers(spec: dict[str, Any]) -> Parts:
    from hf_trainer import make_trainer

    trainer = make_trainer(spec)
    return trainer.model, trainer.create_optimizer(), lambda x, _: trainer.model(input_ids=x, labels=x).loss


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    spec = json.loads(Path(sys.argv[2]).read_text())
    model, optimizer, loss_of = globals()[sys.argv[1]](spec)
    model.train()
    parameters = list(model.parameters())
    packages = ("torch", "numpy", "llmtrain", "litgpt", "lightning", "transformers", "accelerate")
    about = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "threads": torch.get_num_threads(),
        "versions": {name: found for name in packages if (found := version(name))},
    }
    print(json.dumps(about))
    windows = Windows(spec["tokens"], spec["seq_len"] + 1)
    rows = torch.stack([windows[i] for i in range(spec["batch"])]).to(spec["device"])
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    for step in range(1, spec["steps"] + 1):
        loss = loss_of(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % spec["every"] == 0:
            print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
