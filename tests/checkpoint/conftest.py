"""What tests here share: a small model's parts, a store for them, a save that is waited for, threads as ranks."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llmtrain.assemble import Assembly, assemble
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.config import CheckpointSection, make_config
from llmtrain.engine import make_engine


class Ranks:
    """What threads that stand for ranks tell each other."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=60)
        self._told: list[Any] = [None] * count

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._told[rank] = value
        self._barrier.wait()
        told = list(self._told)
        self._barrier.wait()
        return told


class Rank:
    """The part of an engine in which one of them talks to the others."""

    name = "threads"

    def __init__(self, rank: int, ranks: Ranks):
        self.rank, self.world_size, self._ranks = rank, ranks.count, ranks

    def gather(self, value: Any) -> list[Any]:
        return self._ranks.gather(self.rank, value)


@pytest.fixture
def parts(config_dict: dict[str, Any]) -> Any:
    with closing(make_engine(60.0)) as engine:
        yield assemble(make_config(config_dict), engine)


def store_of(parts: Assembly, folder: Path, **settings: Any) -> CheckpointStore:
    section = CheckpointSection(**settings)
    return CheckpointStore(folder, section, parts.config.to_yaml(), parts.data)


def save(store: CheckpointStore, parts: Assembly, step: int, *links: str) -> None:
    store.save(parts.engine, {"step": step}, links)
    assert store.settle(parts.engine) is None
