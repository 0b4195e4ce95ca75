"""A stop signal while the model writes a sample: all ranks leave it at the same token; the resumed run begins it anew.

A sample of a large model may take longer than the grace.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import committed_steps, step_folder
from tests.faults.conftest import (
    Config,
    Launcher,
    assert_as_undisturbed,
    assert_two_as_undisturbed,
    config_of,
    numbers,
    two_ranks,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOKENS, PROMPTS = 40, ["The", "A cat"]
CHOOSE = "llmtrain.model.sampling:choose"  # once for each token


def writing(config: Config) -> Config:
    """Samples at steps 3, 6 and 8; at the last it is also evaluated, found best and saved."""
    config["training"] |= {"sample_tokens": TOKENS, "sample_prompts": PROMPTS}
    return config


def of_samples(run_dir: Path) -> list[tuple[int, str]]:
    path = run_dir / "samples.jsonl"
    entries = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [(entry["step"], entry["prompt"]) for entry in entries]


@pytest.mark.parametrize(("ranks", "step"), [(1, 3), (1, 8), (2, 8)])
def test_a_stop_in_a_sample(launcher: Launcher, data: Path, tmp_path: Path, ranks: int, step: int) -> None:
    """In the middle of the second prompt; where there are two ranks, only the second gets the signal."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    make = two_ranks if ranks == 2 else config_of
    ended = launcher.train_ranks(ranks, writing(make(data, whole)))
    assert [one.code for one in ended] == [0] * ranks, ended
    before = [(at, prompt) for at in (3, 6, 8) if at < step for prompt in PROMPTS]
    strike = {"call": CHOOSE, "nth": TOKENS * (len(before) + 1) + TOKENS // 2, "delay_s": 0.0}
    config = writing(make(data, run_dir))
    ended = launcher.train_ranks(ranks, config, **strike, number=signal.SIGTERM, victim=ranks - 1)
    assert [one.code for one in ended] == [75] * ranks, ended
    said = "".join(one.err for one in ended)
    assert said.count(f"stopped after step {step} by") == 1 and "Traceback" not in said, said
    assert of_samples(run_dir) == [*before, (step, PROMPTS[0])], "it was not written to its end"
    assert committed_steps(run_dir)[-1] == step
    assert json.loads((step_folder(run_dir, step) / "state.json").read_text())["unfinished"]["epoch"] == 0
    assert [record["step"] for record in numbers(run_dir)] == [*range(1, step)]
    ended = launcher.train_ranks(ranks, config)
    assert [one.code for one in ended] == [0] * ranks, ended
    assert of_samples(run_dir) == [(at, prompt) for at in (3, 6, 8) for prompt in PROMPTS]
    (assert_two_as_undisturbed if ranks == 2 else assert_as_undisturbed)(run_dir, whole)
