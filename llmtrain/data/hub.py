"""Hugging Face datasets, always streamed: from the hub, or from a folder of this machine, through `datasets`.

Code that comes with a dataset is never run: only datasets that are plain files (`KINDS`) are opened, and a version of
`datasets` that could run any is refused. A dataset of the hub is pinned to the commit that was found first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtrain.data.memory import told_of_memory
from llmtrain.data.text_column import ROWS_AT_ONCE, ParquetColumn, check_column, rows_of
from llmtrain.errors import UserError, shortened

PREFIX = "hf:"
KINDS = ("parquet", "json", "arrow", "csv", "text")
OLDEST = 4  # before, it ran scripts of datasets where told to
_BUFFERED = 8 << 20  # bytes of a Parquet column, and of one request to the hub
UNKNOWN_BYTES = 64 << 20  # of a file whose size is not told; decides only how many processes are started
PINNED = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")


@dataclass(frozen=True)
class DatasetShard:
    """One of the files (as a rule) that a dataset is made of."""

    source: str  # as the user typed it
    revision: str | None
    index: int
    count: int

    @property
    def _name(self) -> str:
        return f"{self.source}#{self.index}"

    def rows(self, column: str, skip: int) -> Iterator[list[bytes | None]]:
        """Yield the texts of rows, the first `skip` left out, some at a time and as bytes.

        Raises:
            UserError: there is no such column, it holds no text, or the dataset cannot be read.
        """
        builder, dataset = _open(self.source, self.revision)
        files = [str(file) for file in (builder.config.data_files or {}).get(_parts(self.source)[2], [])]
        is_parquet = builder.name == "parquet" and all(file.endswith(".parquet") for file in files)
        with _told_in_one_line(self.source, "cannot be read"), told_of_memory(self.source):
            if is_parquet and len(files) == dataset.num_shards == self.count:
                yield from self._rows_of_parquet(files[self.index], column, skip)
                return
            shard = dataset.shard(num_shards=self.count, index=self.index)
            for table in (shard.skip(skip) if skip else shard).with_format("arrow").iter(ROWS_AT_ONCE):
                check_column(table.schema, column, self.source)
                for batch in table.to_batches():
                    yield from rows_of(batch.column(column), self._name, skip)
                    skip += len(batch)

    def _rows_of_parquet(self, file: str, column: str, skip: int) -> Iterator[list[bytes | None]]:
        """Of one column some rows at a time; `datasets` decodes all columns of a whole row group."""
        import fsspec
        from pyarrow import parquet

        with Path(file).open("rb") if Path(file).is_file() else fsspec.open(file, "rb") as raw:
            opened = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_BUFFERED)
            check_column(opened.schema_arrow, column, self.source)
            texts, first = ParquetColumn(opened, column, self._name), 0
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if skip < first + rows:
                    yield from texts.rows(group, first, max(0, skip - first))
                first += rows


@dataclass(frozen=True)
class FoundShard:
    """A shard, about how many bytes it has, and a number that changes when the dataset does."""

    shard: DatasetShard
    bytes: int
    stamp: int


def find_shards(source: str) -> list[FoundShard]:
    """List the shards of `hf:NAME[:CONFIG[:SPLIT]]`; NAME may be a folder, SPLIT is `train` unless said.

    Raises:
        UserError: `datasets` is missing or too old; there is no such dataset, config or split; it needs code.
    """
    builder, dataset = _open(source, None)
    split = _parts(source)[2]
    files = (builder.config.data_files or {}).get(split, [])
    names = [str(file) for file in files]
    content = [names, [list(map(str, entry)) for entry in getattr(files, "origin_metadata", [])]]
    stamp = int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:7], "little")
    pinned = PINNED.match(names[0]) if names else None
    sizes = [Path(name).stat().st_size for name in names if Path(name).is_file()]
    count = max(1, dataset.num_shards)
    each = sum(sizes) // count if sizes else UNKNOWN_BYTES
    shards = (DatasetShard(source, pinned[1] if pinned else None, index, count) for index in range(count))
    return [FoundShard(shard, each, stamp) for shard in shards]


@lru_cache(maxsize=4)
def _open(source: str, revision: str | None) -> tuple[Any, Any]:
    """The builder and the streamed split of a source."""
    try:
        version = metadata.version("datasets")  # a folder of that name that lies here can be imported, too
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source}: Hugging Face datasets need the package datasets: pip install -c constraints.txt -e '.[hf]'"
        ) from error
    if int(version.split(".")[0]) < OLDEST:
        raise UserError(f"{source}: datasets {version} is too old; pip install 'datasets>={OLDEST}'")
    datasets.disable_progress_bars()
    # What is wrong is told once, in our own line; `huggingface_hub` would tell of each of its attempts.
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    name, config, split = _parts(source)
    taken_for = "" if Path(name).exists() else f"; {name} is no folder here, so taken for a dataset of the hub"
    with _told_in_one_line(source, "cannot be opened", taken_for):
        builder = datasets.load_dataset_builder(name, config, revision=revision)
    if builder.name not in KINDS:
        raise UserError(f"{source}: a dataset of kind {builder.name}; only these are read: {', '.join(KINDS)}")
    _refuse_files_elsewhere(source, name, builder.config.data_files or {})
    if builder.name == "parquet":  # else that of the first group of a file, and of one without rows an error
        builder.config.batch_size = ROWS_AT_ONCE
    with _told_in_one_line(source, "cannot be opened"):
        return builder, builder.as_streaming_dataset(split=split)


def _refuse_files_elsewhere(source: str, name: str, data_files: Mapping[str, Iterable[object]]) -> None:
    """A dataset's card says which files it is made of, and could name any of this machine or of the internet.

    From the hub all must be of the commit that was found; from a folder below it, wherever links in it lead.
    """
    for file in (str(file) for files in data_files.values() for file in files):
        inner = file.rpartition("::")[2]  # of an archive
        if Path(name).exists():
            folders = (Path(name).absolute(), Path(name).resolve())
            is_own = any(Path(os.path.normpath(inner)).is_relative_to(folder) for folder in folders)
        else:
            is_own = PINNED.match(inner) is not None and ".." not in inner.split("/")
        if not is_own:
            raise UserError(f"{source}: its card names {file}, which is not a file of the dataset; nothing was read")


def _parts(source: str) -> tuple[str, str | None, str]:
    """Name, config and split of a source."""
    rest = source.removeprefix(PREFIX)
    if rest and Path(rest).exists():
        return rest, None, "train"
    name, config, split = (*rest.split(":", 2), "", "")[:3]
    if not name:
        raise UserError(f"{source}: names no dataset; write hf:NAME, hf:NAME:CONFIG or hf:FOLDER")
    return name, config or None, split or "train"


@contextmanager
def _told_in_one_line(source: str, what: str, more: str = "") -> Iterator[None]:
    """Whatever `datasets` and the libraries below it raise (of many kinds) is about the dataset or the way to it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: {what} ({shortened(said, 300)}){more}") from error
