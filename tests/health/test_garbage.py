"""While a run trains, collections do not go through what the libraries left."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmtrain.train
from llmtrain.health.garbage import without_long_pauses
from tests.conftest import Call


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_was_there_is_left_alone_and_what_is_made_since_is_collected() -> None:
    gc.unfreeze()
    with without_long_pauses():
        looked_at = len(gc.get_objects())
        assert gc.get_freeze_count() > 10_000 > looked_at
        _Cycle()
        assert gc.collect() >= 1
    assert gc.get_freeze_count() == 0 and len(gc.get_objects()) > 10_000


def test_a_run_trains_in_it(
    call: Call, config_dict: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_dict))
    frozen: list[int] = []
    monkeypatch.setattr(llmtrain.train, "train", lambda _: frozen.append(gc.get_freeze_count()))
    assert call(llmtrain.train.main, "--config", tmp_path / "config.yaml")[0] == 0
    assert frozen[0] > 10_000 and gc.get_freeze_count() == 0
