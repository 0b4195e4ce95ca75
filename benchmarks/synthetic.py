"""Prepared data of random ids, or of none, for benchmarks and tests in which only size matters."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmtrain.data.outside import hash_samples
from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import MANIFEST, TOKENIZER_FOLDER, FileInfo, Manifest, ShardInfo, SplitInfo, describe
from llmtrain.data.tokenizer import fit_tokenizer, tokenizer_info

NO_HASH = "0" * 64


def write_random_data(
    folder: Path, tokens: int, vocab_size: int, shard_tokens: int = 1 << 27, document_tokens: int | None = None
) -> Path:
    """Write `tokens` random ids below `vocab_size` as the training split, and a small validation split.

    Where `document_tokens` is given, documents have that length on average and end with id 0, which else is nowhere.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    splits = {}
    for name, count in (("train", tokens), ("val", 100_000)):
        writer = ShardWriter(folder, name, "uint16", shard_tokens)
        for begin in range(0, count, 1 << 22):
            size = min(1 << 22, count - begin)
            ids = generator.integers(0 if document_tokens is None else 1, vocab_size, size, dtype=np.uint16)
            ends = np.array([size])
            if document_tokens:
                ids[generator.random(size) < 1 / document_tokens] = 0
                ends = np.flatnonzero(ids == 0) + 1
            writer.append(ids, np.diff(ends, prepend=0), len(ids))
        splits[name] = writer.close()
    return write_manifest(folder, vocab_size, splits)


def write_virtual_data(folder: Path, tokens: int, shard_tokens: int) -> Path:
    """Write a folder of `tokens` uint16 ids that are holes in sparse files: they read as 0, and take no disk.

    What the manifest says of the shards holds as far as it is looked at when they are opened; `verify` would differ.
    """
    folder.mkdir(parents=True)
    shards = []
    for number, begin in enumerate(range(0, tokens, shard_tokens)):
        count = min(shard_tokens, tokens - begin)
        ids, ends = folder / f"train-{number:05d}.bin", folder / f"train-{number:05d}.ends"
        with ids.open("wb") as file:
            file.truncate(2 * count)
        ends.write_bytes(np.array([count], "<i8").tobytes())
        info = FileInfo(path=ids.name, bytes=2 * count, sha256=NO_HASH)
        sample = hash_samples(ids, 0, 2 * count)
        shards.append(ShardInfo(tokens=count, documents=1, ids=info, ends=describe(ends), sample_sha256=sample))
    split = SplitInfo(tokens=tokens, documents=len(shards), text_bytes=tokens, shards=tuple(shards))
    return write_manifest(folder, 259, {"train": split})


def write_manifest(folder: Path, vocab_size: int, splits: dict[str, SplitInfo]) -> Path:
    """Make it a prepared folder, with the tokenizer `byte`, whatever the size of the vocabulary."""
    tokenizer = folder / TOKENIZER_FOLDER
    tokenizer.mkdir()
    fit_tokenizer("byte", []).save(tokenizer)
    info = tokenizer_info(tokenizer).model_copy(update={"vocab_size": vocab_size})
    manifest = Manifest(dtype="uint16", tokenizer=info, splits=splits, recipe={"synthetic": True})
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder
