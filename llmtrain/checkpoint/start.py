"""Weights that a new run starts with, `model.init_from`: of a checkpoint of ours or of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint.hf_reader import HuggingFaceReader
from llmtrain.checkpoint.remote import local_checkpoint
from llmtrain.checkpoint.restore import Restorer
from llmtrain.checkpoint.resume import CheckpointWeights
from llmtrain.checkpoint.store import find_checkpoint
from llmtrain.config import RunConfig
from llmtrain.data.sources import TrainingData
from llmtrain.engine import Engine
from llmtrain.errors import UserError
from llmtrain.health.agreement import patiently, together
from llmtrain.hf_config import HF_CONFIG
from llmtrain.storage.cache import say

Weights = CheckpointWeights | HuggingFaceReader


def open_weights(folder: Path) -> Weights:
    """Open what `find_weights` found."""
    return HuggingFaceReader(folder) if (folder / HF_CONFIG).is_file() else CheckpointWeights(folder)


def find_weights(path: Path) -> Path:
    """The folder with the weights: a Hugging Face folder itself; else see `find_checkpoint`.

    Raises:
        UserError: it is neither.
    """
    if (path / HF_CONFIG).is_file():
        return path
    try:
        return find_checkpoint(path)
    except UserError as error:
        raise UserError(f"model.init_from {error}, or a Hugging Face folder ({HF_CONFIG} and safetensors)") from error


def load_weights(engine: Engine, config: RunConfig, data: TrainingData, is_told: Callable[[], bool]) -> None:
    """Fill the engine's weights, on all ranks, from `model.init_from`; whatever type they have there, float32 here.

    Args:
        engine: built.
        config: resolved.
        data: that the run trains on.
        is_told: whether this rank was told to stop.

    Raises:
        UserError: there are no such weights, or they are another model's or another tokenizer's.
        CorruptError: they are damaged.
        Stopped: a rank was told to stop.
    """
    start = str(config.model.init_from)
    path = patiently(engine, lambda: local_checkpoint(start), is_told)
    restorer = Restorer(engine, config.health.timeout_s, is_told, open_weights)

    def choose(open_one: Callable[[Path], Weights]) -> Weights:
        return open_one(find_weights(path))

    def accept(reader: Weights) -> None:
        reader.accept(config, data)
        if isinstance(reader, HuggingFaceReader):
            say(reader.summary())

    together(engine, lambda: restorer.restore(choose, accept, optimizer=False))
    engine.publish()
