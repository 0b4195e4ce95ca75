"""One device, or data parallel over several processes (DDP), through Hugging Face Accelerate.

Weights are float32; `precision: bf16` runs the forward pass under autocast. Accelerate's own scaling of the loss and
its gradient accumulation stay out of it: `backward` below is the one place that scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from llmtrain.config import TrainingSection
from llmtrain.engine.device import pick_device
from llmtrain.engine.protocol import Fragment, ReadFragment
from llmtrain.model.transformer import Transformer


class AccelerateEngine:
    """See `Engine`."""

    name = "accelerate"

    def __init__(self, training: TrainingSection, clip_norm: float | None):
        self._accelerator = Accelerator(
            mixed_precision="bf16" if training.precision == "bf16" else "no", cpu=pick_device().type == "cpu"
        )
        self._compile = training.compile
        self._max_norm = float("inf") if clip_norm is None else clip_norm
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device

    def prepare(self, model: Transformer, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None) -> None:
        """Move the model to the device, compile its blocks where asked, wrap it for DDP where there are ranks."""
        model.to(self.device)
        self._bare = model
        # Plain SGD holds nothing beside the weights, so it stands for no optimizer.
        self._optimizer = make_optimizer(model) if make_optimizer else torch.optim.SGD(model.parameters(), lr=0.0)
        if self._compile is True:
            # Each block on its own: they share one compiled graph, so compile time does not grow with depth.
            for block in model.blocks:
                block.compile()
        self._model = self._accelerator.prepare_model(model)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(self, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """See `Engine`."""
        loss: Tensor = self._model(inputs_BS, targets_BS)
        return loss

    @contextmanager
    def evaluating(self) -> Iterator[Transformer]:
        """See `Engine`."""
        self._bare.eval()
        try:
            with torch.no_grad(), self._accelerator.autocast():
                yield self._bare
        finally:
            self._bare.train()

    def backward(self, loss_sum: Tensor, *, global_targets: int, sync: bool) -> None:
        """See `Engine`. DDP averages over ranks, so the sum over ranks needs the factor world_size."""
        quiet = nullcontext() if sync else self._accelerator.no_sync(self._model)
        with quiet:
            (loss_sum * (self.world_size / global_targets)).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> Tensor:
        """See `Engine`."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def parameter_norm(self) -> Tensor:
        """See `Engine`."""
        return nn.utils.get_total_norm([parameter.detach() for parameter in self._parameters])

    def sum(self, values: Tensor) -> Tensor:
        """See `Engine`."""
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total

    def any(self, flag: bool) -> bool:
        """See `Engine`."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def barrier(self) -> None:
        """See `Engine`."""
        self._accelerator.wait_for_everyone()

    def fragments(self) -> Iterator[Fragment]:
        """See `Engine`. Every rank holds everything; they share the work: tensor i falls to rank i mod world."""
        for index, (name, tensor) in enumerate(self._state_tensors()):
            if index % self.world_size == self.rank:
                yield Fragment(name, tuple(tensor.shape), 0, tensor.detach().flatten())

    def _state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._bare.named_parameters():
            yield f"model/{name}", parameter
            for slot, value in sorted(self._optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    yield f"optimizer/{name}/{slot}", value

    def load(self, read: ReadFragment, *, optimizer: bool = True) -> None:
        """See `Engine`. An optimizer has no state before its first step, so a step without effect makes it."""
        if optimizer:
            self._make_optimizer_state()
        with torch.no_grad():
            for name, tensor in self._state_tensors():
                if optimizer or name.startswith("model/"):
                    saved = read(Fragment(name, tuple(tensor.shape), 0, tensor.flatten()))
                    tensor.copy_(saved.view(tensor.shape))

    def _make_optimizer_state(self) -> None:
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """See `Engine`. Accelerate keeps its state in globals; clearing them lets one process run again."""
        self._accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)
