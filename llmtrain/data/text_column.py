"""The column of text in Parquet files and Arrow tables: found by its name, and its rows taken out as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError, listed, shortened

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


@contextmanager
def open_parquet(path: Path, column: str) -> Iterator[Any]:
    """Open a file that has such a column of text.

    Raises:
        UserError: it has not, or cannot be read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFERED) as opened:
            check_column(opened.schema_arrow, column, path)
            yield opened
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({shortened(str(error), 300)})") from error


def text_bytes(group: Any, column: str) -> int:
    """Of the column in a row group, uncompressed."""
    columns = map(group.column, range(group.num_columns))
    return sum(each.total_uncompressed_size for each in columns if each.path_in_schema == column)


def rows_of_group(parquet: Any, group: int, column: str, at_once: int, skip: int = 0) -> Iterator[list[bytes | None]]:
    """The column in a row group of an opened Parquet file, some rows at a time, the first `skip` left out."""
    for batch in parquet.iter_batches(at_once, row_groups=[group], columns=[column]):
        if skip < len(batch):
            yield rows_of(batch[skip:].column(column))
        skip = max(0, skip - len(batch))


def rows_of(texts: Any) -> list[bytes | None]:
    """An Arrow array as bytes, because only then one row that is not UTF-8 does not spoil the others."""
    import pyarrow as pa

    if pa.types.is_dictionary(texts.type):  # first its values: as they are, views cannot be taken, nor more than 2 GB
        texts = texts.cast(pa.dictionary(texts.type.index_type, pa.large_binary()))
    return texts.cast(pa.large_binary()).to_pylist()  # type: ignore[no-any-return]
