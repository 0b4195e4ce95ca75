"""First values that are not drawn, because a checkpoint brings others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

_OF_CONSTRUCTORS = (nn.init.uniform_, nn.init.kaiming_uniform_)


class Undrawn(TorchFunctionMode):
    """Within it `torch.nn.init` draws nothing, which for 355M values takes seconds on a CPU.

    `normal_`, from which `Transformer.init_weights` has all matrices but an untied head, puts NaN in their place: were
    a checkpoint to leave one out, which reading it refuses, it would show in the first loss. What only the constructors
    of torch's modules draw is left out.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See `torch.overrides`."""
        kwargs = kwargs or {}
        if func is nn.init.normal_ or func in _OF_CONSTRUCTORS:
            tensor = args[0] if args else kwargs["tensor"]
            return nn.init.constant_(tensor, math.nan) if func is nn.init.normal_ else tensor
        return func(*args, **kwargs)
