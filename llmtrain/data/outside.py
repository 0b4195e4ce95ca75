"""Token files that a prepared folder does not hold but refers to: they are read where they lie, never copied.

Only a shard of type `TokenRange` may lie outside its folder, and only in a manifest that lies on this machine (what
comes from a store must bring its own files). Such a manifest could still be somebody else's, so it has to know a few
pages of what it uses of a file: one whose maker does not know these opens nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmtrain.errors import CorruptError

SHA256 = "^[0-9a-f]{64}$"
BLOCK_BYTES = 4 << 20  # a multiple of every id's size
SAMPLES, SAMPLE_BYTES = 4, 4096  # few enough that thousands of files on a network are opened in seconds
Ids = npt.NDArray[np.unsignedinteger[Any]]
Dtype = Literal["uint16", "uint32"]


class TokenRange(BaseModel):
    """Consecutive tokens of a file elsewhere: a header, then little-endian ids from the number `first` on.

    `sha256` is over the bytes of these ids, `sample_sha256` over a few pages of them (`hash_samples`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str = Field(pattern="^/")
    file_bytes: int = Field(ge=0)
    dtype: Dtype
    header_bytes: int = Field(ge=0)
    first: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=SHA256)
    sample_sha256: str = Field(pattern=SHA256)

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if self.bytes % self.stored.itemsize:
            raise ValueError(f"{self.bytes} bytes are no whole number of {self.dtype} ids")
        return self

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of the ids as they lie in the file."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def begin(self) -> int:
        """Where the ids begin, in bytes."""
        return self.header_bytes + self.first * self.stored.itemsize

    def place(self, position: int) -> str:
        """Name the place of the id at `position` of the range."""
        return place_in_file(self.header_bytes, self.first + position, self.stored.itemsize)


def place_in_file(header_bytes: int, token: int, itemsize: int) -> str:
    """Name the place of a token, counted from the first of its file."""
    return f"position {token} (byte {header_bytes + token * itemsize})"


def hash_samples(path: str | Path, begin: int, size: int) -> str:
    """SHA-256 of a few pages spread evenly over `size` bytes from `begin` on, the first and the last among them."""
    digest = hashlib.sha256()
    file = os.open(path, os.O_RDONLY)
    try:
        for number in range(SAMPLES):
            at = begin + max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1)
            digest.update(os.pread(file, min(SAMPLE_BYTES, size), at))
    finally:
        os.close(file)
    return digest.hexdigest()


def problem_at_opening(tokens: TokenRange) -> str | None:
    """Say what is wrong as far as it can be seen without reading all of it: gone, another size, another content."""
    path = Path(tokens.path)
    try:
        if not path.is_file():
            return f"{path}: is not there{' as a file' if path.exists() else ''}"
        if (size := path.stat().st_size) != tokens.file_bytes:
            return f"{path}: has {size} bytes and had {tokens.file_bytes} when it was prepared"
        if tokens.begin + tokens.bytes > size:
            return f"{path}: ends before the tokens that the manifest says are in it"
        if hash_samples(path, tokens.begin, tokens.bytes) != tokens.sample_sha256:
            return f"{path}: was changed since it was prepared"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def problem_of_content(tokens: TokenRange, report: Callable[[int], None]) -> str | None:
    """Say what is wrong when all of it is read and compared with its hash; `report` is told of the bytes read."""
    if problem := problem_at_opening(tokens):
        return problem
    digest = hashlib.sha256()
    try:
        for block in read_blocks(Path(tokens.path), tokens.stored, tokens.begin, tokens.bytes):
            digest.update(block.view(np.uint8).data)
            report(block.nbytes)
    except OSError as error:
        return f"{tokens.path}: cannot be read ({error.strerror})"
    return None if digest.hexdigest() == tokens.sha256 else f"{tokens.path}: was changed since it was prepared"


def check_range(tokens: TokenRange, manifest: Path) -> None:
    """Check a range as `problem_at_opening` does.

    Raises:
        CorruptError: the file is gone or was changed.
    """
    if problem := problem_at_opening(tokens):
        raise CorruptError(f"{problem}; {manifest} uses it in place: put it back as it was, or prepare the data again")


def read_blocks(path: Path, dtype: np.dtype[Any], begin: int, size: int) -> Iterator[Ids]:
    """Yield the ids of `size` bytes from `begin` on, a few megabytes at a time, each time in the same memory.

    Raises:
        OSError: the file cannot be read, or ends before.
    """
    memory = memoryview(bytearray(min(BLOCK_BYTES, size)))
    with path.open("rb") as file:
        file.seek(begin)
        while size:
            wanted = memory[: min(len(memory), size)]
            if file.readinto(wanted) < len(wanted):
                raise OSError(0, "it ends too early; was it cut off just now?")
            size -= len(wanted)
            yield np.frombuffer(wanted, dtype)
