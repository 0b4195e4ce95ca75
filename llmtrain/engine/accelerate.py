"""One device, or data parallel over several processes (DDP), through Hugging Face Accelerate.

Accelerate's own scaling of the loss and its gradient accumulation stay out of it: `forward_backward`
below is the one place that scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from heapq import heapreplace

import torch
from torch import Tensor

from llmtrain.config import OptimizerSection, TrainingSection
from llmtrain.engine.precision import require_float32, set_precision
from llmtrain.engine.processes import Processes
from llmtrain.engine.protocol import NO_LIMITS, Fragment, Limits, Outcome, Verdict
from llmtrain.model.transformer import Transformer
from llmtrain.optim.muon import product_dtype
from llmtrain.optim.optimizers import make_optimizer, make_state, step_unless


class AccelerateEngine(Processes):
    """See `Engine`."""

    name = "accelerate"

    def build(
        self,
        make_model: Callable[[], Transformer],
        training: TrainingSection,
        optimizer: OptimizerSection | None,
    ) -> None:
        """See `Engine`."""
        with self.device:  # the first values are drawn where they stay
            model = make_model()
        model.init_weights()
        set_precision(model, training, self.device)
        self._bare = model
        self._max_norm = float("inf")
        if optimizer is None:  # plain SGD holds nothing beside the weights, so it stands for none
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        else:
            self._max_norm = optimizer.clip_norm or self._max_norm
            products = product_dtype(self.device, training.precision)
            self._optimizer = make_optimizer(model, optimizer, products)
        # Where it is not told, it looks for tensors of another kind, whose import takes half a second.
        placed = self._accelerator.device_placement
        self._model = self._accelerator.prepare_model(model, device_placement=placed)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        require_float32(self._parameters)

    def forward_backward(
        self, inputs_BS: Tensor, targets_BS: Tensor, *, global_targets: int, sync: bool, by_row: bool = False
    ) -> Tensor:
        """See `Engine`. DDP averages over ranks, so the sum over ranks needs the factor world_size.

        DDP decides in the forward pass whether the backward pass will exchange gradients, so both are inside `no_sync`.
        """
        quiet = nullcontext() if sync else self._accelerator.no_sync(self._model)
        with quiet:
            losses: Tensor = self._model(inputs_BS, targets_BS, by_row=by_row)
            loss_sum = losses[0] if by_row else losses
            (loss_sum * (self.world_size / global_targets)).backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def step(self, lr: float, loss: Tensor | None = None, limits: Limits = NO_LIMITS) -> Outcome:
        """See `Engine`. On a GPU the flag goes to the optimizer's kernels, and the host never sees it."""
        norm = self._clip()
        seen = self.judge(loss, norm, limits)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if isinstance(seen, Verdict):  # a refused step is a step too: the first makes the optimizer's state
            step_unless(self._optimizer, norm.new_ones(()) if seen.is_refused else None)
        else:
            step_unless(self._optimizer, seen[2])
        for parameter in self._parameters:  # what `zero_grad` does, without what it looks up each time
            parameter.grad = None
        return Outcome(norm, seen)

    def _clip(self) -> Tensor:
        """`clip_grad_norm_`, to the bit; where the host sees that there is nothing to clip, nothing is multiplied."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = _total_norm(gradients)
        scale = (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
        if not self.host_sees_all or not scale.item() >= 1.0:  # so where it is no number, too
            torch._foreach_mul_(gradients, scale)
        return norm

    def parameter_norm(self) -> Tensor:
        """See `Engine`."""
        return _total_norm([parameter.detach() for parameter in self._parameters])

    def fragments(self) -> Iterator[Fragment]:
        """See `Engine`. Every rank holds everything; they share the work, whole tensors, evenly by bytes."""
        tensors = list(self._state_tensors())
        owners = dealt_out([tensor.nbytes for _, tensor in tensors], self.world_size)
        for (name, tensor), owner in zip(tensors, owners, strict=True):
            if owner == self.rank:
                yield Fragment(name, tuple(tensor.shape), 0, tensor.detach().flatten())

    def _state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._bare.named_parameters():
            yield f"model/{name}", parameter
            for slot, value in sorted(self._optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    yield f"optimizer/{name}/{slot}", value

    def to_fill(self, *, optimizer: bool = True) -> list[Fragment]:
        """See `Engine`. An optimizer has no state before its first step, so it gets one here."""
        if optimizer:
            make_state(self._optimizer)
        return [
            Fragment(name, tuple(tensor.shape), 0, tensor.detach().view(-1))
            for name, tensor in self._state_tensors()
            if optimizer or name.startswith("model/")
        ]

    def publish(self) -> None:
        """See `Engine`. The model computes with the very tensors that were written."""


def _total_norm(tensors: list[Tensor]) -> Tensor:
    """`get_total_norm`, to the bit, for tensors that need not be sorted by kind and device, which takes longer."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return norm


def dealt_out(sizes: list[int], ranks: int) -> list[int]:
    """Give each size to a rank so that the sums come out about even: the largest first, to whoever has least."""
    owners, waiting = [0] * len(sizes), [(0, rank) for rank in range(ranks)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        held, owners[index] = waiting[0]
        heapreplace(waiting, (held + sizes[index], owners[index]))
    return owners
