"""Prepared data of many documents, for tests of what happens at their boundaries."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import MANIFEST, TOKENIZER_FOLDER, Manifest
from llmtrain.data.tokenizer import fit_tokenizer, tokenizer_info
from tests.conftest import prose


def texts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Documents of 1 to `longest` characters."""
    lengths = np.random.default_rng(seed).integers(1, longest, count, endpoint=True)
    return [prose(3 * int(length) + 30, seed=seed + index)[:length] for index, length in enumerate(lengths)]


def write_documents(folder: Path, splits: dict[str, list[str]], shard_tokens: int = 1 << 20) -> Path:
    """Prepared data through the real writer, each document closed as `prepare` does."""
    folder.mkdir(parents=True)
    tokenizer = fit_tokenizer("char", splits["train"], validation=splits.get("val", []))
    (folder / TOKENIZER_FOLDER).mkdir()
    tokenizer.save(folder / TOKENIZER_FOLDER)
    infos = {}
    for name, documents in splits.items():
        writer = ShardWriter(folder, name, "uint16", shard_tokens)
        writer.append(*tokenizer.encode_documents(documents), sum(len(text.encode()) for text in documents))
        infos[name] = writer.close()
    info = tokenizer_info(folder / TOKENIZER_FOLDER)
    manifest = Manifest(dtype="uint16", tokenizer=info, splits=infos, recipe={})
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder
