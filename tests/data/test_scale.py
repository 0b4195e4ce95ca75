"""Ten trillion tokens: sparse files that are really opened and read, in memory that does not grow with them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import ROOT
from benchmarks.synthetic import write_manifest, write_virtual_data
from llmtrain.data import documents, reading
from llmtrain.data.batches import Layout, Windows, batches, plain_order
from llmtrain.data.reading import MAPPED_BYTES
from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import SAMPLED_SHARDS, TokenDataset, TokenStream

TOKENS, SHARD = 10**13, 1 << 36  # 20 TB in 146 files of 137 GB
LENGTH, BATCH = 1000, 8  # windows then begin anywhere in a page, and lie across shards
STEPS = (0, 1, 10**6, 10**7)


@pytest.fixture(scope="module")
def virtual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holes, but for the windows of some steps, in which every token says where it is: its position modulo 250."""
    folder = tmp_path_factory.mktemp("scale") / "data"
    try:
        write_virtual_data(folder, TOKENS, SHARD)
    except OSError as error:  # a file system without sparse files, or with small ones
        pytest.skip(f"no file of {2 * SHARD} bytes here: {error}")
    windows = Windows(TokenDataset(folder).split("train"), LENGTH, LENGTH)
    order = plain_order(len(windows), 1)
    for step in STEPS:
        for window in order(np.arange(BATCH * step, BATCH * (step + 1))).tolist():
            write_positions(folder, window * LENGTH)
    return folder


def write_positions(folder: Path, start: int) -> None:
    positions = np.arange(start, start + LENGTH + 1)
    for shard in np.unique(positions // SHARD).tolist():  # may be two
        here = positions[positions // SHARD == shard]
        with (folder / f"train-{shard:05d}.bin").open("r+b") as file:
            file.seek(2 * int(here[0] - shard * SHARD))
            file.write((here % 250 + 1).astype("<u2").tobytes())


def open_windows(folder: Path) -> Windows:
    return Windows(TokenDataset(folder).split("train"), LENGTH, LENGTH)


def test_batches_of_ten_trillion_tokens_are_those_of_the_order_at_any_step(virtual: Path) -> None:
    windows = open_windows(virtual)
    assert len(windows) == (TOKENS - 1) // LENGTH
    layout, order = Layout(len(windows), BATCH, BATCH), plain_order(len(windows), 1)
    for step in STEPS:
        batch = next(batches(windows, layout, order, position=layout.position_after(0, step)))
        ((tokens, is_last),) = batch.micro_batches()
        ids = order(np.arange(BATCH * step, BATCH * (step + 1)))
        positions = ids[:, None] * LENGTH + np.arange(LENGTH + 1)
        assert is_last
        assert tokens.tolist() == (positions % 250 + 1).tolist()


@pytest.mark.parametrize("tokens", [SHARD, 2 * SHARD])
def test_windows_of_files_too_large_to_be_mapped_are_whole(tmp_path: Path, tokens: int) -> None:
    """One file of a hundred gigabytes, and a window that lies in two."""
    folder = write_virtual_data(tmp_path / "data", tokens, SHARD)
    windows = open_windows(folder)
    last = tokens // LENGTH // 2  # of two files, it begins before the end of the first
    for window in (17, last):
        write_positions(folder, window * LENGTH)
    assert last * LENGTH < tokens // 2 < (last + 1) * LENGTH
    positions = np.array([17, last])[:, None] * LENGTH + np.arange(LENGTH + 1)
    assert windows.gather(np.array([17, last])).tolist() == (positions % 250 + 1).tolist()


MEASURE = """
import json, sys
from itertools import islice
from pathlib import Path
import numpy as np
from benchmarks.peer_drivers.delivery import own_bytes
from llmtrain.data.batches import Layout, Windows, batches, plain_order
from llmtrain.data.shards import TokenDataset

def deliver(folder, count):
    windows = Windows(TokenDataset(folder).split("train"), 1000, 1000)
    stream = batches(windows, Layout(len(windows), 8, 8), plain_order(len(windows), 1), position=0)
    for batch in islice(stream, count):
        for tokens, _ in batch.micro_batches():
            assert tokens.shape == (8, 1001)
    return stream

growth = []
for folder in sys.argv[1:]:
    deliver(folder, 100)  # what is imported and allocated once
    before = own_bytes()
    stream = deliver(folder, 2500)
    growth.append(own_bytes() - before)
    del stream  # or what it had mapped counts as held before the next
print(json.dumps(growth))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux")
def test_memory_does_not_grow_with_the_tokens_nor_with_what_was_read_of_them(virtual: Path, tmp_path: Path) -> None:
    """20,000 windows from all over 20 TB: mapped, they would take a page of page tables each, 80 MB.

    And from all over 4 GB, nearly as much as is mapped, where they do take them: 7.8 MB.
    """
    sizes = {"small": 10**8, "mapped": 2 * 10**9}
    assert 0.9 * MAPPED_BYTES < 2 * sizes["mapped"] < MAPPED_BYTES
    folders = [write_virtual_data(tmp_path / name, tokens, SHARD) for name, tokens in sizes.items()] + [virtual]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    small, mapped, large = json.loads(done.stdout)
    assert max(mapped, large) < small + 8_000_000


def test_no_more_files_are_open_than_allowed_and_each_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "OPEN_FILES", 4)
    writer = ShardWriter(tmp_path, "train", "uint16", 10)
    writer.append(np.arange(500), np.array([500]), 500)
    stream = TokenStream(tmp_path, writer.close(), "uint16", 500)

    def opened() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]  # not that of the listing itself
        return sum(link.resolve().is_relative_to(tmp_path) for link in links)

    starts = np.random.default_rng(0).integers(0, 480, 300)
    for part in np.split(starts, 30):
        assert stream.gather(part, 20).tolist() == [list(range(start, start + 20)) for start in part.tolist()]
        assert 0 < opened() <= 4
    del stream
    assert opened() == 0


MANY_FILES = """
import resource, sys
import numpy as np
from pathlib import Path
from llmtrain.data.shards import TokenDataset
hard = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
streams = [TokenDataset(Path(sys.argv[1])).split("train") for _ in range(2)]
for stream in streams:
    print(stream.gather(np.arange(0, 480, 10), 20).sum())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is raised on Linux only")
def test_several_sources_of_many_shards_raise_the_limit_on_open_files_or_say_so(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", "uint16", 10)
    writer.append(np.arange(500), np.array([500]), 500)
    write_manifest(tmp_path, 500, {"train": writer.close()})

    def read(hard: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", MANY_FILES, str(tmp_path), str(hard)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    raised = read(1024)
    assert raised.returncode == 0 and len(set(raised.stdout.split())) == 1, raised.stderr
    refused = read(64)
    assert "UserError: " in refused.stderr and "raise the limit on open files (ulimit -n)" in refused.stderr


def test_a_stream_that_was_sent_to_another_process_opens_its_files_there(tmp_path: Path) -> None:
    for shard_tokens in (30, 1000):
        folder = tmp_path / str(shard_tokens)
        folder.mkdir()
        writer = ShardWriter(folder, "train", "uint16", shard_tokens)
        writer.append(np.arange(500), np.array([500]), 500)
        stream = TokenStream(folder, writer.close(), "uint16", 500)
        rows = stream.gather(np.array([3, 400]), 50)
        sent = pickle.dumps(stream)
        assert np.arange(30, dtype=np.uint16).tobytes() not in sent  # the ids stay where they are
        assert (pickle.loads(sent).gather(np.array([3, 400]), 50) == rows).all()


def test_where_documents_end_is_looked_at_in_so_many_shards_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter(tmp_path, "train", "uint16", 10)
    ids = np.zeros(3000, np.uint16)
    ids[9::10] = 257
    writer.append(ids, np.full(300, 10), 3000)
    data = TokenDataset(write_manifest(tmp_path, 259, {"train": writer.close()}))
    looked_at = list[int]()
    shard_ends = documents.shard_ends

    def noting(data: TokenDataset, split: str, number: int) -> documents.Int64s:
        looked_at.append(number)
        return shard_ends(data, split, number)

    monkeypatch.setattr(documents, "shard_ends", noting)
    assert documents.document_end(data) == 257
    assert looked_at == list(range(0, 300, 10))
    assert len(looked_at) <= SAMPLED_SHARDS
