"""Lets a ZeRO optimizer refuse a step, before it has changed anything.

DeepSpeed has a way to leave a step out, made for gradients that overflow: it clears them and all buffers, and touches
neither masters nor moments nor step counts. It takes that way where the global norm is not finite. So the norm is
judged where it is computed, and given on as infinite where the step is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor

from llmtrain.engine.processes import Processes
from llmtrain.engine.protocol import NO_LIMITS, Limits, Verdict


class ZeroGate:
    """Stands behind the one method of each stage that gives the norm."""

    def __init__(self, zero: Any, stage: int, processes: Processes):
        self._processes = processes
        self.next: tuple[Tensor | None, Limits] = (None, NO_LIMITS)  # the loss and the limits of the step to come
        self._seen: Verdict | None = None
        if stage == 3:
            norms_of_groups = zero._get_norm_groups

            def judged_norms() -> Any:
                norms = norms_of_groups()
                return [self._refused_norm] if self._refuses(combine_grad_norm_groups(norms)) else norms

            zero._get_norm_groups = judged_norms
        else:
            global_norm = zero.scaled_global_norm

            def judged_norm(*args: Any, **kwargs: Any) -> Any:
                norm = global_norm(*args, **kwargs)
                return self._refused_norm if self._refuses(norm) else norm

            zero.scaled_global_norm = judged_norm

    def take(self) -> Verdict:
        """`Outcome.seen` of the step that was just taken."""
        seen, self._seen = self._seen, None
        if seen is None:  # another release of DeepSpeed, which gets its norm in another way
            raise RuntimeError("DeepSpeed has taken a step without asking for the norm where it is judged")
        return seen

    def _refuses(self, norm: Any) -> bool:
        device = self._processes.device
        self._refused_norm = torch.full((), torch.inf, device=device)  # made there: a copy would be waited for
        seen = self._processes.judge(self.next[0], torch.as_tensor(norm, device=device), self.next[1])
        self._seen = seen if isinstance(seen, Verdict) else Verdict.read(seen)
        return self._seen.is_refused
