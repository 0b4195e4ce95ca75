"""What is kept within a budget, what counts, and what is said."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from llmtrain.assemble import Assembly
from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import BEST, committed_steps, is_committed, step_folder
from llmtrain.checkpoint.store import clear_way
from llmtrain.config import make_config
from llmtrain.errors import UserError
from tests.checkpoint.conftest import save, store_of


@pytest.fixture
def size(parts: Assembly, tmp_path: Path) -> int:
    """Bytes of one checkpoint."""
    save(store_of(parts, tmp_path / "one"), parts, 1)
    return sum(path.stat().st_size for path in (tmp_path / "one").glob("step-*/**/*") if path.is_file())


def test_a_budget_takes_the_oldest_but_never_what_is_linked_kept_by_number_or_newest(
    parts: Assembly, tmp_path: Path, size: int
) -> None:
    run_dir = tmp_path / "run"
    store = store_of(parts, run_dir, keep_last=9, keep_every=30, max_bytes=4 * size + size // 2)
    for step in (10, 20, 30, 40):
        save(store, parts, step, *([BEST] if step == 10 else []))
    assert committed_steps(run_dir) == [10, 20, 30, 40]
    save(store, parts, 50)
    assert committed_steps(run_dir) == [10, 30, 40, 50]
    save(store, parts, 60)
    save(store, parts, 70)
    assert committed_steps(run_dir) == [10, 30, 60, 70]
    assert store.news()[1] == []
    tight = store_of(parts, run_dir, max_bytes=2 * size + 100)  # a step may have more digits
    for step in (80, 85):
        save(tight, parts, step)
        assert committed_steps(run_dir) == [10, step]  # 30 and 60 are kept for their number no more
    assert tight.news()[1] == []
    hopeless = store_of(parts, run_dir, max_bytes=1)
    for step in (90, 100):
        save(hopeless, parts, step)
        assert committed_steps(run_dir) == [10, step]
    (said,) = hopeless.news()[1]  # once, though it holds for both
    assert "more than checkpoint.max_bytes=1;" in said and f"take {2 * size / 1e6:,.1f} MB" in said


def test_a_damaged_checkpoint_does_not_count_as_one_to_keep(parts: Assembly, tmp_path: Path) -> None:
    store = store_of(parts, tmp_path, keep_last=2)
    for step in (1, 2, 3):
        save(store, parts, step)
    damaged = step_folder(tmp_path, 3) / "rank00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for step in (4, 5):
        save(store, parts, step)
        assert committed_steps(tmp_path) == ([2, 3, 4] if step == 4 else [3, 4, 5])
    (said,) = store.news()[1]
    assert said.startswith(f"{damaged}: has ") and said.endswith("no longer counts as one to keep")


def test_no_good_one_goes_for_a_damaged_or_a_renamed_one(parts: Assembly, tmp_path: Path, size: int) -> None:
    """They take room all the same, and that is said once."""
    run_dir = tmp_path / "run"
    budget = 3 * size + size // 2
    store = store_of(parts, run_dir, keep_last=9, max_bytes=budget)
    save(store, parts, 10)
    damaged = step_folder(run_dir, 10) / "rank00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for step in (20, 30, 40):
        save(store, parts, step)
    assert committed_steps(run_dir) == [10, 20, 30, 40]
    save(store, parts, 50)
    assert committed_steps(run_dir) == [10, 30, 40, 50]
    said = store.news()[1]
    assert [str(budget) in line for line in said] == [False, True] and "damaged or renamed ones take" in said[1]
    for step in (40, 50):
        step_folder(run_dir, step).rename(run_dir / f"step-{step:08d}.aside-1")
    (run_dir / "latest").unlink()
    after_going_back = store_of(parts, run_dir, keep_last=9, max_bytes=budget)
    for step, kept in ((35, [10, 30, 35]), (45, [10, 30, 35, 45]), (55, [10, 35, 45, 55])):
        save(after_going_back, parts, step)
        assert committed_steps(run_dir) == kept
    assert len(list(run_dir.glob("*.aside-1"))) == 2


@pytest.mark.parametrize("limits", [{"keep_last": 1}, {"keep_last": 3}, {"keep_last": 9, "max_bytes": 1}])
def test_what_the_run_may_have_to_go_back_to_is_kept_while_skips_are_remembered(
    parts: Assembly, tmp_path: Path, limits: dict[str, int]
) -> None:
    store = store_of(parts, tmp_path, **limits)
    for step in (8, 10, 12):
        save(store, parts, step)
    for step in (14, 16, 18, 20):  # since a step was skipped at 13
        store.save(parts.engine, {"step": step}, (), 13)
        assert store.settle(parts.engine) is None
        assert {12, step} <= {*committed_steps(tmp_path)}
    assert committed_steps(tmp_path) == ([12, 16, 18, 20] if limits == {"keep_last": 3} else [12, 20])
    save(store, parts, 22)
    assert 12 not in committed_steps(tmp_path)


def test_the_one_to_go_back_to_is_a_good_one(parts: Assembly, tmp_path: Path) -> None:
    store = store_of(parts, tmp_path, keep_last=2)
    for step in (8, 10):
        save(store, parts, step)
    (step_folder(tmp_path, 10) / fmt.STATE).unlink()
    for step in (14, 16, 18):
        store.save(parts.engine, {"step": step}, (), 13)
        assert store.settle(parts.engine) is None
    assert committed_steps(tmp_path) == [8, 10, 16, 18]


def test_a_save_looks_at_no_more_checkpoints_than_the_one_before(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Those that are kept for good become many; with a budget, too, each is looked at once in a launch."""
    opened: list[Path] = []

    class Counted(fmt.CheckpointReader):
        def __init__(self, folder: Path):
            opened.append(folder)
            super().__init__(folder)

    monkeypatch.setattr(fmt, "CheckpointReader", Counted)
    for name, budget in (("free", None), ("budget", 100 * size)):
        run_dir, counts = tmp_path / name, []
        store = store_of(parts, run_dir, keep_last=2, keep_every=10, max_bytes=budget)
        for step in range(5, 85, 5):
            save(store, parts, step)
            counts.append(len(opened))
            opened.clear()
        assert committed_steps(run_dir) == [10, 20, 30, 40, 50, 60, 70, 75, 80]
        assert max(counts) <= 3 and len(counts) == 16
        again = store_of(parts, run_dir, keep_last=2, keep_every=10, max_bytes=budget)
        for step in (90, 100):
            opened.clear()
            save(again, parts, step)
        assert len(opened) <= 3


def test_a_folder_that_cannot_be_looked_through_costs_a_warning(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(parts, tmp_path, keep_last=1)
    save(store, parts, 1)
    with monkeypatch.context() as patched:
        failing = "llmtrain.checkpoint.retention.committed_steps"
        patched.setattr(failing, lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        save(store, parts, 2)
    (said,) = store.news()[1]
    assert "no longer kept failed: Input/output error; tried again" in said
    assert committed_steps(tmp_path) == [1, 2]
    save(store, parts, 3)
    assert committed_steps(tmp_path) == [3] and store.news()[1] == []


def test_nothing_is_deleted_before_a_newer_one_is_committed(parts: Assembly, tmp_path: Path) -> None:
    store = store_of(parts, tmp_path, keep_last=1)
    save(store, parts, 1)
    step_folder(tmp_path, 2).write_text("in the way")
    store.save(parts.engine, {"step": 2}, ())
    assert "File exists" in str(store.settle(parts.engine))
    assert committed_steps(tmp_path) == [1]
    save(store, parts, 3)
    assert committed_steps(tmp_path) == [3]


def test_an_interrupted_deletion_is_no_checkpoint_and_is_cleared_away_with_a_line(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker goes first: killed in between, the folder is torn, and no file of it is believed."""
    store = store_of(parts, tmp_path, keep_last=1)
    save(store, parts, 1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        save(store, parts, 2)
    assert not is_committed(step_folder(tmp_path, 1)) and (step_folder(tmp_path, 1) / fmt.MANIFEST).exists()
    said: list[str] = []
    clear_way(tmp_path, 2, None, said.append)
    assert said == [f"{step_folder(tmp_path, 1)}: an unfinished checkpoint; removed"]
    assert not step_folder(tmp_path, 1).exists()


def test_a_disk_that_has_room_for_less_than_two_more_is_told_once(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Usage = namedtuple("Usage", "total used free")
    needed = sum(fragment.values.nbytes for fragment in parts.engine.fragments())
    for free, warnings in ((2 * needed, 0), (2 * needed - 1, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(10**12, 0, free))
        store = store_of(parts, tmp_path)
        for step in (free, free + 1):
            save(store, parts, step)
        said = store.news()[1]
        assert len(said) == warnings
    assert f"{(2 * needed - 1) / 1e6:,.1f} MB are free, a checkpoint takes {needed / 1e6:,.1f} MB" in said[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, needed - 1))
    store.save(parts.engine, {"step": 9}, ())
    assert "No space left on device" in str(store.settle(parts.engine))
    assert not step_folder(tmp_path, 9).exists()


@pytest.mark.parametrize(
    ("given", "limit"), [("200GB", 200 * 10**9), ("1.5GiB", 3 * 2**29), (1000, 1000), (None, None)]
)
def test_a_budget_may_have_a_unit(given: Any, limit: int | None) -> None:
    config = make_config({"checkpoint": {"max_bytes": given}})
    assert config.checkpoint.max_bytes == limit
    assert f"max_bytes: {'null' if limit is None else limit}\n" in config.to_yaml()


@pytest.mark.parametrize("given", ["12 apples", 0, -5, True, "much"])
def test_a_budget_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.max_bytes"):
        make_config({"checkpoint": {"max_bytes": given}})
