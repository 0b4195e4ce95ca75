"""Packed windows: every document once, whole where it fits, beside others; the rest of a window is no target."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data import reading
from llmtrain.data.batches import Layout, batches, inputs_and_targets, plain_order
from llmtrain.data.documents import document_end
from llmtrain.data.packed import PackedWindows, open_packed
from llmtrain.data.packing import pack
from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import MANIFEST, TOKENIZER_FOLDER, Manifest, TokenDataset
from llmtrain.data.tokenizer import tokenizer_info
from llmtrain.data.tokenizer_none import NoTokenizer
from llmtrain.errors import CorruptError, UserError
from llmtrain.model.loss import IGNORE_INDEX

END = 0
CPU = torch.device("cpu")


def dataset(folder: Path, lengths: list[int], shard_tokens: int, last: str = "closed") -> TokenDataset:
    """Documents of so many tokens, the closing one included; all others are 1, 2, 3, …: each names itself.

    `last`: the last document is closed, is broken off and said to end there, or is broken off and nothing said; or none
    is closed.
    """
    ids = np.arange(1, sum(lengths) + 1)
    ends = np.cumsum(lengths)
    if last != "none":
        ids[ends[: None if last == "closed" else -1] - 1] = END
    (folder / TOKENIZER_FOLDER).mkdir(parents=True)
    NoTokenizer(len(ids) + 1, END).save(folder / TOKENIZER_FOLDER)
    writer = ShardWriter(folder, "train", "uint16", shard_tokens)
    writer.append(ids, np.array(lengths[: -1 if last == "open" else None], np.int64), len(ids))
    info = tokenizer_info(folder / TOKENIZER_FOLDER)
    manifest = Manifest(dtype="uint16", tokenizer=info, splits={"train": writer.close()}, recipe={})
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return TokenDataset(folder)


def packed(data: TokenDataset, seq_len: int, group: int = 1 << 17) -> PackedWindows:
    return open_packed(data, "train", seq_len, END, group)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    seq_len=st.integers(2, 20),
    shard=st.integers(1, 50),
    group=st.integers(1, 70),
    last=st.sampled_from(["closed", "ended", "open"]),
    is_mapped=st.booleans(),
)
def test_every_token_of_every_document_is_a_target_once_behind_what_came_before_it(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, shard: int, group: int, last: str,
    is_mapped: bool,
) -> None:  # fmt: skip
    if lengths == [1] and last != "open":
        return  # there is not one target
    data = dataset(tmp_path_factory.mktemp("p") / "data", lengths, shard, last)
    stream = data.split("train").gather(np.array([0]), sum(lengths))[0].tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAPPED_BYTES", 1 << 32 if is_mapped else 0)
        windows = packed(data, seq_len, group)
    ids = np.arange(len(windows))
    rows = windows.gather(ids)
    assert rows.shape == (len(windows), seq_len + 1)
    inputs, targets = inputs_and_targets(rows, len(windows), CPU, END)

    expected = []  # of each document what is before each target, and whether there is one more at its end
    for begin, end in pairwise([0, *np.cumsum(lengths).tolist()]):
        tokens = stream[begin:end] + ([END] if stream[end - 1] != END else [])
        if len(tokens) > 1:
            expected += pairwise([END, *tokens])
    is_target = targets != IGNORE_INDEX
    assert sorted(zip(inputs[is_target].tolist(), targets[is_target].tolist(), strict=True)) == sorted(expected)
    assert windows.targets == windows.count_targets(ids).sum() == len(expected)
    for window, row in enumerate(is_target.tolist()):
        assert row == sorted(row, reverse=True)  # padding is at the end
        assert windows.count_targets(ids[window : window + 1]) == sum(row) > 0
    for document in set(range(len(lengths))):
        begin = sum(lengths[:document])
        own = [token for token in stream[begin : begin + lengths[document]] if token != END]
        if own and lengths[document] + (stream[begin + lengths[document] - 1] != END) <= seq_len:  # not cut
            (row,) = {int(i) for i in torch.isin(targets, torch.tensor(own)).nonzero()[:, 0]}
            assert " ".join(map(str, [END, *own])) in " ".join(map(str, inputs[row].tolist()))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=120),
    rests=st.lists(st.booleans(), min_size=120, max_size=120),
    seq_len=st.integers(30, 60),
)
def test_packing_is_best_fit_decreasing(lengths: list[int], rests: list[bool], seq_len: int) -> None:
    """Against the plain form, one piece after the other; windows of equal room may change places."""
    is_rest = np.array(rests[: len(lengths)])
    window_of = pack(np.array(lengths, np.int32), is_rest, seq_len)
    rooms = [seq_len - length for length, rest in zip(lengths, is_rest, strict=True) if rest]
    for length in sorted((n for n, rest in zip(lengths, is_rest, strict=True) if not rest), reverse=True):
        fitting = [(room, at) for at, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(seq_len - length)
    assert sorted(rooms) == sorted((seq_len - np.bincount(window_of, lengths).astype(int)).tolist())
    assert np.bincount(window_of[is_rest], minlength=1).max() <= 1


def test_short_documents_leave_little_room(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).geometric(1 / 40, 900).tolist()
    windows = packed(dataset(tmp_path / "data", lengths, 10_000), 128)
    assert windows.targets / (len(windows) * 128) > 0.98
    assert windows.pieces == sum(-(-n // 128) for n in lengths if n > 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_rank_knows_the_targets_of_the_whole_batch(tmp_path: Path, workers: int) -> None:
    """From positions alone, also where an epoch ends, from anywhere, and with windows read elsewhere."""
    data = dataset(tmp_path / "data", np.random.default_rng(2).integers(2, 30, 90).tolist(), 300)
    windows = packed(data, 24)
    layouts = [Layout(len(windows), 8, 2, rank, 2) for rank in range(2)]
    order = plain_order(len(windows), 3)
    for position in (0, 8):
        ranks = [batches(windows, layout, order, position=position, workers=workers) for layout in layouts]
        total = 0
        for _ in range(layouts[0].steps_per_epoch() - position // 8):
            here = [next(rank) for rank in ranks]
            found = 0
            for batch in here:
                for tokens, _ in batch.micro_batches():
                    found += int((inputs_and_targets(tokens, 2, CPU, batch.padding)[1] != IGNORE_INDEX).sum())
            assert [batch.target_count for batch in here] == [found, found]
            total += found
        assert position or total == windows.targets


def test_damage_is_named(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", [5, 6, 7], 10)
    ends = tmp_path / "data" / data.manifest.splits["train"].shards[1].ends.path
    whole = ends.read_bytes()
    for content, message in (
        (whole + whole, "4 document ends where the manifest says 2"),
        (whole[::-1], "do not rise"),
    ):
        ends.write_bytes(content)
        with pytest.raises(CorruptError, match=f"{ends.name}.*{message}"):
            packed(data, 8)
    ends.unlink()
    with pytest.raises(CorruptError, match=f"{ends.name}: cannot be read"):
        packed(data, 8)
    ends.write_bytes(whole)
    ids = tmp_path / "data" / data.manifest.splits["train"].shards[0].path(Path())
    windows = packed(data, 8)
    stored = np.memmap(ids, "<u2", "r+")
    stored[3] = 60_000
    stored.flush()
    with pytest.raises(CorruptError, match="token id 60000 at position 3 is outside the vocabulary of 19"):
        windows.gather(np.arange(3))
    os.truncate(ids, 10)
    with pytest.raises(CorruptError, match=ids.name):  # and no SIGBUS
        windows.gather(np.arange(3))


def test_documents_that_nothing_ends_are_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path / "open", [5, 6, 7], 10)
    assert document_end(data) == END
    with pytest.raises(UserError, match="do not end with id 0"):  # a Megatron dataset without end-of-document ids
        document_end(dataset(tmp_path / "none", [5, 6, 7], 10, "none"))
    later = dataset(tmp_path / "later", [5, 6, 7, 3], 10)  # only what is in the second file is open
    shards = later.manifest.splits["train"].shards
    ids = np.memmap(tmp_path / "later" / shards[1].path(Path()), "<u2", "r+")
    ids[ids == END] = 3
    ids.flush()
    shards = tuple(shard.model_copy(update={"sample_sha256": None}) for shard in shards)
    split = later.manifest.splits["train"].model_copy(update={"shards": shards})
    later.manifest = later.manifest.model_copy(update={"splits": {"train": split}})
    with pytest.raises(UserError, match=r"documents of .*train-00001\.bin, which .* do not end with id 0"):
        document_end(later)
    unsaid = dataset(tmp_path / "unsaid", [5, 6, 7], 10)  # as token files without --eos-id
    shards = [shard.model_copy(update={"documents": 0}) for shard in unsaid.manifest.splits["train"].shards]
    split = unsaid.manifest.splits["train"].model_copy(update={"documents": 0, "shards": tuple(shards)})
    unsaid.manifest = unsaid.manifest.model_copy(update={"splits": {"train": split}})
    with pytest.raises(UserError, match=r"where it says that none ends \(token 4\); prepare it again with --eos-id 0"):
        document_end(unsaid)
    NoTokenizer(40).save(tmp_path / "open" / TOKENIZER_FOLDER)
    with pytest.raises(UserError, match="knows no id that ends a document"):
        document_end(data)


def test_documents_of_nothing_make_no_window(tmp_path: Path) -> None:
    assert len(packed(dataset(tmp_path / "data", [1, 1, 1], 2), 8)) == 0


def test_windows_of_other_ends_have_another_digest(tmp_path: Path) -> None:
    """So that ranks which would pack differently do not begin: the ids are the same."""
    digests = [packed(dataset(tmp_path / str(n), [5, n, 13 - n], 10), 8).digest() for n in (6, 7)]
    assert packed(dataset(tmp_path / "same", [5, 6, 7], 18), 8).digest() == digests[0] != digests[1]
