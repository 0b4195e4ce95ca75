"""Ranks load a checkpoint together, and agree on whether it was good, whatever happens to one of them."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.assemble import assemble
from llmtrain.checkpoint import direct_io, restore
from llmtrain.checkpoint.direct_io import DirectFile
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.restore import Restorer, share
from llmtrain.checkpoint.resume import choose_checkpoint
from llmtrain.checkpoint.store import newest_good
from llmtrain.config import load_config
from llmtrain.data.shards import FileInfo
from llmtrain.engine import Fragment, make_engine
from llmtrain.errors import CorruptError, LlmtrainError, UserError
from llmtrain.health.agreement import together
from tests.checkpoint.conftest import Rank, Ranks
from tests.checkpoint.test_format import write


@given(st.lists(st.integers(0, 10**12), max_size=40), st.integers(1, 9))
def test_every_file_is_one_ranks_and_none_reads_much_more_than_another(sizes: list[int], ranks: int) -> None:
    files = [FileInfo(path=f"{index}", bytes=size, sha256="0" * 64) for index, size in enumerate(sizes)]
    shares = share(files, ranks)
    assert sorted(file.path for mine in shares for file in mine) == sorted(file.path for file in files)
    loads = [sum(file.bytes for file in mine) for mine in shares]
    # Who has most was the least loaded when it got its last, smallest file: so it is ahead by that file at most.
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_one_process_checks_everything_too(trained_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained_run, tmp_path / "run", symlinks=True))
    with (folder / "step-00000030" / "rank00000.safetensors").open("r+b") as file:
        file.truncate(10)
    said: list[str] = []
    seen: list[CheckpointReader] = []
    with closing(make_engine(60.0)) as engine:
        assemble(load_config(folder / "config.yaml"), engine)
        restorer = Restorer(engine, 60.0, lambda: False, CheckpointReader)
        reader = restorer.restore(lambda one: choose_checkpoint(folder, "auto", said.append, one), seen.append)
        assert reader is not None and reader.manifest.step == 20
        assert len(said) == 1 and "step-00000030/rank00000.safetensors" in said[0]
        assert [one.manifest.step for one in seen] == [30, 20]
        wanted = [Fragment(f.name, f.shape, 0, torch.empty_like(f.values)) for f in engine.to_fill(optimizer=False)]
        assert not reader.load(wanted, ())
        assert all(
            torch.equal(a.values, b.values) for a, b in zip(wanted, engine.to_fill(optimizer=False), strict=True)
        )
        (folder / "step-00000010" / "state.json").unlink()
        with pytest.raises(CorruptError, match=r"step-00000010/state\.json"):
            restorer.restore(
                lambda one: choose_checkpoint(tmp_path / "new", str(folder / "step-00000010"), print, one), print
            )


VALUES = torch.arange(1.0, 41.0)


class Loader(Rank):
    """What loading uses beside that: each of two ranks wants a half."""

    def __init__(self, rank: int, ranks: Ranks, names: tuple[str, ...] = ("model/w",)):
        super().__init__(rank, ranks)
        self._names, self.state = names, torch.zeros(20)

    def to_fill(self, *, optimizer: bool = True) -> list[Fragment]:
        return [Fragment(name, (40,), 20 * self.rank, self.state) for name in self._names]


class Poor(Loader):
    """Has no memory for what is to be filled."""

    def to_fill(self, *, optimizer: bool = True) -> list[Fragment]:
        raise torch.OutOfMemoryError("not enough")


def save_two(run_dir: Path, steps: list[int]) -> None:
    for step in steps:
        halves = [[Fragment("model/w", (40,), begin, VALUES[begin : begin + 20].clone())] for begin in (0, 20)]
        write(run_dir / f"step-{step:08d}", halves, step)


def restored(engines: list[Any], run_dir: Path, timeout_s: float = 60.0, said: Any = print) -> list[Any]:
    """What each rank gets, or how it fails, after `together`."""

    def run(engine: Any) -> Any:
        restorer = Restorer(engine, timeout_s, lambda: False, CheckpointReader)
        try:
            return together(
                engine, lambda: restorer.restore(lambda one: newest_good(run_dir, said, one), lambda _reader: None)
            )
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, engines))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the name of an open file on Linux only")
def test_a_rank_whose_storage_hung_for_too_long_and_came_back_does_not_say_that_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest is given up though it could be read in the end; half of it would be missing."""
    save_two(tmp_path, [1, 2])
    read_into, hung = DirectFile.read_into, list[str]()

    def read_slowly(self: DirectFile, memory: memoryview) -> int:
        path = Path(f"/proc/self/fd/{self.descriptor}").resolve()
        if path.parent.name == "step-00000002":
            if path.name == "rank00000.safetensors":
                time.sleep(0.3)  # slow, but it moves
            elif not hung:
                hung.append(path.name)
                time.sleep(1.5)
        return read_into(self, memory)

    monkeypatch.setattr(restore, "_ROUND_S", 0.1)
    monkeypatch.setattr(direct_io, "PIECE_BYTES", 16)
    monkeypatch.setattr(DirectFile, "read_into", read_slowly)
    ranks, said = Ranks(2), list[str]()
    engines = [Loader(0, ranks), Loader(1, ranks)]
    readers = restored(engines, tmp_path, timeout_s=1.0, said=said.append)
    assert [reader.manifest.step for reader in readers] == [1, 1]
    assert torch.equal(torch.cat([engine.state for engine in engines]), VALUES)
    assert len(said) == 1 and "nothing could be read from it for 1 s (rank 1" in said[0]


def test_what_does_not_fit_is_no_damage(tmp_path: Path) -> None:
    """No older checkpoint is tried, for it would not fit either, or worse: it would."""
    save_two(tmp_path, [1, 2])
    ranks, said = Ranks(2), list[str]()
    names = ("model/w", "optimizer/w/momentum_buffer")
    failures = restored([Loader(0, ranks, names), Loader(1, ranks, names)], tmp_path, said=said.append)
    assert [type(failure) for failure in failures] == [UserError, UserError]
    assert all("holds no 'optimizer/w/momentum_buffer'" in str(failure) for failure in failures)
    assert not said


@pytest.mark.parametrize("poor", [(0,), (1,), (0, 1)])
def test_a_rank_without_memory_for_the_state_ends_all_at_the_same_place(tmp_path: Path, poor: tuple[int, ...]) -> None:
    save_two(tmp_path, [1, 2])
    ranks = Ranks(2)
    failures = restored([(Poor if rank in poor else Loader)(rank, ranks) for rank in (0, 1)], tmp_path)
    for rank, failure in enumerate(failures):
        assert isinstance(failure, torch.OutOfMemoryError if rank in poor else LlmtrainError)
        assert "not enough" in str(failure)
