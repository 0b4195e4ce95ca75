"""`prepare` takes no more memory for more input: real processes, and the most that each ever had."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from benchmarks.common import ROOT
from llmtrain.data.corpus import CHUNK_BYTES
from llmtrain.data.memory import COPIES

DOCUMENT = 4000  # characters
# Of a document, at most: its end as it is collected, put together and written; hash and ordinal as they are collected,
# put together and sorted (24 bytes each, 16 of halves, 8 of order, as much for what is the same), and one mark.
OF_A_DOCUMENT = 3 * 8 + 2 * 24 + 2 * (16 + 8) + 1
PREPARE = """
import sys
from llmtrain.prepare import main
main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("peak", 1024 * int(status["VmHWM"].split()[0]))
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux"),
]


def documents(count: int, begin: int = 0) -> Iterator[str]:
    """Numbered from `begin` on, so that no two are the same."""
    lots = random.Random(0)
    text = "".join(lots.choices("etaoin shrdlu\n", k=200_000))
    return (
        f"{number} {text[(at := number * 7919 % 190_000) : at + DOCUMENT]}" for number in range(begin, begin + count)
    )


def write_corpus(folder: Path, count: int) -> Path:
    """As many documents as JSONL, plain and compressed, and as one row group of Parquet each."""
    folder.mkdir()
    plain, gz, zst = (
        b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents(count, part * count))
        for part in range(3)
    )
    (folder / "a.jsonl").write_bytes(plain)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(gz, 1))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(zst, 1))
    table = pa.table({"text": list(documents(count, 3 * count))})
    parquet.write_table(table, folder / "d.parquet", row_group_size=count)
    return folder


def peak(source: Path | str, out: Path, *options: str) -> int:
    """Bytes of memory that one process had at most."""
    command = [sys.executable, "-c", PREPARE, "--input", str(source), "--out", str(out), "--workers", "1", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[1])


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """From 48 MB in each of four files to 192; what is known of a document grows, and a chunk may come when others are
    not given back yet.
    """
    small, large = 12_000, 48_000
    peaks = [
        peak(write_corpus(tmp_path / f"{count}", count), tmp_path / f"out{count}", "--tokenizer", "byte", "--dedup")
        for count in (small, large)
    ]
    assert peaks[1] - peaks[0] < 4 * (large - small) * OF_A_DOCUMENT + 2 * CHUNK_BYTES


def test_of_a_dataset_no_row_group_is_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 32 MB in the one row group of a Parquet file to 128."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small, large = 8_000, 32_000
    peaks = []
    for count in (small, large):
        (folder := tmp_path / f"{count}").mkdir()
        parquet.write_table(pa.table({"text": list(documents(count))}), folder / "a.parquet", row_group_size=count)
        peaks.append(peak(f"hf:{folder}", tmp_path / f"out{count}", "--tokenizer", "byte"))
    assert peaks[1] - peaks[0] < (large - small) * DOCUMENT // 2


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_long_document_takes_no_more_than_is_said_when_it_is_refused(
    tmp_path: Path, tokenizer: str, name: str
) -> None:
    """Which it is where that is more than there is."""
    sizes, peaks = [], []
    for count in (4000, 12_000):
        text, folder = "".join(documents(count)), tmp_path / f"{count}"
        folder.mkdir()
        (folder / name).write_text(text if name == "a.txt" else json.dumps({"text": text}) + "\n")
        sizes.append(len(text))
        peaks.append(peak(folder, tmp_path / f"out{count}", "--tokenizer", tokenizer))
    assert peaks[1] - peaks[0] < COPIES * (sizes[1] - sizes[0])
