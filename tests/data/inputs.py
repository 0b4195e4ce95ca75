"""Inputs for `prepare` that several tests make, and how they look at what comes of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet


def lines(count: int, what: str = "line") -> bytes:
    """JSONL of documents of different lengths, each of another text."""
    texts = ({"text": f"{what} {i} é " + "words and words " * (i * 7 % 11)} for i in range(count))
    return "".join(json.dumps(text) + "\n" for text in texts).encode()


def every_kind_of_file(folder: Path, count: int, rows: int) -> Path:
    """Files of each kind, with so many documents in each of JSONL and so many rows in each of Parquet."""
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "m.txt", "z.txt"):
        (folder / name).write_text(f"Text of {name}.\n" * 30)
    (folder / "d.jsonl").write_bytes(lines(count))
    (folder / "e.jsonl").write_bytes(b"")
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(lines(count, "compressed")) + gzip.compress(lines(9, "more")))
    texts = [f"row {i} " * 9 for i in range(rows)]
    parquet.write_table(pa.table({"text": texts}), folder / "g.parquet", row_group_size=20)
    # More than is read at once:
    parquet.write_table(pa.table({"text": [4 * text for text in texts]}), folder / "h.parquet")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
