"""The checkpoint that a run may have to go back to outlives the limits on what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.folders import committed_steps
from llmtrain.config import make_config
from llmtrain.health.guard import SKIPPED, Guard, first_skip
from llmtrain.train import main
from tests.conftest import small_config
from tests.faulty_steps import Faults, faulty


def test_a_run_goes_back_to_before_the_first_of_skips_that_come_far_apart(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    """Skips at 13, 16 and 19: by its number alone the checkpoint of step 12 would be gone at step 18."""
    bad: Faults = {96: "nan loss", 120: "nan gradient", 144: "large loss"}
    monkeypatch.setattr("llmtrain.train.accumulate", faulty(bad))
    config = small_config(data, tmp_path / "run")
    config["training"] |= {"max_steps": 30, "eval_every": None}  # there is no best one to go back to
    config["checkpoint"] = {"save_every": 2, "keep_last": 3}
    config["health"] = {"spike_window": 8, "max_skips": 3}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    main(["--config", str(file)])
    entries = [json.loads(line) for line in (tmp_path / "run" / SKIPPED).read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [13, 16, 19, 19]
    assert entries[-1]["back_to"] == 12 and entries[-1]["left_out"] == [96, 152]
    assert committed_steps(tmp_path / "run") == [26, 28, 30]


def test_a_skip_that_the_policy_has_not_seen_yet_counts_too(config_dict: dict[str, Any], tmp_path: Path) -> None:
    guard = Guard(make_config(config_dict), tmp_path, 0)
    assert first_skip(guard.state()) is None
    applied, refused = (["30", "0", "8", "1e-3", "inf", "inf", "2.0", "1.0", flag] for flag in ("0.0", "1.0"))
    for skips, pending, first in (([], [applied], None), ([], [applied, refused], 30), ([[25, 0, 8]], [refused], 25)):
        guard.load_state({"skips": skips, "pending": pending})
        assert first_skip(json.loads(json.dumps(guard.state()))) == first
