"""The column of text in Parquet files and Arrow tables: found by its name, and its rows taken out as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.data import memory
from llmtrain.errors import UserError, listed, shortened

ROWS_AT_ONCE = 1024  # fewer where they are long
_READ_AT_ONCE = 4 << 20  # bytes of the rows of a row group
_BUFFERED = 1 << 20  # bytes of a Parquet column; else all of it that a row group has is read at once


def check_column(schema: Any, column: str, source: object) -> None:
    """Look whether a schema has such a column.

    Raises:
        UserError: it has none or several, or one that holds no text; `source` is what it is called.
    """
    import pyarrow as pa

    count, names = schema.names.count(column), listed(schema.names)
    if count == 0:
        raise UserError(f"{source}: no column '{column}' (it has: {names}; --text-field names another)")
    if count > 1:
        raise UserError(
            f"{source}: {count} columns are called '{column}' (it has: {names}); rename all but one, or "
            "name another by --text-field"
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):  # as pandas writes categories
        kind = kind.value_type
    if kind not in (
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.null(),
    ):  # fmt: skip
        raise UserError(
            f"{source}: column '{column}' holds {shortened(str(kind))}, not text (it has: {names}; --text-field names "
            "another)"
        )


@dataclass(frozen=True)
class ParquetColumn:
    """The column of text of a Parquet file.

    Args:
        opened: the file, by `pyarrow`.
        name: of the column.
        source: what errors call the file.
    """

    opened: Any
    name: str
    source: str

    def bytes_of(self, group: Any) -> int:
        """Of the column in a row group, of which this is the metadata; uncompressed."""
        columns = map(group.column, range(group.num_columns))
        return sum(each.total_uncompressed_size for each in columns if each.path_in_schema == self.name)

    def rows(self, number: int, first: int, skip: int = 0) -> Iterator[list[bytes | None]]:
        """The texts in a row group, some at a time; its first row has the number `first`, and `skip` rows are left out.

        Raises:
            UserError: there is no memory for one of them; where they are that long on average, before any is read.
        """
        group = self.opened.metadata.row_group(number)
        average = self.bytes_of(group) // max(1, group.num_rows)
        which = f"row {first}" if group.num_rows == 1 else f"one of the rows {first} to {first + group.num_rows - 1}"
        memory.require_room(f"{self.source}: {which}", average, "")
        at_once = max(1, min(ROWS_AT_ONCE, _READ_AT_ONCE // max(1, average)))
        for batch in self.opened.iter_batches(at_once, row_groups=[number], columns=[self.name]):
            if skip < len(batch):
                yield from rows_of(batch.column(self.name)[skip:], self.source, first + skip)
            first, skip = first + len(batch), max(0, skip - len(batch))


@contextmanager
def open_parquet(path: Path, column: str) -> Iterator[ParquetColumn]:
    """Open a file that has such a column of text.

    Raises:
        UserError: it has not, cannot be read, or takes more memory than there is.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with memory.told_of_memory(path), parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFERED) as opened:
            check_column(opened.schema_arrow, column, path)
            yield ParquetColumn(opened, column, str(path))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({shortened(str(error), 300)})") from error


def rows_of(texts: Any, source: str, first: int) -> Iterator[list[bytes | None]]:
    """An Arrow array as bytes, because only then one row that is not UTF-8 does not spoil the others.

    All at once, but where they are large one by one; `first` is the number of the first in `source`.

    Raises:
        UserError: there is no memory for one of them.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(texts.type):  # first its values: as they are, views cannot be taken, nor more than 2 GB
        texts = texts.cast(pa.dictionary(texts.type.index_type, pa.large_binary()))
    if _bytes_at_most(texts) <= memory.LOOKED_AFTER:
        yield texts.cast(pa.large_binary()).to_pylist()
        return
    for row in range(len(texts)):
        one = texts[row : row + 1].cast(pa.large_binary())
        memory.require_room(f"{source}: row {first + row}", _longest(one), "")
        yield one.to_pylist()


def _bytes_at_most(texts: Any) -> int:
    """Of an Arrow array: of categories, each row may be the longest of them."""
    import pyarrow as pa

    is_categories = pa.types.is_dictionary(texts.type)
    return len(texts) * _longest(texts.dictionary) if is_categories else int(texts.nbytes)


def _longest(texts: Any) -> int:
    """Bytes of the longest text of an Arrow array of bytes."""
    from pyarrow import compute

    return compute.max(compute.binary_length(texts)).as_py() or 0
