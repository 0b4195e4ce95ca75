"""A checkpoint as a whole Hugging Face model folder: config, weights, tokenizer."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.hf_writer import write_weights
from llmtrain.checkpoint.load import naming_others, open_checkpoint
from llmtrain.checkpoint.remote import local_checkpoint
from llmtrain.checkpoint.resume import saved_config
from llmtrain.data.progress_bar import progress_bar
from llmtrain.data.shards import TOKENIZER_FOLDER
from llmtrain.data.staging import staged_folder
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_export import hugging_face_files, is_read_as_qwen
from llmtrain.errors import CorruptError, UserError
from llmtrain.hf_config import HF_CONFIG, architecture_for, config_json
from llmtrain.model.hf_layout import parameter_shapes, tensors_to_write
from llmtrain.storage.cache import say


@dataclass(frozen=True)
class Exported:
    """What was written."""

    out: str
    checkpoint: str
    step: int
    architecture: str
    dtype: str
    parameters: int
    files: list[str]  # with tensors
    bytes: int  # of them
    padding_left_out: int  # ids of the model that the tokenizer does not have
    no_tokenizer: str | None  # why it was not written


def export(path: Path | str, out: Path, dtype: torch.dtype, shard_bytes: int) -> Exported:
    """Write the folder; all of it, or nothing.

    Args:
        path: PATH of the verbs.
        out: not there, or empty.
        dtype: of the weights.
        shard_bytes: of tensors, in one file.

    Raises:
        UserError: there is no checkpoint, its model is none of those that transformers has, or `out` is in use.
        CorruptError: the checkpoint is damaged.
    """
    _check_free(out)
    path = local_checkpoint(path)
    reader = open_checkpoint(path)
    content = _Content(reader, dtype)
    with naming_others(path, reader.folder):
        size = sum(file.bytes for file in reader.tensor_files())
        with progress_bar("checking", size, sys.stderr.isatty()) as report:
            if problems := reader.verify(report):
                raise CorruptError("; ".join(problems[:3]))
        with staged_folder(out, say=say) as folder:
            return content.write(folder, out, shard_bytes)


def _check_free(out: Path) -> None:
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out}: exists and is not an empty folder; choose another --out or delete it")
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({error.strerror})") from error


class _Content:
    """What the folder will hold; made before anything is written, for the model may be none that can be exported."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype):
        saved = saved_config(reader)
        model, seq_len = saved.model.model_dump(), saved.data.seq_len
        self._reader, self._dtype = reader, dtype
        tokenizer = load_tokenizer(reader.folder / TOKENIZER_FOLDER)
        own, self._no_tokenizer = _tokenizer_files(tokenizer, seq_len)
        is_qwen = "tokenizer.json" in own and is_read_as_qwen(own["tokenizer.json"])
        self._architecture = architecture_for(model, qwen_tokenizer=is_qwen)
        shapes = parameter_shapes(saved.model, seq_len)
        self._tensors = tensors_to_write(self._architecture, shapes, tokenizer.vocab_size)
        self._padding = model["vocab_size"] - tokenizer.vocab_size
        ids = _special_ids(tokenizer)
        # By this name, which newer versions of transformers have given up, all of them read it.
        config = config_json(model, self._architecture, seq_len, tokenizer.vocab_size)
        config |= {"torch_dtype": self._dtype_name} | ids
        self._files = {HF_CONFIG: _json(config), "generation_config.json": _json(ids), **own}

    @property
    def _dtype_name(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    def write(self, folder: Path, out: Path, shard_bytes: int) -> Exported:
        """Write everything into `folder`, which will be called `out`."""
        paths = write_weights(folder, self._reader, self._tensors, self._dtype, shard_bytes)
        for name, text in self._files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return Exported(
            out=str(out),
            checkpoint=str(self._reader.folder),
            step=self._reader.manifest.step,
            architecture=self._architecture,
            dtype=self._dtype_name,
            parameters=sum(math.prod(tensor.shape) for tensor in self._tensors if tensor.parts),
            files=[path.name for path in paths],
            bytes=sum(path.stat().st_size for path in paths),
            padding_left_out=self._padding,
            no_tokenizer=self._no_tokenizer,
        )


def _tokenizer_files(tokenizer: Tokenizer, seq_len: int) -> tuple[dict[str, str], str | None]:
    """The files by name, or why there are none."""
    try:
        return hugging_face_files(tokenizer, seq_len), None
    except UserError as error:
        return {}, str(error)


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.eos_id < 0:  # of token files of which little is known
        return {}
    pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    return {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
