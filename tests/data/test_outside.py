"""What a manifest says of files elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llmtrain.data.outside import TokenRange
from llmtrain.data.shards import FileInfo, Manifest, ShardInfo, SplitInfo, TokenizerInfo

HASH = "0" * 64


def tokens(dtype: str, size: int = 8) -> TokenRange:
    place: dict[str, Any] = {"path": "/x.bin", "file_bytes": size, "header_bytes": 0, "first": 0}
    return TokenRange(dtype=dtype, bytes=size, sha256=HASH, sample_sha256=HASH, **place)  # type: ignore[arg-type]


def manifest(ids: TokenRange | FileInfo) -> Manifest:
    ends = FileInfo(path="x.ends", bytes=8, sha256=HASH)
    split = SplitInfo(
        tokens=2, documents=1, text_bytes=0, shards=(ShardInfo(tokens=2, documents=1, ids=ids, ends=ends),)
    )
    info = TokenizerInfo(kind="none", vocab_size=9, sha256=HASH, files=())
    return Manifest(dtype="uint32", tokenizer=info, splits={"train": split}, recipe={})


def test_the_same_bytes_in_another_width_are_other_tokens() -> None:
    copied = manifest(FileInfo(path="x.bin", bytes=8, sha256=HASH))
    assert manifest(tokens("uint32")).fingerprint() == copied.fingerprint() != manifest(tokens("uint16")).fingerprint()


def test_half_an_id_is_damage() -> None:
    with pytest.raises(ValidationError, match="no whole number of uint32 ids"):
        tokens("uint32", 9)
