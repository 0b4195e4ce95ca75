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
