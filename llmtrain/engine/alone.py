"""A process that no launcher started: there is nobody to join, so Accelerate has nothing to do, and is not imported.

What its import costs a start is in docs/LOG.md.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from llmtrain.engine.device import pick_device

# By these Accelerate knows that, and how, it was launched; the last three are of mpirun.
_LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_alone() -> bool:
    """Whether neither `accelerate launch` nor torchrun nor mpirun started this process."""
    return not any(name.startswith("ACCELERATE_") or name in _LAUNCHED for name in os.environ)


class Alone:
    """What the engine asks of an Accelerator, for one process on one device."""

    num_processes = 1
    process_index = 0

    def __init__(self) -> None:
        self.device = pick_device()

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """It was made on its device, and has nobody to exchange with."""
        return model

    def no_sync(self, _model: nn.Module) -> AbstractContextManager[None]:
        """There is nobody to exchange gradients with."""
        return nullcontext()

    def wait_for_everyone(self) -> None:
        """Everyone is here."""

    def end_training(self) -> None:
        """Nothing was begun."""
