"""Where documents end in prepared data: by which id, and at which positions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmtrain.config import DataSection
from llmtrain.data.shards import TOKENIZER_FOLDER, TokenDataset, sampled
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import CorruptError, UserError

_LOOKED_AT = 1 << 16  # first tokens of a shard: they show how its documents end

Int64s = npt.NDArray[np.int64]


def with_mask(data: DataSection) -> DataSection:
    """Of a resolved config: packed documents are kept apart.

    Raises:
        UserError: another setting contradicts that.
    """
    if data.packing == "windows":
        return data
    if data.stride not in (None, data.seq_len):
        raise UserError(f"data.stride {data.stride} is for data.packing: windows; with best_fit leave it out")
    if len(data.paths) > 1:
        raise UserError(
            "data.packing: best_fit is for one source, and data.sources names several; join them, or leave it out"
        )
    if "document_mask" in data.model_fields_set and not data.document_mask:
        raise UserError("data.document_mask is false, but data.packing: best_fit keeps documents apart; leave one out")
    return data.model_copy(update={"document_mask": True})


def document_end(data: TokenDataset, split: str = "train") -> int:
    """The id that closes the documents of a split, as is seen in some of it.

    Raises:
        UserError: the tokenizer has no such id, or documents do not end with it, or not only documents do.
    """
    end = load_tokenizer(data.path / TOKENIZER_FOLDER).eos_id
    if end < 0:
        raise UserError(
            f"data.document_mask: {data.path} knows no id that ends a document; prepare it again with --eos-id, or "
            "leave data.document_mask out"
        )
    stream, is_seen = data.split(split), False
    shards = [(number, shard) for number, shard in enumerate(data.manifest.splits[split].shards) if shard.tokens]
    for place in sampled(len(shards)):
        (number, shard), begin = shards[place], stream.bounds[place]
        ends, looked_at = shard_ends(data, split, number), min(shard.tokens, _LOOKED_AT)
        found = np.flatnonzero(stream.gather(np.array([begin]), looked_at)[0] == end) + 1
        said = ends[: np.searchsorted(ends, looked_at, "right")]
        if len(unsaid := np.setdiff1d(found, said)):
            raise UserError(
                f"data.document_mask: {data.path} ({split}) has id {end}, which ends documents, where it says that "
                f"none ends (token {begin + int(unsaid[0]) - 1}); prepare it again with --eos-id {end}, or leave "
                "data.document_mask out"
            )
        is_open = (np.setdiff1d(said, found) < shard.tokens).any()  # a file of tokens may break its last document off
        # The first may end beyond what was looked at.
        is_closed = len(ends) > 0 and bool(stream.gather(ends[:1] + begin - 1, 1)[0, 0] == end)
        if is_open or (len(ends) and not is_closed and ends[0] < shard.tokens):
            raise _not_closed(data, split, shard.path(data.path), end)
        is_seen = is_seen or is_closed
    if not is_seen:
        raise _not_closed(data, split, data.path, end)
    return end


def _not_closed(data: TokenDataset, split: str, path: Path, end: int) -> UserError:
    place = f"{path} ({split})" if path == data.path else f"{path}, which {data.path} ({split}) is made of,"
    return UserError(
        f"data.document_mask: documents of {place} do not end with id {end}, by which the tokenizer ends them, so "
        "nothing between them says where; prepare documents that are closed (token files: --eos-id), or leave "
        "data.document_mask out"
    )


def shard_ends(data: TokenDataset, split: str, number: int) -> Int64s:
    """Map the positions after the last tokens of the documents that end in a shard, (documents,), rising.

    Raises:
        CorruptError: the file is not as large as the manifest says.
    """
    shard = data.manifest.splits[split].shards[number]
    if not shard.documents:
        return np.empty(0, np.int64)
    path = data.path / shard.ends.path
    try:
        ends = np.memmap(path, dtype="<i8", mode="r")
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path}: cannot be read ({error}); prepare the data again") from error
    if len(ends) != shard.documents:
        raise CorruptError(
            f"{path}: has {len(ends)} document ends where the manifest says {shard.documents}; prepare the data again"
        )
    return np.asarray(ends)


def document_groups(data: TokenDataset, split: str, size: int) -> Iterator[Int64s]:
    """Yield the ends of successive documents of the whole stream, `size` at a time; the last ends with the stream.

    Raises:
        CorruptError: the ends do not rise, or lie beyond their shard; or see `shard_ends`.
    """
    waiting, begin, last = np.empty(0, np.int64), 0, 0
    info = data.manifest.splits[split]
    for number, shard in enumerate(info.shards):
        ends = shard_ends(data, split, number)
        for at in range(0, len(ends), size):
            more = ends[at : at + size] + begin
            if (np.diff(more, prepend=last) <= 0).any() or more[-1] > begin + shard.tokens:
                raise CorruptError(
                    f"{data.path / shard.ends.path}: its document ends do not rise within the shard; prepare the data "
                    "again"
                )
            last = int(more[-1])
            waiting = np.concatenate((waiting, more))
            if len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        begin += shard.tokens
    if last < begin:
        waiting = np.append(waiting, begin)
    if len(waiting):
        yield waiting
