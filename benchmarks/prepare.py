"""How fast text becomes token shards, per core, beside the bare libraries that do the encoding.

    python -m benchmarks.prepare [--megabytes 30] [--repeats 3]

Counted for llmtrain: everything after the tokenizer is fitted, with one worker: reading the files, dividing them,
encoding, hashing, writing and syncing the shards. Counted for a library: encoding documents that are in memory, into
whatever it returns; nothing is read or written. The text is 12 MB of source code repeated, which flatters whatever
remembers words it has seen (gigatoken does): text without repeats is up to half slower.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gigatoken
import sentencepiece
import tokenizers

from benchmarks.common import alternate, print_table, spread, write_result
from llmtrain.data.corpus import ReadOptions, cut_into_chunks
from llmtrain.data.files import find_files
from llmtrain.prepare import Options, prepare

GOALS_MB_PER_S = {"char": 60, "byte": 60, "word": None, "bpe": 6, "unigram": 6, "bbpe": 100}
LIBRARY_SLICE_BYTES = 4_000_000  # enough for libraries that do a few megabytes a second


def make_corpus(folder: Path, megabytes: int) -> list[str]:
    """Write the standard library's files again and again until there are so many megabytes; return their texts."""
    options = ReadOptions()
    chunks = cut_into_chunks(find_files(["stdlib"]), options)
    library = [text for chunk in chunks for _, text in chunk.read(options, Counter())]
    texts: list[str] = []
    written = 0
    while written < megabytes * 1_000_000:
        text = library[len(texts) % len(library)]
        path = folder / f"{len(texts) // len(library)}" / f"{len(texts):06d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        written += path.write_bytes(text.encode())
        texts.append(text)
    return texts


def speed_of_prepare(corpus: Path, out: Path, kind: str) -> float:
    """MB/s of one `prepare` after the tokenizer is fitted."""
    shutil.rmtree(out, ignore_errors=True)
    outcome = prepare(Options((str(corpus),), out, kind, workers=1))
    text_bytes = sum(split.text_bytes for split in outcome.manifest.splits.values())
    return text_bytes / outcome.encode_seconds / 1e6


def speed_of_library(encode: Callable[[list[str]], Any], texts: list[str]) -> float:
    """MB/s of encoding texts in memory."""
    text_bytes = sum(len(text.encode()) for text in texts)
    started = time.perf_counter()
    encode(texts)
    return text_bytes / (time.perf_counter() - started) / 1e6


def libraries(kind: str, tokenizer: Path, texts: list[str]) -> dict[str, Callable[[], float]]:
    """The bare libraries that read this kind's tokenizer file, each limited to one thread."""
    few: list[str] = []
    while sum(map(len, few)) < LIBRARY_SLICE_BYTES:
        few.append(texts[len(few)])
    if kind in ("bpe", "unigram"):
        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
        return {"sentencepiece": lambda: speed_of_library(lambda some: model.encode(some, num_threads=1), few)}
    if kind == "bbpe":
        slow = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

        def bare_gigatoken(some: list[str]) -> None:
            fast = gigatoken.Tokenizer(str(tokenizer / "tokenizer.json"))  # fresh: it remembers the words it has seen
            for text in some:
                fast.encode(text)

        return {
            "tokenizers": lambda: speed_of_library(lambda some: [slow.encode(text) for text in some], few),
            "gigatoken": lambda: speed_of_library(bare_gigatoken, texts),
        }
    return {}


def measure(kind: str, corpus: Path, scratch: Path, texts: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row per contender for a kind."""
    out = scratch / kind
    speed_of_prepare(corpus, out, kind)
    tokenizer = scratch / f"{kind}-tokenizer"
    shutil.copytree(out / "tokenizer", tokenizer)
    contenders = {"llmtrain prepare": lambda: speed_of_prepare(corpus, out, kind)}
    measures = alternate(contenders | libraries(kind, tokenizer, texts), repeats)
    goal = GOALS_MB_PER_S[kind]
    return [
        {"kind": kind, "what": what, "unit": "MB/s per core", **spread(values), "goal": goal if i == 0 else None}
        for i, (what, values) in enumerate(measures.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        texts = make_corpus(corpus, flags.megabytes)
        for kind in GOALS_MB_PER_S:
            rows += measure(kind, corpus, Path(scratch), texts, flags.repeats)
    print_table(rows)
    print(write_result("prepare-cpu", rows, ("llmtrain", "gigatoken", "tokenizers", "sentencepiece", "numpy")))


if __name__ == "__main__":
    main()
