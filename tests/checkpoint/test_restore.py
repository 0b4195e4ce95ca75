"""Ranks share the work of checking a checkpoint: by bytes, each file once."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.assemble import assemble
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.restore import Restorer, share
from llmtrain.checkpoint.resume import choose_checkpoint
from llmtrain.config import load_config
from llmtrain.data.shards import FileInfo
from llmtrain.engine import Fragment, make_engine
from llmtrain.errors import CorruptError


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
        restorer = Restorer(engine, 60.0, lambda: False)
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
