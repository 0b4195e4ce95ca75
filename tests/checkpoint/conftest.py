"""What tests of the store need: a small model's parts, a store for them, a save that is waited for."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llmtrain.assemble import Assembly, assemble
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.config import CheckpointSection, make_config
from llmtrain.engine import make_engine


@pytest.fixture
def parts(config_dict: dict[str, Any]) -> Any:
    with closing(make_engine(60.0)) as engine:
        yield assemble(make_config(config_dict), engine)


def store_of(parts: Assembly, folder: Path, **settings: Any) -> CheckpointStore:
    section = CheckpointSection(**settings)
    return CheckpointStore(folder, section, parts.config.to_yaml(), parts.data.manifest, parts.data.path)


def save(store: CheckpointStore, parts: Assembly, step: int, *links: str) -> None:
    store.save(parts.engine, {"step": step}, links)
    assert store.settle(parts.engine) is None
