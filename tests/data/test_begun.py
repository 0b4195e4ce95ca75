"""What a prepare has begun is gone on with exactly, and never taken from a process that is at it."""

from __future__ import annotations

import fcntl
import gzip
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from llmtrain.data.filters import FILTERS, quality_filter
from llmtrain.data.lock import FileLock
from llmtrain.data.parts import prepare_all, prepare_part
from llmtrain.data.refine import Refinement
from llmtrain.data.staging import resumed_folder
from llmtrain.errors import UserError
from llmtrain.prepare import Options
from tests.data.inputs import content, lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def options(tmp_path: Path, small_chunks: None) -> Options:
    """A small input that comes to many shards."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(90, "line"))
    return Options((str(tmp_path / "texts"),), tmp_path / "out", "byte", shard_tokens=700, workers=1)


@pytest.fixture
def stop() -> Iterator[Counter[str]]:
    """A filter `stop` that keeps all, and is interrupted when it has looked `at` so many times."""
    calls = Counter[str]()

    @quality_filter("stop", 0, "")
    def keeps(text: str, value: float) -> bool:
        calls["made"] += 1
        if calls["made"] == calls["at"]:
            raise KeyboardInterrupt
        return True

    yield calls
    del FILTERS["stop"]


def every_kind_of_input(folder: Path) -> tuple[str, ...]:
    """Few bytes, but each kind is of several chunks, and what is to be counted is everywhere."""
    texts, hub = folder / "texts", folder / "hub"
    for path in (texts, hub):
        path.mkdir()
    for name in "abm":
        (texts / f"{name}.txt").write_text(f"Text of {name}.\n" * 60)
    (texts / "c.jsonl").write_bytes(lines(40, "plain") + b'bad\n{"text": ""}\n' + lines(40, "plain"))
    (texts / "d.jsonl.gz").write_bytes(gzip.compress(lines(40, "packed")) + gzip.compress(b"bad\n" + lines(9, "more")))
    (texts / "e.jsonl.zst").write_bytes(zstandard.compress(lines(50, "other")))
    rows = [f"row {i} é " * 9 for i in range(60)] + [""]
    parquet.write_table(pa.table({"text": rows}), texts / "g.parquet", row_group_size=20)
    # Larger than is taken at once, so its rows are read by whoever deals out the work:
    parquet.write_table(pa.table({"text": [5 * row for row in rows]}), texts / "h.parquet", row_group_size=41)
    (texts / "i.bin").write_bytes(b"\0")
    for number in range(2):
        parquet.write_table(pa.table({"text": [f"{number} {row}" for row in rows]}), hub / f"{number}.parquet")
    return str(texts), f"hf:{hub}"


@pytest.mark.slow
@pytest.mark.parametrize("part", [None, (2, 3)])
def test_interrupted_anywhere_the_documents_and_all_counts_are_those_of_one_go(tmp_path, small_chunks, stop, part):
    inputs = every_kind_of_input(tmp_path)
    refine = Refinement(normalize="nfc", min_chars=12, filters=(("stop", 0.0),))
    options = Options(inputs, tmp_path / "whole", "char", refine=refine, dedup=True, skip_bad=True, workers=1)
    options = replace(options, augment=("case",), shard_tokens=2500, val_split=0.1)

    def run(to: Options) -> Any:
        return prepare_part(to, *part, say=said.append) if part else prepare_all(to, say=said.append)

    said: list[str] = []
    run(options)
    calls = stop["made"]
    result = "whole.parts/part-00002-of-00003" if part else "whole"
    expected, again = content(tmp_path / result), replace(options, out=tmp_path / "again")
    went_on = 0
    for first_step in (17, 43, 101):
        for interrupted in itertools.count():
            # The first goes over all more than once, to make the plan, the others over what is left.
            at = first_step + 9 * interrupted if interrupted else calls - calls // (16 if part else 6)
            stop.update(made=-stop["made"], at=at - stop["at"])
            try:
                run(again)
                break
            except KeyboardInterrupt:
                assert interrupted < 200  # each gets a little further, so that it comes behind any shard
        went_on += interrupted
        made = tmp_path / result.replace("whole", "again")
        assert content(made) == expected, first_step
        for path in tmp_path.glob("again*"):
            shutil.rmtree(path)
    assert went_on > 3 and any("going on behind" in line for line in said)


def stopped_by_bad_line(options: Options) -> Path:
    """Begin, and leave what was finished; return where it is."""
    bad = Path(options.inputs[0]) / "z.jsonl"
    bad.write_bytes(b"bad\n")
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=print)
    (begun,) = (options.out.parent / "out.parts").glob("joined.partial-*/data")
    return begun


def test_finished_shards_are_not_given_up_for_other_options(options, tmp_path):
    begun = stopped_by_bad_line(options)
    before = content(begun)
    with pytest.raises(UserError, match="has finished shards, and it was begun with --seed 1337, not 7; give the same"):
        prepare_all(replace(options, seed=7), say=print)
    assert content(begun) == before


def test_a_plain_prepare_by_mistake_leaves_the_parts_that_are_done(options, tmp_path):
    prepare_part(options, 1, 3, say=print)
    before = content(tmp_path / "out.parts")
    with pytest.raises(UserError, match="it was begun in 3 parts, not 1"):
        prepare_all(options, say=print)
    assert content(tmp_path / "out.parts") == before


class At:
    """Another process that takes the locks of out.parts as it goes on with its work."""

    def __init__(self, options: Options):
        self.folder, self._options = options.out.parent / "out.parts", options
        self.folder.mkdir()
        self.plan, self.joined = FileLock(self.folder / "plan.lock"), FileLock(self.folder / "joined.lock")

    def make_plan(self) -> None:
        """As one that was stopped after it would have."""
        mine = replace(self._options, out=self._options.out.parent / "mine")
        prepare_part(mine, 1, 2, say=print)
        plan = json.loads((mine.out.parent / "mine.parts/plan/plan.json").read_text())
        plan["stretches"] = [{"chunks": None}]
        (mine.out.parent / "mine.parts/plan/plan.json").write_text(json.dumps(plan))
        (mine.out.parent / "mine.parts/plan").rename(self.folder / "plan")
        shutil.rmtree(mine.out.parent / "mine.parts")

    def encode(self) -> None:
        (self.folder / f"joined.partial-{platform.node()}" / "data").mkdir(parents=True)
        (self.folder / f"joined.partial-{platform.node()}" / "data" / "train-00000.bin").write_bytes(b"no whole shard")


def test_ctrl_c_of_one_that_waits_takes_nothing_from_the_one_that_works(options, tmp_path):
    other = At(options)
    other.make_plan()
    other.encode()
    assert other.joined.acquire() is None
    before = content(other.folder)

    def interrupt(line: str) -> None:
        assert line.startswith("waiting: process ")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_all(options, say=interrupt)
    assert content(other.folder) == before


def test_one_refused_for_other_options_takes_nothing_from_the_one_that_works(options, tmp_path):
    other = At(options)
    assert other.plan.acquire() is None
    with ExitStack() as later:

        def go_on(line: str) -> None:
            assert line.startswith("waiting: process ")
            other.make_plan()
            other.encode()
            later.callback(other.joined.release)
            assert other.joined.acquire() is None
            other.plan.release()

        with pytest.raises(UserError, match="begun with --seed 1337, not 5"):
            prepare_all(replace(options, seed=5), say=go_on)
        assert len(content(other.folder)) >= 5


def test_one_that_waits_takes_over_from_one_that_leaves_nothing(options, tmp_path):
    whole = replace(options, out=tmp_path / "whole")
    prepare_all(whole, say=print)
    other = At(options)
    other.make_plan()
    assert other.joined.acquire() is None

    def stop(line: str) -> None:
        assert line.startswith("waiting: process ")
        shutil.rmtree(other.folder)
        other.joined.release()

    prepare_all(options, say=stop)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not other.folder.exists()


def test_shards_that_another_plan_made_are_not_gone_on_with(options, tmp_path):
    begun = stopped_by_bad_line(options)
    shutil.rmtree(begun.parents[1] / "plan")  # by hand, or by one that was killed while it removed all
    (tmp_path / "texts" / "z.jsonl").unlink()
    options, said = replace(options, seed=5), list[str]()
    prepare_all(options, say=said.append)
    prepare_all(replace(options, out=tmp_path / "whole"), say=print)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert any("of another plan" in line for line in said)


def test_a_host_whose_name_begins_with_that_of_another_keeps_its_own(tmp_path, monkeypatch):
    for host in ("node-1234567", "node"):
        monkeypatch.setattr(platform, "node", lambda host=host: host)
        with (
            pytest.raises(KeyboardInterrupt),
            resumed_folder(tmp_path / "out", alone=True, reached=lambda _: 0, say=print) as folder,
        ):
            (folder.parent / "journal.jsonl").write_text("finished")
            raise KeyboardInterrupt
    assert len(list(tmp_path.glob("out.partial-*/journal.jsonl"))) == 2


def test_nobody_reading_what_is_told_does_not_end_the_work(options):
    stopped_by_bad_line(options)
    command = [sys.executable, "-m", "llmtrain.prepare", "--input", *options.inputs, "--out", str(options.out)]
    flags = ["--tokenizer", "byte", "--shard-tokens", "700", "--workers", "1"]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *flags], env=environment, cwd=ROOT, stderr=writer, check=False, timeout=120)
    os.close(writer)
    assert done.returncode == 2  # for the bad line once more, not for what could not be told before it


def test_a_lock_whose_file_was_removed_meanwhile_is_not_held(tmp_path, monkeypatch):
    held, waits, comes = (FileLock(tmp_path / "lock") for _ in range(3))
    assert held.acquire() is None
    lock_it = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if held.is_held:  # while the file is open in the one that waits, which takes the lock in it next
            (tmp_path / "lock").unlink()
            held.release()
        lock_it(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert waits.acquire() == f"process {os.getpid()} on {platform.node()}"
    assert comes.acquire() is None
    assert waits.acquire() is not None
    comes.release()
