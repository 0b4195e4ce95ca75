"""Prepared data of random ids, for benchmarks in which only size matters."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmtrain.data.shards import MANIFEST, TOKENIZER_FOLDER, Manifest, ShardWriter
from llmtrain.data.tokenizer import fit_tokenizer, tokenizer_info


def write_random_data(folder: Path, tokens: int, vocab_size: int, shard_tokens: int = 1 << 27) -> Path:
    """Write `tokens` random ids below `vocab_size` as the training split, and a small validation split."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    tokenizer = folder / TOKENIZER_FOLDER
    tokenizer.mkdir()
    fit_tokenizer("byte", []).save(tokenizer)
    splits = {}
    for name, count in (("train", tokens), ("val", 100_000)):
        writer = ShardWriter(folder, name, "uint16", shard_tokens)
        for begin in range(0, count, 1 << 22):
            ids = generator.integers(0, vocab_size, min(1 << 22, count - begin), dtype=np.uint16)
            writer.append(ids, np.array([len(ids)]), len(ids))
        splits[name] = writer.close()
    info = tokenizer_info(tokenizer).model_copy(update={"vocab_size": vocab_size})
    (folder / MANIFEST).write_text(
        Manifest(dtype="uint16", tokenizer=info, splits=splits, recipe={"random": True}).model_dump_json()
    )
    return folder
