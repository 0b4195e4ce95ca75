"""How fast text becomes token shards, beside the bare libraries that encode it and Megatron's whole pipeline.

    python -m benchmarks.prepare [--megatron DIR --peers-python PATH] [--scale 1] [--repeats 3] [--kinds bbpe,…]

DIR is a checkout of Megatron-LM, PATH the python of an environment with what its tokenizers need (torch, transformers,
gigatoken, awkward, triton); without them that row is left out.

Counted for llmtrain: everything after the tokenizer is fitted: starting the workers, reading the files, dividing them,
encoding, hashing, writing and syncing the shards. Counted for a library: encoding documents that are in memory, into
whatever it returns; nothing is read or written. Of `tokenizers` there are two calls: one that also says where each
token lies, a text at a time, and its fastest, of many texts. Counted for Megatron: from a JSONL file to `.bin` and
`.idx`, with its tokenizer loaded anew, but not its imports, by the steps of its tools/preprocess_data_fast.py; the ids
are compared with those of llmtrain, which reads the same file. The text is Python source, the standard library first
and then what is installed, each file once as long as there are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import gigatoken
import numpy as np
import sentencepiece
import tokenizers

from benchmarks.common import alternate, arguments_without_places, print_table, spread, write_result
from llmtrain.data.corpus import ReadOptions, cut_into_chunks
from llmtrain.data.files import find_files
from llmtrain.data.tokenizer_hf import EOS
from llmtrain.prepare import Options, prepare

DRIVER = Path(__file__).parent / "peer_drivers" / "megatron_prepare.py"
# MB of text, so much that one worker has a few seconds of work, and MB/s that were asked for.
KINDS = {
    "char": (240, 60),
    "byte": (240, 60),
    "word": (40, None),
    "bpe": (100, 6),
    "unigram": (60, 6),
    "wordpiece": (12, None),
    "bbpe": (240, 100),
}
LIBRARY_SLICE_BYTES = 4_000_000  # enough for libraries that do a few megabytes a second
FITTED_ON = 4  # MB
FOLDER_BYTES = 4_000_000
FASTEST = "tokenizers, encode_batch_fast"
ALONE, TWO, JSONL, MEGATRON = "llmtrain prepare", "llmtrain prepare, 2 workers", "JSONL", "Megatron-LM, JSONL"


class Corpus:
    """Documents as files, in folders of `FOLDER_BYTES`, and as JSONL."""

    def __init__(self, folder: Path, texts: Sequence[str]):
        self.folder, self.texts, self.folders, room = folder, texts, list[Path](), 0
        for number, text in enumerate(texts):
            if room <= 0:
                self.folders.append(folder / f"{len(self.folders):04d}")
                self.folders[-1].mkdir(parents=True)
                room = FOLDER_BYTES
            room -= (self.folders[-1] / f"{number:06d}.txt").write_bytes(text.encode())

    def inputs(self, megabytes: float) -> tuple[str, ...]:
        """So much of it, in whole folders."""
        return tuple(map(str, self.folders[: max(1, round(megabytes * 1e6 / FOLDER_BYTES))]))

    def first(self, size: int) -> list[str]:
        """The first documents, which have so many characters or just more."""
        few, left = list[str](), size
        for text in self.texts:
            if left > 0:
                few.append(text)
                left -= len(text)
        return few

    def as_jsonl(self) -> Path:
        """All of it in one file."""
        path = self.folder.with_suffix(".jsonl")
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in self.texts)
        return path


def read_texts(megabytes: float) -> list[str]:
    """The texts of so many megabytes of Python source, again from the start where there is not enough."""
    texts, left = list[str](), int(megabytes * 1e6)
    while left > 0:
        for source in ("stdlib", *(path for path in sys.path if path.endswith("site-packages"))):
            named = source if source == "stdlib" else f"{source}/**/*.py"
            for chunk in cut_into_chunks(find_files([named]), ReadOptions(skip_bad=True)):
                for _, text in chunk.read(ReadOptions(skip_bad=True), Counter()):
                    if left > 0 and EOS not in text:  # which libraries take for the token
                        texts.append(text)
                        left -= len(text.encode())
    return texts


def speed_of_prepare(inputs: Sequence[str], out: Path, tokenizer: str, workers: int, val_split: float = 0.05) -> float:
    """MB/s of one `prepare` after the tokenizer is fitted."""
    shutil.rmtree(out, ignore_errors=True)
    outcome = prepare(Options(tuple(inputs), out, tokenizer, workers=workers, val_split=val_split))
    text_bytes = sum(split.text_bytes for split in outcome.manifest.splits.values())
    return text_bytes / outcome.encode_seconds / 1e6


def speed_of_library(encode: Callable[[list[str]], Any], texts: list[str]) -> float:
    """MB/s of encoding texts in memory."""
    text_bytes = sum(len(text.encode()) for text in texts)
    started = time.perf_counter()
    encode(texts)
    return text_bytes / (time.perf_counter() - started) / 1e6


class Megatron:
    """Its pipeline, in a process that stays."""

    def __init__(self, python: str, checkout: str, tokenizer: Path, out: Path):
        folder = out / "megatron-tokenizer"
        folder.mkdir()
        shutil.copy(tokenizer / "tokenizer.json", folder)
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS})
        )
        self.prefix = out / "megatron"
        self._process = subprocess.Popen(
            [python, str(DRIVER), checkout, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def speed(self, jsonl: Path, text_bytes: int) -> float:
        """MB/s of text.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin and self._process.stdout and self._process.stderr
        with suppress(BrokenPipeError):  # of one that has ended, what it said is read below
            self._process.stdin.write(json.dumps([str(jsonl), str(self.prefix)]) + "\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            said = self._process.stderr.read().strip().splitlines() or ["nothing said"]
            raise RuntimeError(f"{MEGATRON}: {said[-1]}")
        return text_bytes / float(line) / 1e6

    def ids(self) -> Any:
        """What it wrote, as llmtrain has it in the vocabularies here."""
        return np.memmap(self.prefix.with_suffix(".bin"), "<u2", "r")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def libraries(kind: str, tokenizer: Path, corpus: Corpus, megabytes: float) -> dict[str, Callable[[], float]]:
    """The bare libraries that read this kind's tokenizer file, each limited to one thread."""
    few = corpus.first(LIBRARY_SLICE_BYTES)
    if kind in ("bpe", "unigram"):
        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
        return {"sentencepiece": lambda: speed_of_library(lambda some: model.encode(some, num_threads=1), few)}
    if kind not in ("bbpe", "wordpiece"):
        return {}
    slow = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    found = {
        "tokenizers": lambda: speed_of_library(lambda some: [slow.encode(text) for text in some], few),
        FASTEST: lambda: speed_of_library(partial(slow.encode_batch_fast, add_special_tokens=False), few),
    }
    if kind == "bbpe":
        texts = corpus.first(int(megabytes * 1e6))

        def bare_gigatoken(some: list[str]) -> None:
            fast = gigatoken.Tokenizer(str(tokenizer / "tokenizer.json"))  # fresh: it remembers the words it has seen
            for text in some:
                fast.encode(text)

        found["gigatoken"] = lambda: speed_of_library(bare_gigatoken, texts)
    return found


def fit(kind: str, corpus: Corpus, scratch: Path, megabytes: float) -> Path:
    """A tokenizer of this kind, in a folder; that of characters has all there are."""
    name = kind
    if kind == "wordpiece":  # a file from elsewhere that `tokenizers` itself encodes
        model = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=8192, special_tokens=["[UNK]", EOS])
        model.train_from_iterator(corpus.first(LIBRARY_SLICE_BYTES), trainer)
        name = str(scratch / "wordpiece.json")
        model.save(name)
    prepare(Options(corpus.inputs(megabytes if kind == "char" else FITTED_ON), scratch / kind, name, val_split=0))
    return shutil.move(scratch / kind / "tokenizer", scratch / f"{kind}-tokenizer")


def measure(
    kind: str, corpus: Corpus, scratch: Path, args: argparse.Namespace, at_the_end: ExitStack
) -> list[dict[str, Any]]:
    """One row per contender for a kind."""
    size, goal = KINDS[kind][0] * args.scale, KINDS[kind][1]
    out, tokenizer, inputs = scratch / f"{kind}-out", fit(kind, corpus, scratch, size), corpus.inputs(size)
    one = partial(speed_of_prepare, inputs, out, str(tokenizer))
    contenders = {ALONE: partial(one, 1), TWO: partial(one, 2)} | libraries(kind, tokenizer, corpus, size)
    if kind == "bbpe":
        jsonl = corpus.as_jsonl()
        text_bytes = sum(len(text.encode()) for text in corpus.texts)
        for name, workers in ((ALONE, 1), (TWO, 2)):
            contenders[f"{name}, {JSONL}"] = partial(
                speed_of_prepare, (str(jsonl),), scratch / f"{JSONL}{workers}", str(tokenizer), workers, 0
            )
        if args.megatron:
            peer = at_the_end.enter_context(Megatron(args.peers_python, args.megatron, tokenizer, scratch))
            contenders[MEGATRON] = lambda: peer.speed(jsonl, text_bytes)
    measures = alternate(contenders, args.repeats)
    if MEGATRON in contenders:
        own = np.concatenate([np.fromfile(path, "<u2") for path in sorted((scratch / f"{JSONL}1").glob("*.bin"))])
        assert np.array_equal(own, peer.ids()), "Megatron wrote other ids"
    return [
        {"kind": kind, "what": what, "unit": "MB/s", **spread(values), "goal": goal if what == ALONE else None}
        for what, values in measures.items()
    ]


def compare(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for, as ratios of medians."""
    speed = {(row["kind"], row["what"]): row["median"] for row in rows}
    asked = [(kind, TWO, ALONE, 1.6) for kind in KINDS]
    asked += [(kind, ALONE, library, 0.9) for kind in KINDS for library in ("sentencepiece", FASTEST)]
    asked += [("bbpe", f"{TWO}, {JSONL}", f"{ALONE}, {JSONL}", 1.6), ("bbpe", f"{TWO}, {JSONL}", MEGATRON, 3.0)]
    return [
        {"kind": kind, "what": f"{what} / {than}", "ratio": speed[kind, what] / speed[kind, than], "goal": goal}
        for kind, what, than, goal in asked
        if (kind, what) in speed and (kind, than) in speed
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the library deals its batches out to all cores
    rows, began = list[dict[str, Any]](), time.perf_counter()
    with tempfile.TemporaryDirectory() as name, ExitStack() as at_the_end:
        scratch = Path(name)
        corpus = Corpus(scratch / "corpus", read_texts(max(KINDS[kind][0] for kind in args.kinds) * args.scale))
        print(f"corpus: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        for kind in args.kinds:
            rows += measure(kind, corpus, scratch, args, at_the_end)
            print(f"{kind}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    goals = compare(rows)
    print_table(rows)
    print_table(goals)
    facts = {"goals": goals, "arguments": arguments_without_places(args)}
    distributions = ("llmtrain", "gigatoken", "tokenizers", "sentencepiece", "numpy")
    print(write_result("prepare-cpu", [*rows, facts], distributions, args.out))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--megatron", help="a checkout of Megatron-LM")
    parser.add_argument("--peers-python", help="the python of an environment with what it needs")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/prepare-cpu.json")
    args = parser.parse_args(argv)
    if bool(args.megatron) != bool(args.peers_python):
        parser.error("--megatron and --peers-python go together")
    if args.megatron and not (Path(args.megatron) / "megatron/core").is_dir():
        parser.error(f"--megatron {args.megatron}: no checkout of Megatron-LM; git clone it there")
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"--kinds {', '.join(sorted(unknown))}: not among {', '.join(KINDS)}")
    return args


if __name__ == "__main__":
    main()
