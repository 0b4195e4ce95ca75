"""The arithmetic of a corpus of trillions of tokens on a cluster: the table in docs/data.md, made from formulas.

python -m benchmarks.layout [--write]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.synthetic import NO_HASH
from llmtrain.data.corpus import CHUNK_BYTES
from llmtrain.data.outside import SAMPLE_BYTES, SAMPLES
from llmtrain.data.shards import SAMPLED_SHARDS, FileInfo, ShardInfo
from llmtrain.data.survey import OUTLINES
from llmtrain.data.workers import AHEAD

DOCS = ROOT / "docs" / "data.md"
BEGIN, END = "<!-- layout: python -m benchmarks.layout --write -->", "<!-- end of layout -->"
PAGE = 4096
PACKING_BYTES = 16  # of disk for each document: llmtrain/data/packed.py
SOURCE_BYTES = 2000  # of memory for each input file: llmtrain/data/files.py
OUTLINE_BYTES = 340  # of memory for each chunk of which it is known where it begins: llmtrain/data/survey.py


@dataclass(frozen=True)
class Layout:
    """A corpus, how it is cut, and who reads it. Rates are of one process or one node."""

    tokens: int = 10**13
    itemsize: int = 2  # bytes of an id: uint16
    shard_tokens: int = 1 << 34
    document_tokens: int = 1000
    text_bytes_per_token: float = 4.0
    seq_len: int = 4096
    nodes: int = 128
    gpus: int = 8  # of a node
    tokens_per_gpu: float = 10_000  # a second
    workers: int = 1024  # of prepare, over all nodes
    worker_rate: float = 70e6  # bytes of text a second; bbpe, half of what text with repeats gives
    # Bytes of text a second that the one process of a part, which has all the workers, reads, deals out and writes, and
    # that a core counts the lines of: benchmarks/dealing.py.
    parquet_rate: float = 453e6
    jsonl_rate: float = 593e6
    zst_rate: float = 313e6
    counting_rate: float = 2975e6
    zst_counting_rate: float = 826e6
    footers_rate: float = 31e9  # and of Parquet, of which it reads the ends
    plan_workers: int = 64  # of the part that comes first and makes the plan
    source_file_bytes: int = 10**9  # of text in one input file
    join_rate: float = 2e9  # bytes a second that one node reads and writes at once, where parts are joined

    @property
    def shards(self) -> int:
        return -(-self.tokens // self.shard_tokens)

    @property
    def ids_bytes(self) -> int:
        return self.tokens * self.itemsize

    @property
    def ends_bytes(self) -> int:
        return 8 * (self.tokens // self.document_tokens)

    @property
    def manifest_bytes(self) -> int:
        """Of the lines of all shards."""
        file = FileInfo(path="train-00000.bin", bytes=self.shard_tokens * self.itemsize, sha256=NO_HASH)
        ends = FileInfo(path="train-00000.ends", bytes=8 * (self.shard_tokens // self.document_tokens), sha256=NO_HASH)
        documents = self.shard_tokens // self.document_tokens
        shard = ShardInfo(
            tokens=self.shard_tokens, documents=documents, ids=file, ends=ends, sample_sha256=NO_HASH
        )  # fmt: skip
        return self.shards * (len(shard.model_dump_json()) + 1)

    @property
    def bytes_at_opening(self) -> int:
        """Of shards, read by each process; and it asks for the size of each."""
        return min(SAMPLED_SHARDS, self.shards) * SAMPLES * SAMPLE_BYTES

    @property
    def windows(self) -> int:
        return (self.tokens - 1) // self.seq_len

    @property
    def window_bytes(self) -> int:
        return (self.seq_len + 1) * self.itemsize

    @property
    def pages(self) -> float:
        """That hold a window, on average over where in a page one begins."""
        stride = self.seq_len * self.itemsize
        begins = [(number * stride) % PAGE for number in range(PAGE // math.gcd(stride, PAGE))]
        return sum((begin + self.window_bytes - 1) // PAGE + 1 for begin in begins) / len(begins)

    @property
    def windows_per_node(self) -> float:
        """A second."""
        return self.gpus * self.tokens_per_gpu / self.seq_len

    @property
    def epoch_days(self) -> float:
        return self.tokens / (self.nodes * self.gpus * self.tokens_per_gpu) / 86400

    @property
    def text_bytes(self) -> float:
        return self.tokens * self.text_bytes_per_token

    @property
    def source_files(self) -> int:
        return math.ceil(self.text_bytes / self.source_file_bytes)

    def fed(self, rate: float) -> int:
        """How many workers one part keeps busy, where its process does so many bytes of text a second."""
        return max(1, int(rate // self.worker_rate))

    def parts(self, rate: float) -> int:
        """Of `prepare`, so that all workers are busy."""
        return -(-self.workers // self.fed(rate))

    @property
    def plan_bytes(self) -> int:
        """Of memory at most, while lines are counted: files of which all is counted wait for one before them."""
        of_a_file = min(OUTLINES, -(-self.source_file_bytes // CHUNK_BYTES))
        return min(self.source_files, AHEAD * self.plan_workers) * of_a_file * OUTLINE_BYTES

    def counting_row(self, what: str, rate: float) -> tuple[str, str, str]:
        total = self.plan_workers * rate
        return (f"to make the plan of the parts, {what}", f"{self.text_bytes / total / 60:.1f} minutes",
                f"one part counts all lines, {self.plan_workers} workers × {_bytes(rate)}/s of text, if its node reads"
                f" {_bytes(total)}/s")  # fmt: skip

    def feeding_row(self, what: str, rate: float) -> tuple[str, str, str]:
        return (f"parts for {self.workers:,} workers, {what}", f"{self.parts(rate):,}",
                f"of {self.fed(rate)} workers each: one process reads, deals out and writes {_bytes(rate)}/s of text"
                )  # fmt: skip

    def rows(self) -> list[tuple[str, str, str]]:
        """What, how much, and why."""
        node_bytes = self.windows_per_node * self.pages * PAGE
        text = self.text_bytes
        core_s = text / self.worker_rate
        return [
            ("ids on disk", _bytes(self.ids_bytes), f"{self.tokens:,} × {self.itemsize} bytes (uint16)"),
            ("ends of documents", _bytes(self.ends_bytes), f"8 bytes each, of {self.document_tokens:,} tokens"),
            ("shards", f"{self.shards:,}", f"`--shard-tokens {self.shard_tokens}`, "
             f"{_bytes(self.shard_tokens * self.itemsize)} each"),
            ("files", f"{2 * self.shards:,}", "`.bin` and `.ends`"),
            ("manifest", _bytes(self.manifest_bytes), f"{self.manifest_bytes // self.shards} bytes a shard"),
            ("read at opening, each process", f"{self.shards:,} sizes, {_bytes(self.bytes_at_opening)}",
             f"{SAMPLES} pages of {SAMPLED_SHARDS} shards"),
            ("windows", f"{self.windows:,}", f"of {self.seq_len:,} tokens"),
            ("reads of a node, a second", f"{self.windows_per_node:.1f}",
             f"{self.gpus} GPUs × {self.tokens_per_gpu:,.0f} tokens/s, one `pread` a window"),
            ("bytes of a node, a second", _bytes(node_bytes), f"{self.pages:.2f} pages of 4 KiB a window"),
            ("reads of all nodes, a second", f"{self.nodes * self.windows_per_node:,.0f}", f"{self.nodes} nodes"),
            ("bytes of all nodes, a second", _bytes(self.nodes * node_bytes), ""),
            ("one epoch", f"{self.epoch_days:.1f} days", f"{self.nodes * self.gpus:,} GPUs"),
            ("page cache of a node in that time", _bytes(node_bytes * self.epoch_days * 86400),
             "each page is read once and may go"),
            ("text", _bytes(text), f"{self.text_bytes_per_token:g} bytes a token"),
            ("to prepare, on one core", f"{core_s / 86400:.1f} days", f"{self.worker_rate / 1e6:.0f} MB/s"),
            self.feeding_row("Parquet", self.parquet_rate),
            self.feeding_row("JSONL", self.jsonl_rate),
            self.feeding_row("`.jsonl.zst`", self.zst_rate),
            (f"to prepare, {self.workers:,} workers", f"{core_s / self.workers / 60:.1f} minutes",
             f"if the storage reads {_bytes(self.workers * self.worker_rate)}/s"),
            ("to make the plan of the parts, Parquet", f"{text / self.plan_workers / self.footers_rate:.0f} s",
             f"one part reads the ends of {self.source_files:,} files, {self.plan_workers} workers"),
            self.counting_row("JSONL", self.counting_rate),
            self.counting_row("`.jsonl.zst`", self.zst_counting_rate),
            ("memory for that", _bytes(self.plan_bytes), f"{OUTLINE_BYTES} bytes for each {CHUNK_BYTES >> 20} MiB of"
             f" {AHEAD} files of {_bytes(self.source_file_bytes)} for each worker, at most"),
            ("memory for the list of files, each process", _bytes(SOURCE_BYTES * self.source_files),
             f"{SOURCE_BYTES:,} bytes a file"),
            ("to join parts, one node", f"{self.ids_bytes / self.join_rate / 3600:.1f} hours",
             f"reading and writing {_bytes(self.join_rate)}/s"),
            ("cache for `best_fit`, each machine", _bytes(PACKING_BYTES * (self.tokens // self.document_tokens)),
             f"{PACKING_BYTES} bytes a document, and as much for each window; made once, on local disk"),
        ]  # fmt: skip

    def table(self) -> str:
        """Markdown."""
        lines = ["| what | how much | from |", "|---|---:|---|"]
        return "\n".join(lines + [f"| {what} | {much} | {why} |" for what, much, why in self.rows()])


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def in_docs(text: str, table: str) -> str:
    """The text with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(path: Path = DOCS) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/data.md")
    table = Layout().table()
    if parser.parse_args().write:
        path.write_text(in_docs(path.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
