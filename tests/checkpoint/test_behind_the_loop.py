"""What a save costs the loop: the copy and nothing else; and when the loop hears that one has failed."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from llmtrain import train
from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import BEST, FINAL, committed_steps, pointed, step_folder
from llmtrain.checkpoint.progress import Progress
from llmtrain.observe.observer import Observer
from llmtrain.run import Run

Events = list[tuple[str, int | str]]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Records by their step and warnings, in their order."""
    seen: Events = []
    log, warn = Observer.log, Observer.warn
    monkeypatch.setattr(Observer, "log", lambda self, record: (seen.append(("record", record.step)), log(self, record)))
    monkeypatch.setattr(Observer, "warn", lambda self, text: (seen.append(("warning", text)), warn(self, text)))
    return seen


def run(config: dict[str, Any], folder: Path, eval_every: int | None = None) -> None:
    """Twelve steps, a record of each, a save after every fourth."""
    config |= {"logging": {"every": 1, "plots": False}, "checkpoint": {"save_every": 4, "keep_last": 9}}
    config["training"] |= {"max_steps": 12, "eval_every": eval_every}
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    train.main(["--config", str(path)])


def test_steps_are_taken_while_a_save_is_written_and_the_next_save_waits_for_it(
    config_dict: dict[str, Any], tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save is held back until the loop has come to where the second is due."""
    at_step_8, write = threading.Event(), fmt.write_rank

    def held_back(folder: Path, *arguments: Any) -> None:
        if folder.name == "step-00000004":
            assert at_step_8.wait(120)
            events.append(("written", 4))
        write(folder, *arguments)

    save = Run.save

    def noted(self: Run, *links: str) -> None:
        if self.progress.step == 8:
            at_step_8.set()
        save(self, *links)

    monkeypatch.setattr(fmt, "write_rank", held_back)
    monkeypatch.setattr(Run, "save", noted)
    run(config_dict, tmp_path)
    assert events.index(("record", 8)) < events.index(("written", 4)) < events.index(("record", 9))
    assert committed_steps(tmp_path / "run") == [4, 8, 12]


def test_a_save_that_fails_is_told_at_the_next_step_and_tried_again(
    config_dict: dict[str, Any], tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has failed by the time that step 5 asks; so it is told before step 6."""
    write, ask, step_5_asks = fmt.write_rank, Run.ask, threading.Event()

    def fails_once(folder: Path, *arguments: Any) -> None:
        if folder.name == "step-00000004":
            assert step_5_asks.wait(60)
            raise OSError(5, "Input/output error")
        write(folder, *arguments)

    def once_it_has_ended(self: Run) -> None:
        if self.store.is_under_way:
            step_5_asks.set()
        self.store.join()
        ask(self)

    monkeypatch.setattr(fmt, "write_rank", fails_once)
    monkeypatch.setattr(Run, "ask", once_it_has_ended)
    run(config_dict, tmp_path)
    warnings = [(index, text) for index, (kind, text) in enumerate(events) if kind == "warning"]
    assert len(warnings) == 1
    index, text = warnings[0]
    assert events[index - 1] == ("record", 5) and events[index + 1] == ("record", 6)
    assert "saving step 4 failed: Input/output error; earlier checkpoints are intact" in str(text)
    assert committed_steps(tmp_path / "run") == [8, 12]


def test_a_best_whose_save_fails_is_not_the_best(
    config_dict: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is better than the one on the disk is the best then, though it is worse than what was lost."""
    write, losses = fmt.write_rank, {4: 3.0, 8: 2.0, 12: 2.5}
    validated = Progress.validated

    def fails_once(folder: Path, *arguments: Any) -> None:
        if folder.name == "step-00000008":
            raise OSError(5, "Input/output error")
        write(folder, *arguments)

    monkeypatch.setattr(fmt, "write_rank", fails_once)
    monkeypatch.setattr(Progress, "validated", lambda self, _: validated(self, losses[self.step]))
    run(config_dict, tmp_path, eval_every=4)
    assert pointed(tmp_path / "run", BEST) == step_folder(tmp_path / "run", 12)
    state = json.loads((step_folder(tmp_path / "run", 12) / fmt.STATE).read_text())
    assert (state["best_val_loss"], state["best_step"]) == (2.5, 12) and "before_best" not in state


def test_a_best_whose_first_save_fails_is_linked_where_the_same_step_is_saved_for_good(
    config_dict: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, validated, tries = fmt.write_rank, Progress.validated, itertools.count(1)

    def fails_once(folder: Path, *arguments: Any) -> None:
        if folder.name == "step-00000012" and next(tries) == 1:
            raise OSError(5, "Input/output error")
        write(folder, *arguments)

    monkeypatch.setattr(fmt, "write_rank", fails_once)
    monkeypatch.setattr(Progress, "validated", lambda self, _: validated(self, 100.0 - self.step))
    run(config_dict, tmp_path, eval_every=4)
    assert next(tries) == 3
    last = step_folder(tmp_path / "run", 12)
    assert [pointed(tmp_path / "run", name) for name in (BEST, FINAL)] == [last, last]
    state = json.loads((last / fmt.STATE).read_text())
    assert (state["best_val_loss"], state["best_step"]) == (88.0, 12) and "lost_best" not in state
