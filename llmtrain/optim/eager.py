"""torch's optimizers without the decorators that keep torch's compiler away from them.

These import the compiler to tell it that there is nothing to do: a quarter of the processor time of a start
(docs/LOG.md). No optimizer is compiled here; its kernels are fused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch


class EagerOptimizer(torch.optim.Optimizer):
    """The base of all optimizers here."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


@cache
def eager(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer for eager use: same arguments, same numbers, same name in a profile."""
    step = torch.no_grad()(inspect.unwrap(kind.step))  # what the decorator of `step` does besides
    return type(kind.__name__, (EagerOptimizer, kind), {"__doc__": kind.__doc__, "step": step})
