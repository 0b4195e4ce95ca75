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
from llmtrain.data.outside import SAMPLE_BYTES, SAMPLES
from llmtrain.data.shards import SAMPLED_SHARDS, FileInfo, ShardInfo

DOCS = ROOT / "docs" / "data.md"
BEGIN, END = "<!-- layout: python -m benchmarks.layout --write -->", "<!-- end of layout -->"
PAGE = 4096
PACKING_BYTES = 16  # of memory for each document: llmtrain/data/packing.py


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

    def rows(self) -> list[tuple[str, str, str]]:
        """What, how much, and why."""
        node_bytes = self.windows_per_node * self.pages * PAGE
        text = self.tokens * self.text_bytes_per_token
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
            (f"to prepare, {self.workers:,} workers", f"{core_s / self.workers / 60:.1f} minutes",
             f"if the storage reads {_bytes(self.workers * self.worker_rate)}/s"),
            ("to join parts, one node", f"{self.ids_bytes / self.join_rate / 3600:.1f} hours",
             f"reading and writing {_bytes(self.join_rate)}/s"),
            ("memory for `best_fit`, each process", _bytes(PACKING_BYTES * (self.tokens // self.document_tokens)),
             f"{PACKING_BYTES} bytes a document: too much, take `windows`"),
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
