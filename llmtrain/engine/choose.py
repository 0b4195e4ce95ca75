"""The choice of an engine."""

from __future__ import annotations

import os

from llmtrain.config import TrainingSection
from llmtrain.engine.protocol import Engine
from llmtrain.errors import UserError


def make_engine(training: TrainingSection, clip_norm: float | None) -> Engine:
    """Choose the engine that the launch environment asks for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UserError("this version does not train with DeepSpeed yet; launch with launch/single.yaml")
    from llmtrain.engine.accelerate import AccelerateEngine

    return AccelerateEngine(training, clip_norm)
