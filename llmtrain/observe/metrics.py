"""The numbers of a run on disk.

`metrics.jsonl` is the truth: one full record per line, only ever appended to. `training_log.csv` (the same records as a
table) and `training_metrics.json` (five arrays for a quick plot) are views of it, made again from it on resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from llmtrain.observe.files import LineAppender, replacing, rewind
from llmtrain.observe.record import COLUMNS, Number, Record

RECORDS = "metrics.jsonl"
ARRAYS = "training_metrics.json"
TABLE = "training_log.csv"
# The arrays of training_metrics.json, and the field of a record that each is of.
ARRAY_SOURCES = {
    "train_loss": "train_loss",
    "val_loss": "val_loss",
    "learning_rate": "learning_rate",
    "epochs": "epoch",
    "steps": "step",
}


class MetricsLog:
    """Writes each record to the run folder; a kill at any moment leaves all three files readable."""

    def __init__(self, run_dir: Path, *, csv: bool, resume_step: int, clock: Callable[[], float] = time.monotonic):
        """Open the files and drop what they say of steps beyond `resume_step` (0: all of it).

        Raises:
            UserError: the disk is full or the folder read-only, here and in every method.
        """
        self.was_there = (run_dir / RECORDS).exists()
        self._digest = hashlib.sha256()
        self._arrays = _ArraysFile(run_dir / ARRAYS, clock)

        def take(row: Mapping[str, Number]) -> None:
            self._digest.update(json.dumps(row).encode())  # the very line
            self._arrays.append(row)

        if csv:
            with replacing(run_dir / TABLE) as table:

                def keep(row: Mapping[str, Number]) -> None:
                    take(row)
                    table.write(f"{_table_line(row)}\n".encode())

                table.write(f"{','.join(COLUMNS)}\n".encode())
                rewind(run_dir / RECORDS, resume_step, keep)
        else:
            rewind(run_dir / RECORDS, resume_step, take)
        self._arrays.write()
        self._records = LineAppender(run_dir / RECORDS)
        self._table = LineAppender(run_dir / TABLE) if csv else None

    def log(self, record: Record) -> None:
        """Append one record; `training_metrics.json` follows at once or a little later, see `_ArraysFile`."""
        row = record.row()
        line = record.to_json()
        self._records.append(line)
        self._digest.update(line.encode())
        if self._table:
            self._table.append(_table_line(row))
        self._arrays.append(row)
        self._arrays.write_if_grown()

    def digest(self) -> str:
        """SHA-256 over all records so far: what a checkpoint remembers of the file, which has no hash of its own."""
        return self._digest.hexdigest()

    def flush(self) -> None:
        """Bring `training_metrics.json` up to the last record, and the records safely to the device.

        Called with each checkpoint: a resume from it must find the records up to it, even after a power cut.
        """
        self._arrays.write_if_behind()
        self._records.sync()

    def close(self) -> None:
        """Flush and close; the files stay closed even when the flush fails."""
        try:
            self.flush()
        finally:
            self._records.close()
            if self._table:
                self._table.close()


class _ArraysFile:
    """`training_metrics.json`, rewritten whole so that it always parses, and seldom enough to stay cheap.

    Rewriting it with every record would write a quadratic number of bytes: 30 TB over a million records. So it is
    written with a record by which it has grown by 2 %, which at first is every one, though not twice in a second, for
    it costs as much as all else of a record. All rewrites together then write about 50 times the final file (3 GB for a
    million records), and between checkpoints it lacks, until the next record, at most 2 % of the run, less than a pixel
    or two of a plot, or the records of a second. (A rule in seconds alone was dropped: with a record per second on a
    fast disk it still writes the quadratic number of bytes.)
    """

    _GROWTH, _LEAST_S = 1.02, 1.0

    def __init__(self, path: Path, clock: Callable[[], float]):
        self._path, self._clock = path, clock
        self._written_at = -math.inf
        # Encoded as they come: a rewrite is five plain writes, and a million records are 60 MB and not 500.
        self._columns = {name: bytearray() for name in ARRAY_SOURCES}
        self._written_bytes = 0

    def append(self, row: Mapping[str, Number]) -> None:
        for name, source in ARRAY_SOURCES.items():
            column = self._columns[name]
            if column:
                column += b", "
            column += _text(row.get(source), unknown="null").encode()

    def write_if_grown(self) -> None:
        if self._clock() - self._written_at < self._LEAST_S:
            return
        if self._size() >= self._GROWTH * self._written_bytes:
            self.write()

    def write_if_behind(self) -> None:
        if self._size() > self._written_bytes:
            self.write()

    def write(self) -> None:
        with replacing(self._path) as file:
            opening = b"{"
            for name, column in self._columns.items():
                file.write(opening + f'"{name}": ['.encode())
                file.write(column)
                opening = b"],\n "
            file.write(b"]}\n")
        self._written_bytes, self._written_at = self._size(), self._clock()

    def _size(self) -> int:
        return sum(map(len, self._columns.values()))


def _table_line(row: Mapping[str, Number]) -> str:
    return ",".join(_text(row.get(name), unknown="") for name in COLUMNS)


def _text(value: Number, unknown: str) -> str:
    """A number of a row as JSON and CSV both write it: shortest digits that read back to the same float."""
    return unknown if value is None else str(value)
