"""ZeRO stages 1 to 3 (Rajbhandari et al. 2020) through DeepSpeed, with or without offload.

Weights are float32 here too, so that `precision: bf16` means one thing: matrix products in bf16 under autocast; master
weights, gradients and their sums in float32. Stage 3 sends the blocks' matrices in bf16 then, which loses nothing:
autocast would round them next.

DeepSpeed looks at the gradient's norm on the host, and so waits for the device at the end of every step; there the step
is judged too (`zero_gate`). Stage 3 waits after every micro-batch as well.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import Tensor, nn

from llmtrain.config import OptimizerSection, TrainingSection
from llmtrain.engine.precision import require_float32, set_precision
from llmtrain.engine.processes import Processes
from llmtrain.engine.protocol import NO_LIMITS, Fragment, Limits, Outcome
from llmtrain.engine.zero_config import zero_config
from llmtrain.engine.zero_gate import ZeroGate
from llmtrain.engine.zero_layout import OwnedSlice, ZeroLayout
from llmtrain.engine.zero_muon import FlatMuon
from llmtrain.errors import UserError
from llmtrain.model.memory import MOST_LIVE, PREFETCH_BUCKET, auto_compiles
from llmtrain.model.transformer import Block, Transformer
from llmtrain.optim.muon import product_dtype
from llmtrain.optim.optimizers import make_optimizer


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of optimizers that it has not tested; these are tested here."""
    return "untested optimizer" not in record.getMessage()


class DeepSpeedEngine(Processes):
    """See `Engine`."""

    name = "deepspeed"
    _model: Any = None  # until it is built

    def __init__(self, timeout_s: float):
        deepspeed.utils.logger.setLevel(logging.WARNING)
        deepspeed.utils.logger.addFilter(_is_news)
        # DeepSpeed calls torch by names that torch is about to change, several times in each step.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
        # DeepSpeed would compile an operator for inference on the CPU, for a minute, where there is a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super().__init__(timeout_s)

    def may_compile(self, training: TrainingSection) -> bool:
        """See `Engine`."""
        cuts_weights = self._accelerator.state.deepspeed_plugin.zero_stage == 3
        return super().may_compile(training) and auto_compiles(
            cuts_weights=cuts_weights, checkpointing=training.activation_checkpointing
        )

    def build(
        self,
        make_model: Callable[[], Transformer],
        training: TrainingSection,
        optimizer: OptimizerSection | None,
    ) -> None:
        """See `Engine`."""
        if optimizer is None:
            raise UserError("without training there is nothing for ZeRO to cut; launch with launch/ddp.yaml")
        if training.fp8:
            raise UserError("training.fp8 is for one device and DDP; launch with launch/ddp.yaml, or set it to false")
        launch = self._accelerator.state.deepspeed_plugin.deepspeed_config
        config = zero_config(launch, training, optimizer.clip_norm, self.world_size)
        stage = config["zero_optimization"]["stage"]
        # DeepSpeed sends gradients over a group of its own, which it would make with torch's timeout of half an hour.
        groups._WORLD_GROUP = dist.new_group(timeout=self.exchange_timeout)
        if self.device.type == "cuda" and "offload_optimizer" in config["zero_optimization"]:
            self.use_own_cores()  # for the update
        self.exchanges_in_forward = stage == 3
        if stage == 3:
            # A module at a time, each at once cut over the ranks: no rank ever holds the model whole.
            with deepspeed.zero.Init(config_dict_or_path=config):
                model = make_model()
            model.init_weights(_gathered)
        else:
            with self.device:
                model = make_model()
            model.init_weights()
        set_precision(model, training, self.device)
        if stage == 3:
            self._gather_by_blocks(model, config["zero_optimization"])
        if stage == 3 and training.precision == "bf16":
            for module in model.blocks.modules():
                if isinstance(module, nn.Linear):
                    setattr(module.weight, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)
        self._bare = model
        if optimizer.name == "muon":
            products = product_dtype(self.device, training.precision)
            flat: torch.optim.Optimizer = FlatMuon(model, optimizer, self.device, products)
        else:
            flat = make_optimizer(model, optimizer)
        self._model, self._zero, *_ = deepspeed.initialize(
            model=model, optimizer=flat, config=config, dist_init_required=False
        )
        self._gate = ZeroGate(self._zero, stage, self)
        self._layout = ZeroLayout(self._zero, stage, self.rank)
        if isinstance(flat, FlatMuon):
            flat.bind(self._layout)
        require_float32(self._layout.flats)

    @staticmethod
    def _gather_by_blocks(model: Transformer, zero: dict[str, Any]) -> None:
        """Have stage 3 gather a block at a time, around its forward pass and not within.

        So it can be compiled; eager, too, the host has half as much to do as for one layer after another. While a block
        is computed the next is fetched, for which DeepSpeed's own limits are too low where blocks are large.
        """
        set_z3_leaf_modules(model, [Block])
        block = sum(vars(parameter)["ds_numel"] for parameter in model.blocks[0].parameters())
        zero.setdefault("stage3_prefetch_bucket_size", max(PREFETCH_BUCKET, block))
        zero.setdefault("stage3_max_live_parameters", max(MOST_LIVE, 3 * block))

    def forward_backward(
        self, inputs_BS: Tensor, targets_BS: Tensor, *, global_targets: int, sync: bool, by_row: bool = False
    ) -> Tensor:
        """See `Engine`. DeepSpeed averages over ranks, so the sum over ranks needs the factor world_size.

        Stages 2 and 3 keep only their part of each gradient, and so must exchange after every micro-batch.
        """
        self._model.set_gradient_accumulation_boundary(sync)
        losses: Tensor = self._model(inputs_BS, targets_BS, by_row=by_row)
        loss_sum = losses[0] if by_row else losses
        self._model.backward(loss_sum * (self.world_size / global_targets), scale_wrt_gas=False)
        return losses.detach()

    def step(self, lr: float, loss: Tensor | None = None, limits: Limits = NO_LIMITS) -> Outcome:
        """See `Engine`. A gradient that is not finite has an infinite norm here."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._gate.next = (loss, limits)
        self._model.step()
        seen = self._gate.take()
        norm = seen.grad_norm if seen.is_refused else self._model.get_global_grad_norm()
        return Outcome(torch.as_tensor(norm, device=self.device), seen)

    def parameter_norm(self) -> Tensor:
        """See `Engine`. Of the owned slices, not of the flat tensors: what pads those may be anything."""
        own = [fragment.values for fragment in self.fragments() if fragment.name.startswith("model/")]
        norm = nn.utils.get_total_norm(own) if own else torch.zeros(())
        return self.sum(norm.to(self.device).square()).sqrt()

    def _state(self) -> Iterator[tuple[OwnedSlice, Fragment]]:
        """What this rank updates, as views: each parameter's slice, and what the optimizer keeps for it."""
        for name, parameter in self._bare.named_parameters():
            owned = self._layout.owned(parameter)
            if owned is None:
                continue
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            flat = self._layout.flats[owned.group].detach()
            named = [(f"model/{name}", flat)]
            named += [(f"optimizer/{name}/{slot}", value) for slot, value in self._layout.state(owned.group)]
            for key, value in named:
                if value.shape == flat.shape:
                    yield owned, Fragment(key, shape, owned.start, value.narrow(0, owned.offset, owned.numel))
                else:  # one number for the whole flat tensor: Adam's step
                    yield owned, Fragment(key, (), 0, value.view(1))

    def fragments(self) -> Iterator[Fragment]:
        """See `Engine`. Each rank yields what ZeRO gave it; a single number comes from where its parameter begins."""
        for owned, fragment in self._state():
            if fragment.shape or owned.start == 0:
                yield fragment

    def to_fill(self, *, optimizer: bool = True) -> list[Fragment]:
        """See `Engine`."""
        if optimizer:
            self._layout.make_state()
        return [fragment for _, fragment in self._state() if optimizer or fragment.name.startswith("model/")]

    def publish(self) -> None:
        """See `Engine`."""
        self._layout.publish()

    def close(self) -> None:
        """See `Engine`. Without this order ZeRO-3 sometimes aborts at the interpreter's exit."""
        if self._model is not None:
            self._model.destroy()
        super().close()


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Hold parameters whole for a moment; what rank 0 wrote into them stays."""
    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return gathered
