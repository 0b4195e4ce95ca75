"""Whether a save fits is decided before any rank writes, by what all ranks together will write, alike on all."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.assemble import Assembly
from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import committed_steps
from llmtrain.checkpoint.store import CheckpointStore, Failure
from llmtrain.config import CheckpointSection
from llmtrain.engine import Fragment
from tests.checkpoint.conftest import Rank, Ranks

SIZES = (60_000, 5_000, 5_000)  # values of each rank
TOTAL = 4 * sum(SIZES)


class Saver(Rank):
    """What saving uses beside that."""

    def fragments(self) -> Iterator[Fragment]:
        begin = sum(SIZES[: self.rank])
        yield Fragment("model/w", (sum(SIZES),), begin, torch.ones(SIZES[self.rank]))


class Pair(Rank):
    """The same of two."""

    def fragments(self) -> Iterator[Fragment]:
        yield Fragment("model/w", (200,), 100 * self.rank, torch.ones(100))


@pytest.mark.parametrize("spare", [TOTAL, TOTAL - 1, -1])
def test_uneven_shares_are_added_up_and_not_multiplied(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """A disk with room for two, for one, for none: what other ranks have written already does not count again."""
    Usage = namedtuple("Usage", "total used free")

    def usage(_: object) -> Usage:
        written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
        return Usage(10**12, 0, TOTAL + spare - written)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    ranks = Ranks(len(SIZES))

    def save(rank: int) -> tuple[Failure | None, list[str]]:
        data = parts.data
        store = CheckpointStore(tmp_path, CheckpointSection(), parts.config.to_yaml(), data)
        engine: Any = Saver(rank, ranks)
        store.save(engine, {"step": 1}, ())
        return store.settle(engine), store.news()[1]

    with ThreadPoolExecutor(len(SIZES)) as pool:
        told = list(pool.map(save, range(len(SIZES))))
    assert told[0] == told[1] == told[2]
    failure, warnings = told[0]
    numbers = f"{(TOTAL + spare) / 1e6:,.1f} MB are free, a checkpoint takes {TOTAL / 1e6:,.1f} MB"
    if spare < 0:
        assert str(failure) == f"{tmp_path}: saving step 1 failed: No space left on device: {numbers}"
        assert not list(tmp_path.glob("step-*")) and committed_steps(tmp_path) == []
    else:
        assert failure is None and committed_steps(tmp_path) == [1]
        assert [numbers in warning for warning in warnings] == [True] * (spare < TOTAL)


def test_a_failing_disk_is_not_asked_on_one_rank_alone_what_became_of_a_save(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it failed to write, it may fail to answer, and a rank that hears nothing would leave the others waiting."""
    ranks = Ranks(2)
    written = fmt.write_rank

    def fails_on_rank_0(folder: Path, rank: int, fragments: Any) -> None:
        if rank == 0:
            raise OSError(5, "Input/output error")
        written(folder, rank, fragments)

    def no_answer(*_: object) -> bool:
        raise OSError(116, "Stale file handle")

    def save(rank: int) -> tuple[str, int | None]:
        store = CheckpointStore(tmp_path, CheckpointSection(), parts.config.to_yaml(), parts.data)
        engine: Any = Pair(rank, ranks)
        store.save(engine, {"step": 1}, ())
        return str(store.settle(engine)), store.saved_step

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(fmt, "write_rank", fails_on_rank_0)
        patch.setattr("llmtrain.checkpoint.folders.is_committed", no_answer)
        patch.setattr("llmtrain.checkpoint.store.is_committed", no_answer)
        told = list(pool.map(save, (0, 1)))
    assert told == 2 * [(f"{tmp_path}: saving step 1 failed: Input/output error", None)]
    assert not list(tmp_path.glob("step-*"))


def test_what_fails_behind_the_commit_is_told_and_takes_nothing_from_what_is_saved(
    parts: Assembly, tmp_path: Path
) -> None:
    def broken(_folder: Path) -> None:
        raise RuntimeError("can't start new thread")

    store = CheckpointStore(tmp_path, CheckpointSection(), parts.config.to_yaml(), parts.data, on_saved=broken)
    for step in (1, 2):
        store.save(parts.engine, {"step": step}, ())
        assert store.settle(parts.engine) is None
        (warning,) = store.news()[1]
        assert "saved, but what follows a save failed: RuntimeError(" in warning
    assert committed_steps(tmp_path) == [1, 2]
