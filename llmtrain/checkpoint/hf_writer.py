"""A checkpoint's weights as the tensors of a Hugging Face folder: read, turned and written one at a time.

So an export needs the memory of the largest tensor (of GPT-2's, two of it), however large the model is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.checkpoint.format import CheckpointReader, write_file
from llmtrain.checkpoint.tensor_files import TensorSpec, write_tensors
from llmtrain.engine import Fragment
from llmtrain.errors import CorruptError
from llmtrain.model.hf_layout import HFTensor

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# transformers refuses a file that does not say whose tensors it holds.
_METADATA = {"format": "pt"}


def write_weights(
    folder: Path, reader: CheckpointReader, tensors: Sequence[HFTensor], dtype: torch.dtype, shard_bytes: int
) -> list[Path]:
    """Write the weights into one file or, where they have more than `shard_bytes`, into several and an index.

    Args:
        folder: exists.
        reader: of a checkpoint whose hashes have been checked.
        tensors: in the order in which they are written.
        dtype: to store them in.
        shard_bytes: a file has at most so many bytes of tensors, unless a single one has more.

    Returns:
        the files with tensors.

    Raises:
        CorruptError: a tensor cannot be read.
        OSError: a file cannot be written.
    """
    shards = _cut(tensors, dtype, shard_bytes)
    names = [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        specs = [_spec(tensor, dtype) for tensor in shard]
        write_tensors(folder / name, specs, _read(reader, shard, dtype), _METADATA)
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_spec(tensor, dtype).nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def _spec(tensor: HFTensor, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(tensor.name, dtype, tensor.shape)


def _cut(tensors: Sequence[HFTensor], dtype: torch.dtype, shard_bytes: int) -> list[list[HFTensor]]:
    shards: list[list[HFTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = _spec(tensor, dtype).nbytes
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _read(reader: CheckpointReader, tensors: Sequence[HFTensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for tensor in tensors:
        if not tensor.parts:
            yield torch.zeros(tensor.shape, dtype=dtype)
            continue
        rows = tensor.shape[::-1] if tensor.is_transposed else tensor.shape
        values = torch.empty(math.prod(rows))  # float32, as the weights of a checkpoint are
        begin = 0
        wanted = []
        for part in tensor.parts:
            name = f"model/{part}"
            shape = reader.tensors()[name].shape
            end = min(begin + math.prod(shape), values.numel())  # a padded vocabulary is cut off
            wanted.append(Fragment(name, shape, 0, values[begin:end]))
            begin = end
        if problems := reader.load(wanted, ()):
            raise CorruptError("; ".join(problems[:3]))
        whole = values.view(rows)
        yield (whole.T if tensor.is_transposed else whole).to(dtype)
