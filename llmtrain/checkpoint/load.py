"""A trained model, ready for use: what `generate` and `evaluate` open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.folders import committed_steps, step_folder
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.remote import local_checkpoint
from llmtrain.checkpoint.resume import saved_config
from llmtrain.checkpoint.store import find_checkpoint
from llmtrain.compiling import settle_flex
from llmtrain.config import RunConfig
from llmtrain.data.shards import TOKENIZER_FOLDER
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.engine import Engine, make_engine
from llmtrain.engine.device import pick_device
from llmtrain.errors import CorruptError
from llmtrain.model.transformer import Transformer
from llmtrain.model.undrawn import Undrawn


@dataclass(frozen=True)
class TrainedModel:
    """The weights of one checkpoint in an engine, and what belongs to them."""

    engine: Engine  # without an optimizer; `engine.evaluating()` gives the model
    tokenizer: Tokenizer
    config: RunConfig  # resolved; its precision and compile are what is used here
    reader: CheckpointReader


@contextmanager
def load_model(path: Path | str, *, compiled: bool = False) -> Iterator[TrainedModel]:
    """Open PATH of the verbs, check every hash, and read the weights, and only them, onto the device.

    Args:
        path: a run folder (its best checkpoint, else its latest) or one checkpoint, here or, as a URL, on a store.
        compiled: run compiled as in training; only on CUDA, where that is the default and a compiler comes along.

    Raises:
        UserError: there is no checkpoint.
        CorruptError: it is damaged; other checkpoints of the run are named.
    """
    path = local_checkpoint(path)
    reader = open_checkpoint(path)
    folder = reader.folder
    config = _usable_here(saved_config(reader), compiled)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    end = tokenizer.eos_id if config.data.document_mask else None
    engine = make_engine(config.health.timeout_s)
    try:
        flex = compiled and settle_flex(config, engine)[0]
        with Undrawn():
            engine.build(
                lambda: Transformer(config.model, config.data.seq_len, document_end=end, may_use_flex=flex),
                config.training,
                None,
            )
        with naming_others(path, folder):
            files = [file.path for file in reader.tensor_files()]
            if problems := reader.load(engine.to_fill(optimizer=False), files):
                raise CorruptError("; ".join(problems[:3]))
        engine.publish()
        yield TrainedModel(engine, tokenizer, config, reader)
    finally:
        engine.close()


def open_checkpoint(path: Path) -> CheckpointReader:
    """Open PATH of the verbs, and check every hash but those of tensors.

    Raises:
        UserError: there is no checkpoint.
        CorruptError: it is damaged; other checkpoints of the run are named.
    """
    folder = find_checkpoint(path)
    with naming_others(path, folder):
        reader = CheckpointReader(folder)
        if problems := reader.check_records():
            raise CorruptError("; ".join(problems[:3]))
    return reader


@contextmanager
def naming_others(path: Path, folder: Path) -> Iterator[None]:
    """Let a CorruptError of a checkpoint say which others its run, in `path`, has."""
    try:
        yield
    except CorruptError as error:
        others = [str(other) for step in committed_steps(path) if (other := step_folder(path, step)) != folder]
        advice = f"; the run has others to name instead: {', '.join(others)}" if others else ""
        raise CorruptError(f"{error}{advice}") from error


def _usable_here(config: RunConfig, compiled: bool) -> RunConfig:
    """Keep the run's precision, and so its numbers, but for fp8; compile only where that is asked for and usual."""
    compiles = compiled and config.training.compile is True and pick_device().type == "cuda"
    training = config.training.model_copy(update={"compile": compiles, "fp8": False})
    return config.model_copy(update={"training": training})
