"""Files called .json: source code as a rule, and read as plain text; but some hold records, which nobody means to."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from typing import Any

import zstandard

from llmtrain.data.files import SourceFile, suffixes
from llmtrain.errors import UserError

_LOOKED_AT = 1 << 20  # bytes; most records are shorter


def look_at_json(files: Iterable[SourceFile], text_field: str, asked_for: bool) -> str | None:
    """Look at the first .json file of each input; return a line about them for the user, where that is worth one.

    Args:
        files: of all inputs.
        text_field: that records would have.
        asked_for: whether such files were chosen by name. Then they are taken as they stand, whatever they hold.

    Raises:
        UserError: one holds records, and nobody asked for it as plain text.
    """
    found = [file for file in files if file.is_text and suffixes(file.path)[0] == ".json"]
    first = {file.source: file for file in reversed(found)}
    for file in first.values():
        if not asked_for and (what := _records(_beginning(file), text_field)) is not None:
            raise UserError(
                f"{file.path}: {what}, and a .json file is read as plain text, its brackets too; make it .jsonl (one"
                " record a line), or take it as it stands with --include '*'"
            )
    if asked_for or not found:
        return None
    count = "1 .json file is" if len(found) == 1 else f"{len(found):,} .json files are"
    return f"{count} read as plain text, brackets and all (such as {found[0].path}); records belong in .jsonl"


def _records(text: str, text_field: str) -> str | None:
    """What records these are, if it is they beyond doubt; one object may be anything."""

    def is_record(value: object) -> bool:
        return isinstance(value, dict) and isinstance(value.get(text_field), str)

    if text.startswith("["):
        return f"a list of records with a field '{text_field}'" if is_record(_first(text[1:])) else None
    lines = [_first(line, whole=True) for line in text.splitlines()[:2]]
    if len(lines) == 2 and all(isinstance(line, dict) for line in lines):
        return "its lines are JSON records"
    return f"its first line is a record with a field '{text_field}'" if lines and is_record(lines[0]) else None


def _first(text: str, whole: bool = False) -> Any:
    """The JSON value that a text begins with, or is; None: it is none, or is cut off."""
    text = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if not whole or not text[end:].strip() else None


def _beginning(file: SourceFile) -> str:
    """The first megabyte, without blank lines; nothing of a file that cannot be read, which its reader tells."""
    try:
        with file.path.open("rb") as raw:
            if file.compression == ".gz":
                data = gzip.GzipFile(fileobj=raw).read(_LOOKED_AT)
            elif file.compression == ".zst":
                data = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read(_LOOKED_AT)
            else:
                data = raw.read(_LOOKED_AT)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError):
        return ""
    lines = data.decode("utf-8-sig", "ignore").split("\n")
    return "\n".join(line for line in lines if line.strip()).lstrip()
