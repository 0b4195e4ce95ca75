"""Existing token files: which of the inputs are some, of what format, and what is in them.

====================  ==========================================================================================
nanoGPT `.bin`        ids and nothing else, uint16 unless `--token-dtype uint32` says otherwise
llm.c `.bin`          256 int32, the first 20240520 (version 1, uint16) or 20240801 (version 7, uint32), then ids
Megatron `.bin`       ids; their dtype, sequences and documents in the `.idx` beside it
====================  ==========================================================================================

Nothing else that may lie beside them (`meta.pkl`) is opened.
"""

from __future__ import annotations

import glob
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtrain.data.megatron import MegatronIndex
from llmtrain.data.outside import Dtype
from llmtrain.errors import UserError

SUFFIXES = (".bin", ".idx")
LLMC_HEADER_BYTES = 256 * 4
LLMC: dict[int, tuple[int, Dtype]] = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
LLMC_EVALUATION = 20240522
MEGATRON_NAME = re.compile(r"_document$")  # as its preprocess_data.py ends every one
# As nanoGPT (val.bin) and llm.c (fineweb_val_000000.bin) call it.
VALIDATION_NAME = re.compile(r"(^|[_.-])(val|valid|validation)($|[_.-])")
TEST_NAME = re.compile(r"(^|[_.-])test")
TEXT_NAME = re.compile(r"\.((txt|jsonl|ndjson)(\.gz|\.zst)?|parquet)$", re.IGNORECASE)
NANOGPT_TEXT = "input.txt"  # which its prepare.py leaves beside the train.bin made of it


@dataclass(frozen=True)
class TokenFile:
    """One token file: where its ids begin and how they are stored."""

    path: Path  # absolute
    file_bytes: int
    modified_ns: int
    identity: tuple[int, int]  # device and inode: the same by whatever name
    dtype: Dtype
    header_bytes: int = 0
    index: Path | None = None  # of a Megatron dataset

    @property
    def itemsize(self) -> int:
        """Bytes of one id."""
        return np.dtype(self.dtype).itemsize

    @property
    def tokens(self) -> int:
        """How many ids there are."""
        return (self.file_bytes - self.header_bytes) // self.itemsize

    def read_index(self) -> MegatronIndex | None:
        """Open the index, where the format has one."""
        return MegatronIndex(self.index, self.file_bytes) if self.index is not None else None


def are_token_files(inputs: Sequence[str]) -> bool:
    """Whether the inputs are token files.

    Raises:
        UserError: some are and some are not, or one cannot be looked at.
    """
    kinds = dict[str, bool]()
    for source in inputs:
        try:
            kinds[source] = _paths_of(source) is not None
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror})") from error
    if len(set(kinds.values())) == 2:
        tokens, text = (next(source for source in inputs if kinds[source] is kind) for kind in (True, False))
        raise UserError(f"{tokens}: holds token ids, and {text} text; prepare them one after the other, into two --out")
    return any(kinds.values())


def find_token_files(
    inputs: Sequence[str], val_inputs: Sequence[str] = (), dtype: Dtype | None = None
) -> tuple[list[TokenFile], list[TokenFile]]:
    """List the training and the validation files, each in the order of the inputs and sorted within each.

    Of folders and globs of `inputs`, files that are called `val`, as in `val.bin`, are for validation, those that are
    called `test` for nothing, and those of `val_inputs` too are only for validation.

    Args:
        inputs: files, folders, globs, or Megatron prefixes without a suffix.
        val_inputs: the same, of which all is for validation.
        dtype: of the ids in files that do not say it; None: uint16.

    Raises:
        UserError: an input is not there, is no token file, or is damaged as far as headers and sizes tell; or a file
            comes twice, by whatever names.
    """
    train, val = list[TokenFile](), list[TokenFile]()
    held = [_describe(path, dtype) for source in val_inputs for path in _paths_or_refuse(source)]
    held_ids = {file.identity for file in held}
    for source in inputs:
        found = _named(source) is None
        for path in _paths_or_refuse(source):
            if found and TEST_NAME.search(path.stem):
                continue
            file = _describe(path, dtype)
            if found and file.identity in held_ids:
                continue
            (val if found and VALIDATION_NAME.search(path.stem) else train).append(file)
    _refuse_twice([*train, *val, *held])
    return train, val + held


def _refuse_twice(files: Sequence[TokenFile]) -> None:
    seen = dict[tuple[int, int], Path]()
    for file in files:
        if (first := seen.setdefault(file.identity, file.path)) is not file.path:
            also = f" (also as {first})" if first != file.path else ""
            raise UserError(f"{file.path}: comes twice in --input and --val-input{also}; name each file once")


def _paths_or_refuse(source: str) -> list[Path]:
    if (paths := _paths_of(source)) is None:
        raise UserError(f"{source}: not a token file (.bin), nor a folder or a glob of such")
    return paths


def _paths_of(source: str) -> list[Path] | None:
    """The `.bin` files of an input; None if it is an input of another kind, or not there."""
    if (named := _named(source)) is not None:
        return [named]
    path = Path(source)
    if path.is_dir():
        return _in_folder(path)
    if glob.has_magic(source) and not path.exists():
        found = sorted(Path(match) for match in glob.iglob(source, recursive=True))  # noqa: PTH207 -- may be absolute
        if found and all(match.suffix in SUFFIXES for match in found):
            return [match for match in found if match.suffix == ".bin"]
    return None


def _named(source: str) -> Path | None:
    """The `.bin` file that an input names by itself, by its `.idx` or by what both have in common; else None."""
    path = Path(source)
    if path.suffix in SUFFIXES and path.is_file():
        return path.with_suffix(".bin")
    if not path.exists() and all(_with(path, suffix).is_file() for suffix in SUFFIXES):
        return _with(path, ".bin")
    return None


def _in_folder(folder: Path) -> list[Path] | None:
    found = sorted(file for file in folder.glob("*.bin") if not file.name.startswith("."))
    files = [file for file in found if file.is_file()]
    known = [file for file in files if _is_of_known_format(file)]
    if known or (folder / "train.bin").is_file() or (folder / "train.bin").is_symlink():
        for file in found:
            if file.is_symlink() and not file.exists():
                raise UserError(f"{file}: a link to {file.readlink()}, which is not there")
    if (folder / "train.bin").is_file():
        for file in files:
            if file.name not in ("train.bin", "val.bin") and not TEST_NAME.search(file.stem):
                raise UserError(
                    f"{file}: beside a train.bin, and of a folder with one only that and val.bin are taken; name the"
                    " files by --input"
                )
        _refuse_text(folder, files[0], but=NANOGPT_TEXT)
        return [file for file in files if file.name in ("train.bin", "val.bin")]
    # Folders of text may hold files of that name, too, which are passed over there.
    if not known:
        return None
    for file in files:
        if file not in known:
            if file.stat().st_size == 0:
                raise UserError(f"{file}: the file is empty, beside {known[0].name}; make it again, or remove it")
            raise UserError(
                f"{file}: neither a llm.c file nor one of Megatron (there is no {file.with_suffix('.idx').name}),"
                f" beside {known[0].name}; name the files by --input"
            )
    _refuse_text(folder, files[0])
    return files


def _refuse_text(folder: Path, tokens: Path, but: str = "") -> None:
    for file in sorted(folder.iterdir()):
        if TEXT_NAME.search(file.name) and file.name != but and not file.name.startswith("."):
            raise UserError(
                f"{folder}: holds token ids ({tokens.name}) and text ({file.name}); name the files by --input"
            )


def _is_of_known_format(path: Path) -> bool:
    return path.with_suffix(".idx").is_file() or _llmc_header(path)[0] in LLMC


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)  # "books.v2" has no suffix to replace


def _describe(path: Path, dtype: Dtype | None) -> TokenFile:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if status.st_size == 0:
        raise UserError(f"{path}: the file is empty")
    found, header_bytes, index = dtype or "uint16", 0, path.with_suffix(".idx")
    if index.is_file():
        found = MegatronIndex(index, status.st_size).dtype
    elif (header := _llmc_header(path))[0] == LLMC_EVALUATION:
        raise UserError(f"{path}: holds multiple-choice questions for llm.c, not a stream of tokens")
    elif header[0] in LLMC:
        found, header_bytes = _check_llmc(path, header, status.st_size), LLMC_HEADER_BYTES
    elif _is_like_llmc(path, status.st_size):
        raise UserError(
            f"{path}: begins with the header of a llm.c file, but of kind {header[0]}; only"
            f" {' and '.join(map(str, LLMC))} are known"
        )
    elif MEGATRON_NAME.search(path.stem):
        raise UserError(
            f"{path}: called as Megatron calls its files, but there is no {index.name} beside it; rename it if it holds"
            " ids and nothing else"
        )
    elif dtype is None and _looks_like_uint32(path):
        raise UserError(
            f"{path}: looks like uint32, as every second id is 0 when read as uint16; say --token-dtype uint32, or"
            " uint16 if it is right"
        )
    itemsize = np.dtype(found).itemsize
    if (status.st_size - header_bytes) % itemsize:
        raise UserError(f"{path}: {status.st_size} bytes are not a whole number of {found} ids; truncated?")
    if status.st_size == header_bytes:
        raise UserError(f"{path}: holds no tokens")
    return TokenFile(
        # Not through links: who moves one to newer data of the same names means the link.
        path.absolute(),
        status.st_size,
        status.st_mtime_ns,
        (status.st_dev, status.st_ino),
        found,
        header_bytes,
        index.absolute() if index.is_file() else None,
    )


def _looks_like_uint32(path: Path) -> bool:
    with path.open("rb") as file:
        data = file.read(2 * 4096)
    ids = np.frombuffer(data[: len(data) // 2 * 2], "<u2")
    return len(ids) >= 16 and not ids[1::2].any()


def _llmc_header(path: Path) -> list[int]:
    """Magic number, version and tokens as a llm.c file has them; whatever stands there in another."""
    try:
        with path.open("rb") as file:
            data = file.read(12)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return list(struct.unpack("<3i", data.ljust(12, b"\0")))


def _is_like_llmc(path: Path, size: int) -> bool:
    """Whether a file begins as one of llm.c does but for the magic number: how many ids follow, then zeros."""
    with path.open("rb") as file:
        head = np.frombuffer(file.read(LLMC_HEADER_BYTES).ljust(LLMC_HEADER_BYTES, b"\1"), "<i4")
    follow = size - LLMC_HEADER_BYTES
    return int(head[2]) > 0 and follow in (2 * int(head[2]), 4 * int(head[2])) and not head[3:].any()


def _check_llmc(path: Path, header: list[int], size: int) -> Dtype:
    magic, version, tokens = header
    known, dtype = LLMC[magic]
    if version != known:
        raise UserError(f"{path}: a llm.c file ({magic}) of version {version}; only {known} is known")
    room = max(0, size - LLMC_HEADER_BYTES) / np.dtype(dtype).itemsize
    if size < LLMC_HEADER_BYTES or tokens != room:
        raise UserError(f"{path}: its llm.c header counts {tokens} tokens, {room:g} are in it; truncated?")
    return dtype
