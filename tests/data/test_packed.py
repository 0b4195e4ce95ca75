"""The index of packed windows: made once for a machine, checked, and read without being held."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import ROOT
from benchmarks.synthetic import write_random_data
from llmtrain.data import reading
from llmtrain.data.packed import INDEX, PackedWindows, open_packed
from llmtrain.data.packing import GROUP
from llmtrain.data.shards import TokenDataset
from llmtrain.errors import CorruptError
from llmtrain.verify import main as verify
from tests.conftest import Call, is_one_clear_line
from tests.data.test_packing import END, dataset

SEQ_LEN = 24
BEFORE = {  # of `data`, by documents that are packed together
    GROUP: "a6a287f44b6b78f4f0408b71ef3bbdcf9d6bb7e35308f721718992cae679a057",
    7: "b6738408cd393ad16f8b3e77209cce01eeec684b36b381a15249e42a5d75737e",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture
def data(tmp_path: Path) -> TokenDataset:
    lengths = np.random.default_rng(3).geometric(1 / 12, 400).tolist()
    return dataset(tmp_path / "data", [*lengths[:-1], 9], 1000)


def opened(data: TokenDataset, seq_len: int = SEQ_LEN) -> PackedWindows:
    return open_packed(data, "train", seq_len, END, GROUP)


def everything(windows: PackedWindows) -> torch.Tensor:
    return windows.gather(np.arange(len(windows)))


def index_of(cache: Path) -> Path:
    (index,) = cache.glob(f"*/{INDEX}")
    return index.parent


def test_the_same_documents_are_packed_once_and_others_anew(
    data: TokenDataset, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = everything(opened(data))
    assert "packing 400 documents of" in capsys.readouterr().err
    (tmp_path / "data").rename(tmp_path / "moved")
    again = opened(TokenDataset(tmp_path / "moved"))
    assert capsys.readouterr().err == ""
    assert torch.equal(everything(again), first)
    opened(TokenDataset(tmp_path / "moved"), SEQ_LEN + 1)
    opened(dataset(tmp_path / "other", [5, 6, 7], 10))
    assert capsys.readouterr().err.count("packing") == 2
    assert len(list(cache.glob(f"*/{INDEX}"))) == 3


def test_a_run_that_was_saved_before_there_was_an_index_finds_the_same_digest(data: TokenDataset) -> None:
    """As it was computed then, from arrays in memory."""
    found = {group: open_packed(data, "train", SEQ_LEN, END, group).digest() for group in (GROUP, 7)}
    assert found == BEFORE


def test_what_is_mapped_and_what_is_read_is_the_same(data: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = opened(data)
    monkeypatch.setattr(reading, "MAPPED_BYTES", 0)
    read = opened(data)
    assert torch.equal(everything(read), everything(mapped))
    ids = np.arange(len(mapped))
    assert (read.count_targets(ids) == mapped.count_targets(ids)).all()
    assert read.digest() == mapped.digest()


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ("windows.bin", "pieces.bin") for damage in ("flip", "cut", "gone")]
    + [(INDEX, "flip"), (INDEX, "cut")],  # without it, nothing is there
)
def test_damage_is_told_with_what_to_delete_and_then_it_is_made_again(
    data: TokenDataset, cache: Path, call: Call, name: str, damage: str
) -> None:
    whole = everything(opened(data))
    file = index_of(cache) / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[0] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-9])
    with pytest.raises(CorruptError, match=rf"{name}: .*; delete {index_of(cache)}, which is made again"):
        opened(data)
    code, out, err = call(verify, data.path)
    if name == INDEX:  # whose is it?
        assert (code, err) == (0, "")
    else:
        assert code == 4 and f"FAIL  {index_of(cache) / name}: " in out and "delete that folder, which is made" in err
        assert f"ok    {data.path}: " in out
    shutil.rmtree(index_of(cache))
    assert torch.equal(everything(opened(data)), whole)
    assert call(verify, data.path)[0] == 0


def test_verify_says_nothing_of_the_index_of_other_data(
    data: TokenDataset, tmp_path: Path, cache: Path, call: Call
) -> None:
    opened(data)
    (index_of(cache) / "pieces.bin").write_bytes(b"")
    other = dataset(tmp_path / "other", [5, 6, 7], 10)
    assert call(verify, other.path)[0] == 0


@pytest.mark.parametrize("is_mapped", [True, False])
def test_what_is_damaged_while_it_is_read_is_an_error_or_a_window_and_nothing_else(
    data: TokenDataset, cache: Path, monkeypatch: pytest.MonkeyPatch, is_mapped: bool
) -> None:
    monkeypatch.setattr(reading, "MAPPED_BYTES", 1 << 32 if is_mapped else 0)
    windows = opened(data)
    shape, found = everything(windows).shape, 0
    for name in ("windows.bin", "pieces.bin"):
        file = index_of(cache) / name
        whole = file.read_bytes()
        for at in range(0, len(whole), 7):
            with file.open("r+b") as opened_file:  # in place, as it is mapped
                opened_file.seek(at)
                opened_file.write(bytes([whole[at] ^ 0x80]))
            try:
                assert everything(windows).shape == shape
            except CorruptError as error:
                found += 1
                assert "was changed since it was written; delete" in str(error)
            with file.open("r+b") as opened_file:
                opened_file.write(whole)
        os.truncate(file, len(whole) // 2)
        with pytest.raises(
            CorruptError, match=f"{name}: (was cut off|ended too early).*; delete .*, which is made again"
        ):
            everything(windows)  # and no SIGBUS
        file.write_bytes(whole)
    assert found > 50


def test_an_index_that_cannot_be_written_is_one_clear_line(data: TokenDataset, tmp_path: Path, call: Call) -> None:
    (tmp_path / "cache").write_text("in the way")
    code, _, err = call(lambda _: opened(data))
    assert code == 2 and is_one_clear_line(err) and "cache/packed" in err and "set LLMTRAIN_CACHE to another" in err


def test_an_index_that_has_no_room_is_refused_before_it_is_made(
    data: TokenDataset, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 9_000, 9_000))
    code, _, err = call(lambda _: opened(data))
    assert code == 2 and "has 0.0 MB free, and an index may take 0.0; data.packing: best_fit needs it" in err


MEASURE = """
import json, sys
import numpy as np
from benchmarks.peer_drivers.delivery import own_bytes
from llmtrain.data.packed import open_packed
from llmtrain.data.packing import GROUP
from llmtrain.data.shards import TokenDataset

growth = []
for folder in sys.argv[1:]:
    before = own_bytes()
    windows = open_packed(TokenDataset(folder), "train", 64, 0, GROUP)
    for begin in range(0, 20_000, 100):
        windows.gather(np.arange(begin, begin + 100) * 7919 % len(windows))
        windows.count_targets(np.arange(begin, begin + 100))
    growth.append(own_bytes() - before)
print(json.dumps(growth))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux")
def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    """Held, 2 million more would take 39 MB; while they are packed, there are 131,072 at a time."""
    small, large = (
        write_random_data(tmp_path / str(count), 8 * count, 500, document_tokens=8) for count in (200_000, 2_200_000)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for most in (16e6, 1e6):  # made, and found
        measured = subprocess.run(
            [sys.executable, "-c", MEASURE, str(small), str(large)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert measured.returncode == 0, measured.stderr
        _, growth = json.loads(measured.stdout)
        assert growth < most
