"""What one process does for all workers of a `prepare`, and what is done once for all parts: neither has more cores.

    python -m benchmarks.dealing [--megabytes 400] [--repeats 3]

`survey`: MB of text a second of one core at finding where the chunks of an input begin, as the process that makes the
plan of the parts does. `deal`: MB of text for each second of CPU time of the process that reads the input, deals it out
to two workers and writes and hashes what they encoded, byte-level BPE: so much a second it does with one core, however
many workers it has. (It has two threads for that, so it does more where there are two cores for them.) Both of two
sizes, and of their difference, so that what is done once is not in it. The input is Python source in the page cache, as
JSONL in files of 50 MB, plain and compressed, and as Parquet in row groups of 8 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard
from pyarrow import parquet

from benchmarks.common import alternate, print_table, write_result
from benchmarks.prepare import read_texts
from llmtrain.data.corpus import ReadOptions
from llmtrain.data.files import find_files
from llmtrain.data.survey import survey
from llmtrain.errors import run_main
from llmtrain.prepare import Options, prepare

FILE_BYTES, GROUP_BYTES = 50_000_000, 8_000_000
FITTED_ON = 4_000_000


def pieces_of(texts: Sequence[str], size: int) -> list[list[str]]:
    """The texts in order, in lists of about so many bytes."""
    pieces, left = list[list[str]](), 0
    for text in texts:
        if left <= 0:
            pieces.append([])
            left = size
        pieces[-1].append(text)
        left -= len(text.encode())
    return pieces


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    data = b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)
    path.write_bytes(zstandard.compress(data, 3) if path.suffix == ".zst" else data)


def write_parquet(path: Path, texts: Sequence[str]) -> None:
    schema = pa.schema([("text", pa.string())])
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in pieces_of(texts, GROUP_BYTES):
            writer.write_table(pa.table({"text": group}, schema))


WRITERS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    "jsonl": write_jsonl, "jsonl.zst": write_jsonl, "parquet": write_parquet,
}  # fmt: skip


def survey_s(folder: Path) -> float:
    """Seconds of one core to find where all chunks begin."""
    files, began = find_files([str(folder)]), time.perf_counter()
    assert sum(outline.chunks for outline in survey(files, ReadOptions(), 1)) >= len(files)
    return time.perf_counter() - began


def deal_s(folder: Path, tokenizer: Path, out: Path) -> float:
    """Seconds of CPU time of this very process, which deals and writes, in one `prepare` with two workers."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.process_time()
    prepare(Options((str(folder),), out, str(tokenizer), workers=2))
    return time.process_time() - began


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.dealing", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400, help="of text; a quarter of it is the smaller size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/dealing.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        rows = measured(Path(name), args.megabytes, args.repeats)
    print_table(rows)
    facts = {"megabytes": args.megabytes, "repeats": args.repeats}
    print(write_result("dealing", [*rows, facts], ("llmtrain", "gigatoken", "zstandard", "pyarrow"), args.out))


def measured(scratch: Path, megabytes: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each format, with what both rates are of each megabyte more."""
    texts = read_texts(megabytes)
    (sample := scratch / "sample").mkdir()
    write_jsonl(sample / "a.jsonl", pieces_of(texts, FITTED_ON)[0])
    prepare(Options((str(sample),), scratch / "fitted", "bbpe", val_split=0))
    tokenizer, sizes = scratch / "fitted" / "tokenizer", dict[tuple[str, str], int]()
    contenders = dict[str, Callable[[], float]]()
    for kind, write in WRITERS.items():
        for size, part in (("small", texts[: len(texts) // 4]), ("large", texts)):
            (folder := scratch / kind / size).mkdir(parents=True)
            for number, piece in enumerate(pieces_of(part, FILE_BYTES)):
                write(folder / f"{number:03}.{kind}", piece)
            sizes[kind, size] = sum(len(text.encode()) for text in part)
            contenders[f"{kind} survey {size}"] = lambda folder=folder: survey_s(folder)  # type: ignore[misc]
            contenders[f"{kind} deal {size}"] = lambda folder=folder: deal_s(  # type: ignore[misc]
                folder, tokenizer, scratch / "out"
            )
    seconds = {name: statistics.median(values) for name, values in alternate(contenders, repeats).items()}
    rows = []
    for kind in WRITERS:
        row: dict[str, Any] = {"input": kind}
        for what in ("survey", "deal"):
            more_s = seconds[f"{kind} {what} large"] - seconds[f"{kind} {what} small"]
            row[f"{what}, MB/s"] = (sizes[kind, "large"] - sizes[kind, "small"]) / more_s / 1e6
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(run_main(main))
