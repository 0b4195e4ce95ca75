"""The checkpoints of a run folder: what exists, what is kept, what is cleaned up, and failing saves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.assemble import Assembly
from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import committed_steps, point, pointed, step_folder
from llmtrain.checkpoint.resume import own_step
from llmtrain.checkpoint.saving import Saving
from llmtrain.checkpoint.store import CheckpointStore, clear_way, find_checkpoint, newest_good
from llmtrain.config import CheckpointSection, DataSection
from llmtrain.data.sources import open_data
from llmtrain.errors import CorruptError, UserError
from tests.checkpoint.conftest import Rank, Ranks, save, store_of
from tests.verified import open_verified


def test_kept_are_the_last_the_best_the_final_and_every_nth(parts: Assembly, tmp_path: Path) -> None:
    store = store_of(parts, tmp_path, keep_last=2, keep_every=40)
    for step in range(10, 101, 10):
        save(store, parts, step, *(["best"] if step == 30 else []))
    assert committed_steps(tmp_path) == [30, 40, 80, 90, 100]
    assert pointed(tmp_path, "best") == step_folder(tmp_path, 30)
    assert pointed(tmp_path, "latest") == step_folder(tmp_path, 100)
    save(store, parts, 110, "best")
    assert committed_steps(tmp_path) == [40, 80, 100, 110]


def test_a_checkpoint_comes_back_slice_by_slice(parts: Assembly, tmp_path: Path) -> None:
    save(store_of(parts, tmp_path), parts, 1)
    before = {f.name: f.values.clone() for f in parts.engine.fragments()}
    for fragment in parts.engine.fragments():
        fragment.values.zero_()
    reader = newest_good(tmp_path, print, open_verified)
    assert reader is not None
    assert not reader.load(parts.engine.to_fill(optimizer=False), ())
    after = {f.name: f.values for f in parts.engine.fragments()}
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_without_marker_it_does_not_exist_and_is_cleaned_up_with_a_word(parts: Assembly, tmp_path: Path) -> None:
    store = store_of(parts, tmp_path)
    for step in (1, 2, 3):
        save(store, parts, step)
    (step_folder(tmp_path, 2) / fmt.MARKER).unlink()
    assert committed_steps(tmp_path) == [1, 3]
    said: list[str] = []
    clear_way(tmp_path, 1, None, said.append)
    assert len(said) == 2
    assert committed_steps(tmp_path) == [1]
    assert not step_folder(tmp_path, 2).exists()
    assert len(list(tmp_path.glob("step-00000003.aside-*"))) == 1  # whole, so renamed and not deleted


def test_the_newest_good_one_is_found_behind_damaged_ones(parts: Assembly, tmp_path: Path) -> None:
    store = store_of(parts, tmp_path)
    for step in (1, 2, 3):
        save(store, parts, step)
    for step, name in ((2, fmt.STATE), (3, "rank00000.safetensors")):
        with (step_folder(tmp_path, step) / name).open("r+b") as file:
            file.truncate(10)
    said: list[str] = []
    reader = newest_good(tmp_path, said.append, open_verified)
    assert reader is not None
    assert reader.manifest.step == 1
    assert len(said) == 2
    (step_folder(tmp_path, 1) / fmt.MANIFEST).write_text("{}")
    with pytest.raises(CorruptError, match="none of its 3 checkpoints is good"):
        newest_good(tmp_path, said.append, open_verified)
    assert newest_good(tmp_path / "empty", said.append, open_verified) is None


def test_a_failing_save_is_reported_and_leaves_earlier_ones(parts: Assembly, tmp_path: Path) -> None:
    """The next folder's name is taken by a file: mkdir fails as it would on a broken file system."""
    store = store_of(parts, tmp_path)
    save(store, parts, 1)
    step_folder(tmp_path, 2).write_text("in the way")
    store.save(parts.engine, {"step": 2}, ())
    failure = store.settle(parts.engine)
    assert str(failure).startswith(f"{tmp_path}: saving step 2 failed: File exists")
    assert committed_steps(tmp_path) == [1]
    save(store, parts, 3)  # a failure is over once it was told
    assert committed_steps(tmp_path) == [1, 3]


def test_what_fails_after_the_commit_takes_no_checkpoint_away(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deletion fails (a file is open elsewhere, on some file systems), then linking fails (the disk is full)."""
    store = store_of(parts, tmp_path, keep_last=1)
    save(store, parts, 1)
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError(39, "Directory not empty")))
    save(store, parts, 2)
    committed, warnings = store.news()
    assert (committed[-1], committed_steps(tmp_path)) == (step_folder(tmp_path, 2), [2])
    assert "no longer kept, but cannot be deleted" in warnings[0]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    store.save(parts.engine, {"step": 2}, ("best",))
    failure = store.settle(parts.engine)
    assert "No space left" in str(failure)
    assert committed_steps(tmp_path) == [2]


def test_a_bug_in_saving_costs_a_warning_and_the_second_time_in_a_row_the_run(parts: Assembly, tmp_path: Path) -> None:
    """Its place in the code is in the warning; then it comes with its traceback."""
    store = store_of(parts, tmp_path)
    said: list[str] = []
    saving = Saving(store, parts.engine, lambda _phase: None)

    def saved(step: int, loss: float) -> bool:
        store.save(parts.engine, {"step": step, "loss": loss}, ())
        return saving.settle(said.append)

    nan = float("nan")  # which JSON does not have
    assert [saved(1, nan), saved(2, 0.0), saved(3, nan)] == [False, True, False]
    with pytest.raises(ValueError, match="JSON") as raised:
        saved(4, nan)
    assert raised.traceback[-1].name != "settle"
    assert committed_steps(tmp_path) == [2]
    assert len(said) == 2
    assert all(
        re.search(
            r"saving step [13] failed: ValueError\('Out of range .*'\) \(store.py, line \d+; a fault of llmtrain .*\); "
            "earlier checkpoints are intact; the run tries again at the next save",
            line,
        )
        for line in said
    )


def test_without_memory_for_a_copy_the_loop_waits_while_the_state_is_written(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it changes then is not in the checkpoint; the next save has its copy again."""
    store = store_of(parts, tmp_path)
    before = {f.name: f.values.clone() for f in parts.engine.fragments()}
    plain, write = torch.empty, fmt.write_rank

    def no_memory(*size: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return plain(*size, **options)

    def slowly(*arguments: Any) -> None:
        time.sleep(0.5)
        write(*arguments)

    monkeypatch.setattr(fmt, "write_rank", slowly)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory)
        store.expect_saves(parts.engine)
        store.save(parts.engine, {"step": 1}, ())
    assert not store.is_behind
    assert store.settle(parts.engine) is None
    for fragment in parts.engine.fragments():
        fragment.values.zero_()
    (warning,) = store.news()[1]
    assert warning.startswith("no host memory for a copy of the state (rank 0 on ") and "the loop waits" in warning
    reader = open_verified(step_folder(tmp_path, 1))
    assert not reader.load(parts.engine.to_fill(optimizer=False), ())
    after = {f.name: f.values for f in parts.engine.fragments()}
    assert all(before[name].equal(after[name]) for name in before)
    save(store, parts, 2)
    assert store.is_behind and store.news()[1] == []


class Holder(Rank):
    """A rank that holds the whole state."""

    def __init__(self, rank: int, ranks: Ranks, parts: Assembly):
        super().__init__(rank, ranks)
        self.fragments = parts.engine.fragments


def test_where_one_rank_has_no_memory_for_its_copy_all_wait_for_it(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the others would take it for one that hangs. Rank 0, the only one that is heard, says which it is."""
    ranks, stores = Ranks(2), [store_of(parts, tmp_path) for _ in range(2)]

    def no_memory(_fragments: Any) -> Any:
        raise MemoryError("12.0 MB")

    monkeypatch.setattr(stores[1]._snapshot, "take", no_memory)

    def run(rank: int) -> tuple[bool, object]:
        engine: Any = Holder(rank, ranks, parts)
        stores[rank].save(engine, {"step": 1}, ())
        return stores[rank].is_behind, stores[rank].settle(engine)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [(False, None), (False, None)]
    (warning,) = stores[0].news()[1]
    assert warning.startswith("no host memory for a copy of the state (rank 1 on ") and ": 12.0 MB)" in warning


def test_a_save_that_ends_just_when_it_is_asked_for_is_one_place_of_the_loop_as_ever(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that left one out would be behind all others for good: the first to be blamed when something hangs."""
    store, ends, write = store_of(parts, tmp_path), threading.Event(), fmt.write_rank

    class Engine(Holder):
        def __getattribute__(self, name: str) -> Any:
            if name == "rank" and threading.current_thread() is threading.main_thread() and store.is_under_way:
                ends.set()
                store.join()
            return super().__getattribute__(name)

    def held_back(*arguments: Any) -> None:
        assert ends.wait(60)
        write(*arguments)

    monkeypatch.setattr(fmt, "write_rank", held_back)
    engine: Any = Engine(0, Ranks(1), parts)
    store.save(engine, {"step": 1}, ())
    places: list[str] = []
    assert store.settle(engine, lambda: places.append("written")) is None
    assert places == ["written"]


def test_a_save_waits_only_shortly_for_the_file_of_a_lost_rank(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(parts, tmp_path)
    save(store, parts, 1)
    monkeypatch.setattr("llmtrain.checkpoint.store._RECORDS_GRACE_S", 0.2)
    monkeypatch.setattr(parts.engine, "world_size", 2)  # and the second rank never writes
    monkeypatch.setattr(parts.engine, "gather", lambda value: [value, value])
    store.save(parts.engine, {"step": 2}, ())
    store.hurry()
    began = time.monotonic()
    store.join()
    assert time.monotonic() - began < 10
    assert committed_steps(tmp_path) == [1]
    monkeypatch.undo()
    failure = store.settle(parts.engine)
    assert "rank00001.json did not appear within" in str(failure)


def test_a_save_that_seems_to_hang_is_told_of_once_while_the_loop_goes_on(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(parts, tmp_path)
    save(store, parts, 1)
    store.last_save_s = 0.0
    monkeypatch.setattr("llmtrain.checkpoint.store._LATE_S", 0.3)
    assert store.news() == ([step_folder(tmp_path, 1)], [])
    monkeypatch.setattr(parts.engine, "world_size", 2)  # and the second rank never writes
    monkeypatch.setattr(parts.engine, "gather", lambda value: [value, value])
    store.save(parts.engine, {"step": 2}, ())
    told: list[str] = []
    while not told:
        told = store.news()[1]
    assert len(told) == 1 and "saving step 2 has been under way for" in told[0]
    assert "waits for the files of other ranks; earlier checkpoints are intact" in told[0]
    assert store.news() == ([], [])
    store.hurry()
    store._give_up_at = 0.0
    store.join()


def test_which_step_is_saved_already_is_remembered_and_not_looked_up(parts: Assembly, tmp_path: Path) -> None:
    """Another rank may still see the folder that rank 0 has renamed when the run went back to step 1."""
    store = store_of(parts, tmp_path)
    for step in (1, 2):
        save(store, parts, step)
    records = [step_folder(tmp_path, step) / "rank00000.json" for step in (1, 2)]
    before = [path.stat().st_ino for path in records]
    store = CheckpointStore(tmp_path, CheckpointSection(), parts.config.to_yaml(), parts.data, saved_step=1)
    save(store, parts, 1, "best")
    assert records[0].stat().st_ino == before[0] and pointed(tmp_path, "best") == step_folder(tmp_path, 1)
    save(store, parts, 2)
    assert records[1].stat().st_ino != before[1] and newest_good(tmp_path, print, open_verified) is not None


def test_a_checkpoint_of_another_run_is_not_one_of_this(parts: Assembly, tmp_path: Path) -> None:
    """So a run that branches off from it and saves at that very step writes it, whatever the folders are called."""
    run_dir = tmp_path / "run"
    for folder in (run_dir, tmp_path / "other", run_dir / ".fetched" / "other"):
        save(store_of(parts, folder), parts, 3)
        reader = newest_good(folder, print, open_verified)
        assert own_step(run_dir, reader) == (3 if folder == run_dir else None)
    (tmp_path / "link").symlink_to(run_dir)
    assert own_step(tmp_path / "link", newest_good(run_dir, print, open_verified)) == 3
    aside = step_folder(run_dir, 3).rename(run_dir / "step-00000003.aside-1")
    assert own_step(run_dir, fmt.CheckpointReader(aside)) is None
    assert own_step(run_dir, None) is None


def test_a_data_folder_that_moves_away_fails_no_save(parts: Assembly, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(parts.data.tokenizer_folder.parent, tmp_path / "data"))
    data = open_data(DataSection(), [copied])
    store = CheckpointStore(tmp_path / "run", CheckpointSection(), parts.config.to_yaml(), data)
    shutil.rmtree(copied)
    save(store, parts, 1)
    assert newest_good(tmp_path / "run", print, open_verified) is not None


def test_paths_of_the_verbs(parts: Assembly, tmp_path: Path) -> None:
    store = store_of(parts, tmp_path)
    save(store, parts, 1, "best")
    save(store, parts, 2)
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 1)
    assert find_checkpoint(step_folder(tmp_path, 2)) == step_folder(tmp_path, 2)
    (tmp_path / "best").unlink()
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 2)
    for nothing in (tmp_path / "none", tmp_path / "best"):
        with pytest.raises(UserError, match="give a run folder"):
            find_checkpoint(nothing)


def test_links_are_small_files_where_links_fail(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store_of(parts, tmp_path), parts, 1)
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    point(tmp_path, "best", "step-00000001")
    assert (tmp_path / "best").read_text() == "step-00000001\n"
    assert pointed(tmp_path, "best") == step_folder(tmp_path, 1)


def test_a_link_cannot_lead_out_of_the_run_folder(parts: Assembly, tmp_path: Path) -> None:
    save(store_of(parts, tmp_path / "other"), parts, 7)
    save(store_of(parts, tmp_path / "run"), parts, 1)
    (tmp_path / "run" / "best").symlink_to("../other/step-00000007")
    assert pointed(tmp_path / "run", "best") is None


@pytest.mark.slow
def test_two_processes_save_their_parts_and_one_resumes(config_dict: dict[str, Any], tmp_path: Path) -> None:
    """Data parallel over two real processes: the same losses as one, and a checkpoint that one process goes on from."""
    import sys

    import yaml

    from tests.conftest import records

    launch = tmp_path / "ddp.yaml"
    launch.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_dict))

    def train(*arguments: str, processes: int) -> Path:
        module = ["-m", "llmtrain.train", "--config", str(config), *arguments]
        two = ["-m", "accelerate.commands.launch", "--config_file", str(launch), "--main_process_port", "0"]
        command = [sys.executable, *(two if processes == 2 else []), *module]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert result.returncode == 0 or "training.stop_after" in result.stderr, result.stderr[-2000:]
        return Path(arguments[0].removeprefix("run.dir="))

    whole = train(f"run.dir={tmp_path / 'whole'}", processes=1)
    mixed = train(f"run.dir={tmp_path / 'mixed'}", "training.stop_after=14", processes=2)
    assert sorted(path.name for path in (mixed / "step-00000014").glob("rank*.safetensors")) == [
        "rank00000.safetensors", "rank00001.safetensors",
    ]  # fmt: skip
    train(f"run.dir={mixed}", processes=1)
    for a, b in zip(records(whole), records(mixed), strict=True):
        assert a["step"] == b["step"]
        # The gradient is summed in another order: float32 rounding, grown over 30 steps.
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["tokens"] == b["tokens"]


def test_a_link_that_failed_is_set_by_the_next_save_before_anything_is_deleted(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the best checkpoint would go, for nothing says any more that it is one."""
    store = store_of(parts, tmp_path, keep_last=1)

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llmtrain.checkpoint.store.point", no_room)
        store.save(parts.engine, {"step": 1}, ("best",))
        assert "No space left" in str(store.settle(parts.engine))
    save(store, parts, 2)
    save(store, parts, 3)
    assert committed_steps(tmp_path) == [1, 3]
    assert [pointed(tmp_path, name) for name in ("best", "latest")] == [step_folder(tmp_path, n) for n in (1, 3)]


def test_folders_that_were_moved_and_linked_are_left_alone(parts: Assembly, tmp_path: Path) -> None:
    store = store_of(parts, tmp_path / "run", keep_last=1)
    save(store, parts, 1)
    elsewhere = step_folder(tmp_path / "run", 1).rename(tmp_path / "elsewhere")
    step_folder(tmp_path / "run", 1).symlink_to(elsewhere)
    save(store, parts, 2)
    save(store, parts, 3)
    assert committed_steps(tmp_path / "run") == [1, 3] and store.news()[1] == []
    (elsewhere / fmt.MARKER).unlink()
    clear_way(tmp_path / "run", 3, None, print)
    assert committed_steps(tmp_path / "run") == [3] and (elsewhere / fmt.MANIFEST).exists()


def test_an_unfinished_folder_that_cannot_be_removed_is_renamed(
    parts: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(store_of(parts, tmp_path), parts, 1)
    torn = step_folder(tmp_path, 2)
    torn.mkdir()

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr("llmtrain.checkpoint.store.shutil.rmtree", busy)
        clear_way(tmp_path, 1, None, print)
    assert not torn.exists() and len(list(tmp_path.glob("step-00000002.unfinished-*"))) == 1
    assert "cannot be removed (Device or resource busy)" in capsys.readouterr().out
    save(store_of(parts, tmp_path), parts, 2)
