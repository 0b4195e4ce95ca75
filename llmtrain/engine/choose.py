"""The choice of an engine."""

from __future__ import annotations

import os

from llmtrain.config import TrainingSection
from llmtrain.engine.protocol import Engine
from llmtrain.errors import UserError


def make_engine(training: TrainingSection, clip_norm: float | None) -> Engine:
    """Choose the engine that the launch environment asks for."""
    _refuse_contradictions(training)
    from llmtrain.engine.accelerate import AccelerateEngine

    return AccelerateEngine(training, clip_norm)


def _refuse_contradictions(training: TrainingSection) -> None:
    """Refuse what a launch file asks for and this run would not do, or do twice; `accelerate launch` hands it on so."""
    for variable, meaning in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "").lower() == "true":
            raise UserError(f"this version does not train with {meaning}; launch with launch/single.yaml")
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
