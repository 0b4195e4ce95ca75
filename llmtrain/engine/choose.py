"""The choice of an engine."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from llmtrain.config import TrainingSection
from llmtrain.engine.device import set_up_allocator
from llmtrain.engine.processes import launched_with_deepspeed
from llmtrain.engine.protocol import Engine
from llmtrain.errors import UserError

_LAUNCH_VARIABLES = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_GRADIENT_", "ACCELERATE_DYNAMO_")


def make_engine(timeout_s: float) -> Engine:
    """Join the other processes with the engine that the launch environment asks for; `build` it next.

    Args:
        timeout_s: of a collective operation.

    Raises:
        UserError: the engine is not there, or the other processes cannot be reached.
    """
    if not torch.cuda.is_available():
        set_up_allocator()
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError("the launch file asks for FSDP, which is not supported; launch/zero3.yaml shards as much")
    if launched_with_deepspeed():
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise each process warns that it found no other
        try:
            metadata.version("transformers")  # Accelerate asks it about ZeRO
            from llmtrain.engine.deepspeed import DeepSpeedEngine
        except ModuleNotFoundError as error:
            raise UserError(
                f"the launch file asks for DeepSpeed, which is not there ({error}); "
                "pip install -c constraints.txt -e '.[deepspeed]'"
            ) from error
        return DeepSpeedEngine(timeout_s)
    from llmtrain.engine.accelerate import AccelerateEngine

    return AccelerateEngine(timeout_s)


def launch_settings() -> dict[str, str]:
    """What the launch file decided, as `accelerate launch` hands it on; the same on every machine, or they hang.

    Of a file that it names for DeepSpeed, also what is in it.
    """
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_LAUNCH_VARIABLES)}
    if file := settings.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        with suppress(OSError):  # DeepSpeed says it better
            settings["content of deepspeed_config_file"] = " ".join(Path(file).read_text("utf-8", "replace").split())
    return settings


def refuse_contradictions(training: TrainingSection) -> None:
    """Refuse what a launch file asks for and this run would not do, or do twice; `accelerate launch` hands it on so.

    Raises:
        UserError: both values are named.
    """
    precision = {"bf16": "bf16", "fp32": "no"}[training.precision]
    settings = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "accumulation follows from training.global_batch_size"),
        "ACCELERATE_DYNAMO_BACKEND": ("no", "training.compile decides"),
        "ACCELERATE_MIXED_PRECISION": (precision, f"training.precision is {training.precision}"),
    }
    for variable, (expected, reason) in settings.items():
        given = os.environ.get(variable, expected).lower()
        # The launcher's own default for precision is `no`, whether or not anybody asked for it.
        if given not in (expected, "no", ""):
            name = variable.removeprefix("ACCELERATE_").lower()
            raise UserError(f"the launch file sets {name} to {given}, but {reason}; leave it out of the launch file")
