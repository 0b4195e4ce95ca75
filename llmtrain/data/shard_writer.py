"""Documents to the shards of one split, in a way that can be gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from llmtrain.data.hashed_file import HashedFile
from llmtrain.data.outside import hash_samples
from llmtrain.data.reading import Ids
from llmtrain.data.shards import FileInfo, ShardInfo, SplitInfo
from llmtrain.data.staging import sync_path

_END = np.dtype("<i8")


class WriterState(BaseModel):
    """Where a `ShardWriter` is: the shards that are finished, the files of the open one, and totals of the split."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shards: tuple[ShardInfo, ...] = ()
    open_ids: FileInfo | None = None
    open_ends: FileInfo | None = None
    documents: int = Field(default=0, ge=0)
    text_bytes: int = Field(default=0, ge=0)


NOTHING = WriterState()


class ShardWriter:
    """Appends documents to one split, cutting shards of exactly `shard_tokens` tokens (the last may be shorter).

    The first shard is number `first_shard`: one split may be written by several writers. It goes on from `state`, which
    a writer of the same arguments returned by `sync`: what that one wrote afterwards is dropped.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: Literal["uint16", "uint32"],
        shard_tokens: int,
        *,
        first_shard: int = 0,
        state: WriterState = NOTHING,
    ):
        self._folder, self._split, self._shard_tokens, self._first_shard = folder, split, shard_tokens, first_shard
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards = list(state.shards)
        self._synced = len(self._shards)
        self._documents, self._text_bytes = state.documents, state.text_bytes
        self._open_shard(*(file.bytes if file else 0 for file in (state.open_ids, state.open_ends)))

    def _open_shard(self, ids_bytes: int = 0, ends_bytes: int = 0) -> None:
        path = self._folder / f"{self._split}-{self._first_shard + len(self._shards):05d}.bin"
        self._ids, self._ends = HashedFile(path, ids_bytes), HashedFile(path.with_suffix(".ends"), ends_bytes)

    @property
    def _filled(self) -> int:
        return self._ids.bytes // self._dtype.itemsize

    def append(self, ids: Ids, document_lengths: npt.NDArray[np.int64], text_bytes: int) -> None:
        """Append documents.

        Args:
            ids: (tokens,) token ids of all of them in order, end-of-document ids included.
            document_lengths: (documents,) how many of these ids each has that ends here; what is left belongs to a
                document that goes on with the next call.
            text_bytes: how many bytes of UTF-8 text they encode.
        """
        ids = np.ascontiguousarray(ids, dtype=self._dtype)
        ends = np.cumsum(document_lengths, dtype=np.int64)
        self._documents += len(ends)
        self._text_bytes += text_bytes
        done = 0
        while done < len(ids):
            if self._filled == self._shard_tokens:
                self._close_shard()
                self._open_shard()
            begin = done - self._filled  # of the shard, as `ends` count
            there = min(begin + self._shard_tokens, len(ids))
            here = ends[np.searchsorted(ends, done, "right") : np.searchsorted(ends, there, "right")]
            self._ids.write(ids[done:there].view(np.uint8).data)
            self._ends.write((here - begin).astype(_END).data)
            done = there

    def _close_shard(self) -> None:
        ids, ends = self._ids.close(), self._ends.close()
        self._shards.append(
            ShardInfo(
                tokens=ids.bytes // self._dtype.itemsize,
                documents=ends.bytes // _END.itemsize,
                ids=ids,
                ends=ends,
                sample_sha256=hash_samples(self._folder / ids.path, 0, ids.bytes),
            )
        )

    @property
    def has_finished(self) -> bool:
        """Whether a shard was finished since it was last synced."""
        return len(self._shards) > self._synced

    def sync(self) -> WriterState:
        """Wait until all is on the disk; return where this is, of shards those that were finished since the last time.

        Names in the folder are for the caller to sync.
        """
        shards = tuple(self._shards[self._synced :])
        for file in (file for shard in shards for file in shard.files()):
            sync_path(self._folder / file.path)
        self._synced = len(self._shards)
        return WriterState(
            shards=shards,
            open_ids=self._ids.sync(),
            open_ends=self._ends.sync(),
            documents=self._documents,
            text_bytes=self._text_bytes,
        )

    def close(self) -> SplitInfo:
        """Finish the last shard; return what the manifest says of this split."""
        self._close_shard()
        return SplitInfo(
            tokens=sum(shard.tokens for shard in self._shards),
            documents=self._documents,
            text_bytes=self._text_bytes,
            shards=tuple(self._shards),
        )
