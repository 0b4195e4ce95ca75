"""How many bytes of tensors live at once during a step, counted at every operator, of tensors that are real or fake.

Fake ones have shapes and no memory, so that a step of any size is counted on a laptop. (torch has
`torch.distributed._tools.mem_tracker`, which does more, and changes with each release.)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmtrain.config import RunConfig, make_config
from llmtrain.engine import Engine, make_engine
from llmtrain.engine.accelerate import AccelerateEngine
from llmtrain.model.short_attention import attention_gradients
from llmtrain.model.transformer import Transformer
from llmtrain.resolve import resolve


class Held(TorchDispatchMode):
    """Within it, the bytes of all storages that an operator has read or made and that still live.

    Not seen: what an operator takes for itself and gives back, and rounding by an allocator. One thing is different
    within it: where two gradients of a tensor meet, autograd adds them into fresh memory, never in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.llmtrain.attention_gradients.default:
            with self:  # it is ours, and takes what counts
                out = attention_gradients(*args)
        else:
            out = func(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, out)):
            if isinstance(value, Tensor):
                self._add(value)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _WithoutValues(AccelerateEngine):
    """What is fake has no value that the host could look at, so steps are judged as on a GPU."""

    host_sees_all = False  # type: ignore[assignment]


def step_config(
    model: dict[str, Any],
    seq_len: int,
    micro_batch: int,
    accumulation: int = 1,
    *,
    world_size: int = 1,
    optimizer: str = "adamw",
    **more: Any,
) -> RunConfig:
    """A resolved config, eager; `more` are settings of `training`."""
    raw = {
        "data": {"seq_len": seq_len},
        "model": model,
        "optimizer": {"name": optimizer},
        "training": {
            "micro_batch_size": micro_batch, "global_batch_size": micro_batch * accumulation * world_size,
            "compile": False, "precision": "fp32", **more,
        },
    }  # fmt: skip
    return resolve(
        make_config(raw), vocab_size=model["vocab_size"], world_size=world_size, bf16_native=True,
        compile_auto=False,
    )  # fmt: skip


def stepper(config: RunConfig, fake: bool = False) -> Callable[[], None]:
    """A function that takes one real optimizer step of one process; the first makes the optimizer's state."""
    engine = _WithoutValues(timeout_s=60) if fake else make_engine(timeout_s=60)
    if fake:
        engine._accelerator.device_placement = False  # what is fake has its device and cannot be moved
    return engine_stepper(engine, config)


def engine_stepper(engine: Engine, config: RunConfig) -> Callable[[], None]:
    """`stepper` of an engine that has joined the other processes, if there are any."""
    training, seq_len = config.training, config.data.seq_len
    engine.build(
        lambda: Transformer(config.model, seq_len, training.activation_checkpointing), training, config.optimizer
    )
    ids = torch.zeros(training.micro_batch_size, seq_len, dtype=torch.int64, device=engine.device)
    parts = training.global_batch_size // (training.micro_batch_size * engine.world_size)
    targets = training.global_batch_size * seq_len

    def step() -> None:
        for part in range(parts):
            engine.forward_backward(ids, ids, global_targets=targets, sync=part == parts - 1)
        engine.step(lr=1e-3)

    return step


def peak_bytes(config: RunConfig, fake: bool = True) -> int:
    """The most that a step after the first holds at once, weights and optimizer state included."""
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext(), Held() as held:
        step = stepper(config, fake)
        step()
        held.peak = held.now
        step()
    return held.peak
