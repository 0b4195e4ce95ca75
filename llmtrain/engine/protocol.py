"""What an engine must do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmtrain.config import OptimizerSection, TrainingSection
    from llmtrain.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part of one training-state tensor that this rank holds.

    `name` is `model/<parameter>` for float32 master weights or `optimizer/<parameter>/<slot>`; `start` is where
    `values` (1-D) begins in the flattened whole of `shape`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


@dataclass(frozen=True, slots=True)
class Limits:
    """A step whose loss or gradient norm is not below its limit, or not finite, is refused."""

    loss: float = math.inf  # nats per target
    grad_norm: float = math.inf  # global, before clipping


class Verdict(NamedTuple):
    """A step as all ranks together saw it."""

    loss: float  # nats per target
    grad_norm: float  # global, before clipping
    is_refused: bool

    @classmethod
    def read(cls, seen: Tensor) -> Self:
        """From `Outcome.seen`; the host waits for the device on which that lies."""
        loss, grad_norm, refused = seen.tolist()
        return cls(loss, grad_norm, bool(refused))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step showed."""

    grad_norm: Tensor  # global, before clipping; on the device
    # Where the host knows it anyway, a verdict. On a device nobody has waited for it: float32 (3,), the loss, the norm,
    # and 1 where the step was refused, else 0.
    seen: Verdict | Tensor


NO_LIMITS = Limits()
Value = TypeVar("Value")


class Engine(Protocol):
    """Runs a model on whatever there is; the loop cannot tell which."""

    name: str
    rank: int
    world_size: int
    device: torch.device
    exchanges_in_forward: bool  # between ranks, in the model's forward pass
    before_gather: Callable[[], object]  # called by `gather` where there are other ranks

    def build(
        self,
        make_model: Callable[[], Transformer],
        training: TrainingSection,
        optimizer: OptimizerSection | None,
    ) -> None:
        """Make the model with its first values, where it belongs, and an optimizer over it; call it once.

        Args:
            make_model: constructs it; the engine decides on which device, and whether whole.
            training: resolved.
            optimizer: which one, and where the gradient is clipped; None: the model is only used, not trained.
        """

    def may_compile(self, training: TrainingSection) -> bool:
        """Whether `training.compile: auto` may mean yes, if the machine has what that needs."""

    def evaluating(self) -> AbstractContextManager[Transformer]:
        """Dropout off, gradients off, the run's precision on; gives the bare model."""

    def forward_backward(
        self, inputs_BS: Tensor, targets_BS: Tensor, *, global_targets: int, sync: bool, by_row: bool = False
    ) -> Tensor:
        """Add the gradient of this micro-batch's share of the mean over `global_targets` targets.

        Args:
            inputs_BS: int64 ids.
            targets_BS: int64 ids, -100 where there is no target.
            global_targets: targets of the global batch, over all ranks and micro-batches.
            sync: the last micro-batch of a step; before it ranks exchange nothing where the engine allows it.
            by_row: see below; changes no gradient.

        Returns:
            the loss summed over these targets (float32 scalar, without a graph), computed in the run's precision;
            `by_row`: the same number, then the loss summed over each row's targets (float32 (1 + B,)).
        """

    def step(self, lr: float, loss: Tensor | None = None, limits: Limits = NO_LIMITS) -> Outcome:
        """Clip by global norm, update unless that is refused, clear the gradients.

        All ranks decide alike, before anything is changed: a refused step leaves weights and optimizer state as they
        were, bit for bit. No host waits for a device on which the engine can decide.

        Args:
            lr: learning rate of this update.
            loss: this rank's share of the mean loss of the global batch, on the device; None: not judged.
            limits: what to refuse; a norm or loss that is not finite always is.
        """

    def parameter_norm(self) -> Tensor:
        """L2 norm of all parameters (on the device)."""

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, on the device."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: a decision that all ranks share."""

    def ask(self, *flags: bool) -> None:
        """Begin to find out whether any rank has each of the flags set; neither the host nor the device waits."""

    def hear(self) -> tuple[bool, ...]:
        """The answer to the last `ask`, alike on all ranks; the host waits for ranks that have not asked yet."""

    def gather(self, value: Value) -> list[Value]:
        """The small picklable values of all ranks, in their order, on every rank."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of the training state; together the ranks' parts cover it exactly once."""

    def to_fill(self, *, optimizer: bool = True) -> list[Fragment]:
        """All of the training state (or of the weights only) that this rank needs, to be written; then `publish`."""

    def publish(self) -> None:
        """Let what was written into the training state take effect, on all ranks."""

    def close(self) -> None:
        """End the engine and, where there is one, the process group."""
