"""Parts: however an input is dealt out, killed and run again, the result is byte for byte that of one process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain import __version__
from llmtrain.data import join, parts, plan
from llmtrain.data.corpus import BEGINNING, Position
from llmtrain.data.encode import Encoded
from llmtrain.data.journal import JoinJournal
from llmtrain.data.lock import FileLock
from llmtrain.data.parts import numbers_as_ranges, prepare_part
from llmtrain.data.plan import PartsFolder, cut_evenly
from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import read_manifest, verify_files
from llmtrain.data.staging import Say, make_once
from llmtrain.data.survey import Outline
from llmtrain.errors import UserError
from llmtrain.prepare import Options, main, prepare
from tests.data.inputs import content, every_kind_of_file, lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Every kind of file, a few hundred documents."""
    return every_kind_of_file(tmp_path / "texts", 150, 95)


def run_parts(options: Options, numbers: list[int], count: int | None = None, say: Say = print) -> list[Any]:
    return [prepare_part(options, number, count or len(numbers), say=say) for number in numbers]


@pytest.mark.parametrize("tokenizer", ["char", "bbpe"])
@pytest.mark.parametrize("order", [[1], [2, 1], [2, 3, 1], [7, 1, 6, 2, 5, 3, 4], [*range(40, 0, -1)]], ids=len)
def test_the_result_is_byte_for_byte_that_of_one_process(texts, tmp_path, small_chunks, tokenizer, order):
    vocab_size = 300 if tokenizer == "bbpe" else None
    options = Options((str(texts),), tmp_path / "one", tokenizer, vocab_size, shard_tokens=1000, workers=1)
    whole = prepare(options).manifest
    assert len(whole.splits["train"].shards) > 9
    said: list[str] = []
    *parts, joined = run_parts(replace(options, out=tmp_path / "parts"), order, say=said.append)
    assert [part.missing for part in parts] == [sorted(order[i + 1 :]) for i in range(len(parts))]
    assert joined.manifest == whole
    assert content(tmp_path / "parts") == content(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "parts", "texts"]
    assert said == []
    assert verify_files(tmp_path / "parts", whole.files()) == []
    if 1 < len(order) < 10:
        assert all(part.encoded.splits["train"].tokens for part in parts)
    if len(order) == 40:
        assert 0 in {part.encoded.splits["train"].tokens for part in parts}


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["char", "bbpe"])
def test_the_number_of_workers_of_a_part_does_not_change_a_byte(tmp_path, tokenizer):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(40_000, name))  # each of several real chunks
    vocab_size = 300 if tokenizer == "bbpe" else None
    inputs = (f"{tmp_path}/*.jsonl",)
    options = Options(inputs, tmp_path / "one", tokenizer, vocab_size, shard_tokens=1_000_000, workers=1)
    prepare(options)
    run_parts(replace(options, out=tmp_path / "parts", workers=2), [3, 1, 2])
    assert content(tmp_path / "parts") == content(tmp_path / "one")


def test_skipped_unknown_and_augmented_text_is_counted_as_in_one_process(texts, tmp_path, small_chunks):
    (texts / "h.jsonl").write_bytes(lines(20) + b"bad\n" + lines(20) + b'{"text": ""}\n')
    (texts / "i.bin").write_bytes(b"\0")
    (texts / "j.txt").write_text("abc" * 300 + "xyz\u2603")
    options = Options(
        (str(texts),), tmp_path / "one", "char", skip_bad=True, augment=("case",), val_split=0.01, val_by="tail"
    )
    recipe = prepare(options).manifest.recipe
    assert recipe["skipped"] == {"bad lines": 1, "binary files": 1, "empty documents": 1}
    assert recipe["unknown_tokens"]["val"] > 0
    run_parts(replace(options, out=tmp_path / "parts"), [1, 2, 3, 4])
    assert content(tmp_path / "parts") == content(tmp_path / "one")


def test_no_validation_split_and_no_text_in_some_part(tmp_path, small_chunks):
    (tmp_path / "a.jsonl").write_bytes(lines(60))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": ""}\n' * 2000)
    options = Options((f"{tmp_path}/*.jsonl",), tmp_path / "one", "byte", val_split=0)
    prepare(options)
    outcomes = run_parts(replace(options, out=tmp_path / "parts"), [1, 2, 3, 4, 5])
    assert outcomes[3].encoded.splits["train"].tokens == 0
    assert content(tmp_path / "parts") == content(tmp_path / "one")


@settings(max_examples=60)
@given(data=st.data())
def test_joined_shards_are_those_of_one_writer(tmp_path_factory, data):
    lengths = data.draw(st.lists(st.integers(1, 9), max_size=25), "documents")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=4), "cuts"))
    of_parts, of_result = (data.draw(st.integers(1, 30), what) for what in ("shards of parts", "shards of the result"))
    folder = tmp_path_factory.mktemp("join")

    def write(name: str, documents: range, shard_tokens: int) -> tuple[Path, Encoded]:
        (folder / name).mkdir()
        writer = ShardWriter(folder / name, "train", "uint16", shard_tokens)
        for i in documents:
            writer.append(np.full(lengths[i], i), np.array([lengths[i]]), 2)
        sources = {"train": dict(Counter(i % 3 for i in documents))}
        return folder / name, Encoded(splits={"train": writer.close()}, skipped={}, unknown={}, sources=sources)

    bounds = [0, *cuts, len(lengths)]
    stretches = [range(first, end) for first, end in pairwise(bounds)]
    parts = [write(f"part{i}", stretch, of_parts) for i, stretch in enumerate(stretches)]
    expected_folder, expected = write("expected", range(len(lengths)), of_result)
    (folder / "joined").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "COPY_TOKENS", data.draw(st.integers(1, 20), "tokens copied at once"))
        journal = JoinJournal(folder / "journal", folder / "joined", "", print)
        joined = join.join_parts(
            parts, "uint16", folder=folder / "joined", journal=journal, shard_tokens=of_result, workers=1,
            report=lambda *_: None,
        )  # fmt: skip
    assert joined == expected
    assert content(folder / "joined") == content(expected_folder)


def test_a_join_goes_on_without_the_parts_that_it_no_longer_needs_and_makes_a_damaged_shard_again(
    texts, tmp_path, small_chunks, monkeypatch
):
    options = Options((str(texts),), tmp_path / "out", "byte", val_split=0, shard_tokens=3000, workers=1)
    last = len(prepare(replace(options, out=tmp_path / "one")).manifest.splits["train"].shards) - 1
    run_parts(options, [1, 2], 3)
    copy = join._ShardCopier.__call__

    def stopped_at_the_last(copier, item):
        if item[1] == last:
            raise KeyboardInterrupt
        return copy(copier, item)

    monkeypatch.setattr(join._ShardCopier, "__call__", stopped_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        prepare_part(options, 3, 3, say=print)
    (left,) = (tmp_path / "out.parts").glob("joined.partial-*")
    (left / "data" / "train-00001.bin").write_bytes(b"damaged")
    made, read, told = list[int](), list[int](), list[str]()
    read_part = PartsFolder.read_part

    def reading(self, number, count, report=None):
        read.extend([number] if report else [])
        return read_part(self, number, count, report)

    def copying(copier, item):
        made.append(item[1])
        return copy(copier, item)

    monkeypatch.setattr(PartsFolder, "read_part", reading)
    monkeypatch.setattr(join._ShardCopier, "__call__", copying)
    prepare_part(options, None, None, say=told.append)
    assert any(f"going on behind {last} joined shards" in line for line in told)
    assert made == [1, last] and read == [1, 3]
    assert content(tmp_path / "out") == content(tmp_path / "one")


@given(sizes=st.lists(st.integers(0, 50), max_size=40), parts=st.integers(1, 12))
def test_stretches_are_all_chunks_in_order_and_of_about_the_same_size(sizes, parts):
    outlines = [Outline(Position(place=i), size) for i, size in enumerate(sizes)]
    stretches = cut_evenly(iter(outlines), sum(sizes), parts)
    assert len(stretches) == parts
    taken = [place for s in stretches if s.chunks for place in range(s.start.place, s.start.place + s.chunks)]
    assert taken == list(range(len(sizes)))
    assert all(s.start == BEGINNING for s in stretches if not s.chunks)
    assert all(abs(s.source_bytes - sum(sizes) / parts) <= max(sizes, default=0) for s in stretches)
    assert sum(s.source_bytes for s in stretches) == sum(sizes)


def test_numbers_are_told_short():
    assert numbers_as_ranges([1, 3, 4, 5, 8]) == "1, 3-5, 8"
    assert numbers_as_ranges([]) == ""


def command(tmp_path: Path, *arguments: object) -> list[str]:
    return [*map(str, arguments), "--input", str(tmp_path / "texts"), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "2/3", "--tokenizer", "byte"], "begun with --tokenizer char, not byte"),
        (["--part", "2/4", "--tokenizer", "char"], "begun in 3 parts, not 4"),
        (["--part", "2/3", "--tokenizer", "char", "--seed", "5"], "begun with --seed 1337, not 5"),
        (["--part", "2/3", "--tokenizer", "char", "--input", "more"], "begun with --input"),
        (["--join", "--tokenizer", "byte"], "begun with --tokenizer char, not byte"),
        (["--join", "--tokenizer", "char"], "parts missing of 3: 2-3; run them, with the same options and --part 2/3"),
        (["--join", "--part", "1/3"], "--part and --join: a part joins by itself"),
        (["--part", "0/3"], "argument --part: must be I/N with I from 1 to N, such as 3/16, not '0/3'"),
        (["--part", "4/3"], "must be I/N with I from 1 to N"),
        (["--part", "1/"], "must be I/N with I from 1 to N"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(texts, tmp_path, call, arguments, message):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("more text " * 99)
    arguments = [str(tmp_path / "more") if argument == "more" else argument for argument in arguments]
    assert call(main, *command(tmp_path, "--part", "1/3", "--tokenizer", "char"))[0] == 0
    before = content(tmp_path / "out.parts")
    code, out, err = call(main, *command(tmp_path, *arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("llmtrain: error: ") and message in err
    assert content(tmp_path / "out.parts") == before
    # What was refused spoiled nothing.
    for number in (2, 3):
        assert call(main, *command(tmp_path, "--part", f"{number}/3", "--tokenizer", "char"))[0] == 0
    assert read_manifest(tmp_path / "out").tokenizer.kind == "char"


def test_changed_input_is_refused(texts, tmp_path, call):
    assert call(main, *command(tmp_path, "--part", "1/2", "--tokenizer", "byte"))[0] == 0
    (texts / "a.txt").write_text("changed")
    code, _, err = call(main, *command(tmp_path, "--part", "2/2", "--tokenizer", "byte"))
    assert code == 2 and "out.parts: the input was changed since; give all parts the same input and options" in err


def test_a_changed_tokenizer_file_and_another_llmtrain_are_refused(texts, tmp_path, call, monkeypatch):
    prepare(Options((str(texts),), tmp_path / "first", "bbpe", 300))
    file = tmp_path / "own.json"
    shutil.copy(tmp_path / "first" / "tokenizer" / "tokenizer.json", file)
    flags = ("--tokenizer", file)
    assert call(main, *command(tmp_path, "--part", "1/2", *flags))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(parts, "__version__", "9.0")
        code, _, err = call(main, *command(tmp_path, "--part", "2/2", *flags))
        assert code == 2 and f"it was begun by llmtrain {__version__}, this is 9.0" in err
    with monkeypatch.context() as patch:
        patch.setattr(plan, "READING", 9)
        code, _, err = call(main, *command(tmp_path, "--part", "2/2", *flags))
        assert code == 2 and "it was begun by a llmtrain that read the same files otherwise" in err
    file.write_bytes(file.read_bytes() + b" ")
    code, _, err = call(main, *command(tmp_path, "--part", "2/2", *flags))
    assert code == 2 and "the tokenizer file was changed since" in err


def test_nothing_to_join_is_refused(texts, tmp_path, call):
    code, _, err = call(main, *command(tmp_path, "--join"))
    assert code == 2 and "out.parts: no parts to join; make them with --part 1/N" in err
    assert not (tmp_path / "out.parts").exists()


def test_bad_input_of_a_part_is_one_clear_line_and_leaves_no_part(texts, tmp_path, call, small_chunks):
    (texts / "y.jsonl").write_bytes(lines(300) + b"{}\n")
    for number in (1, 2):
        assert call(main, *command(tmp_path, "--part", f"{number}/3", "--tokenizer", "byte"))[0] == 0
    code, out, err = call(main, *command(tmp_path, "--part", "3/3", "--tokenizer", "byte"))
    assert (code, out) == (2, "")
    assert "y.jsonl: line 301: no field 'text'" in err and err.count("\n") == 1
    assert PartsFolder(tmp_path / "out").missing(3) == [3]
    assert not list((tmp_path / "out.parts").glob("*.partial-*"))


DAMAGES = ["bytes", "truncated", "record", "counts", "splits", "outside", "other plan", "tokenizer"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_named_and_not_joined(texts, tmp_path, call, damage):
    options = Options((str(texts),), tmp_path / "out", "char")
    run_parts(options, [1, 2], count=3)
    folder = PartsFolder(tmp_path / "out")
    part = folder.part(2, 3)
    record = json.loads((part / "part.json").read_text())
    if damage == "bytes":
        data = bytearray((part / "train-00000.bin").read_bytes())
        data[7] ^= 1
        (part / "train-00000.bin").write_bytes(data)
        message = f"{part}/train-00000.bin: content differs from the hash in the manifest; delete {part} and run that"
    elif damage == "truncated":
        os.truncate(part / "val-00000.ends", 1)
        message = f"{part}/val-00000.ends: has 1 bytes where"
    elif damage == "record":
        (part / "part.json").write_text("{}")
        message = f"{part}/part.json: damaged (plan_sha256: Field required); delete {part} and run that part again"
    elif damage == "counts":
        record["encoded"]["splits"]["train"]["tokens"] += 1
        (part / "part.json").write_text(json.dumps(record))
        message = f"{part}/part.json: damaged (a split counts"
    elif damage == "splits":
        del record["encoded"]["splits"]["val"]
        (part / "part.json").write_text(json.dumps(record))
        message = f"{part}: has other splits than {folder.part(1, 3)}"
    elif damage == "outside":
        record["encoded"]["splits"]["train"]["shards"][0]["ids"]["path"] = "../../texts/a.txt"
        (part / "part.json").write_text(json.dumps(record))
        message = "names '../../texts/a.txt', which lies outside the folder"
    elif damage == "other plan":
        (part / "part.json").write_text(json.dumps({**record, "plan_sha256": "0" * 64}))
        message = f"{part}: was made by another plan"
    else:
        file = folder.tokenizer / "llmtrain_tokenizer.json"
        file.write_text(file.read_text().replace("a", "b"))
        message = f"delete {folder.path} and run all parts again"
    code, out, err = call(main, *command(tmp_path, "--part", "3/3", "--tokenizer", "char"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_done_does_nothing_and_says_so(texts, tmp_path, call):
    first = call(main, *command(tmp_path, "--part", "2/3", "--tokenizer", "char"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.parts").rglob("*")}
    code, out, err = call(main, *command(tmp_path, "--part", "2/3", "--tokenizer", "char"))
    assert (code, err) == (0, "") and first[1].startswith("part 2/3 done: ")
    assert out.startswith("part 2/3 was done already: ") and out.endswith("out still missing: part 1, 3\n")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out.parts").rglob("*")} == before
    code, out, _ = call(main, *command(tmp_path, "--part", "2/3", "--tokenizer", "char", "--json"))
    summary = json.loads(out)
    assert (summary["part"], summary["parts"], summary["missing"]) == (2, 3, [1, 3])


def test_parts_of_data_that_is_there_do_nothing_and_clean_up(texts, tmp_path, call):
    run_parts(Options((str(texts),), tmp_path / "out", "char"), [1, 2])
    before = content(tmp_path / "out")
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "part-00001-of-00002.lock").touch()
    code, out, _ = call(main, *command(tmp_path, "--part", "1/2", "--tokenizer", "char"))
    assert code == 0 and out.startswith("already prepared: ")
    assert not (tmp_path / "out.parts").exists()
    assert content(tmp_path / "out") == before


# Killed, restarted, at once.


def start(tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "llmtrain.prepare", *command(tmp_path, *arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


@contextmanager
def held_by_another_process(lock: Path) -> Iterator[subprocess.Popen[str]]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys, time, pathlib; from llmtrain.data.lock import FileLock\n"
        "lock = FileLock(pathlib.Path(sys.argv[1])); assert lock.acquire() is None; print('held', flush=True)\n"
        "time.sleep(120)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def two_days_ago(folder: Path) -> None:
    """Make it look abandoned."""
    then = time.time() - 2 * 86_400
    for path in (folder, *folder.iterdir()):
        os.utime(path, (then, then))


@pytest.mark.slow
def test_a_part_killed_in_the_middle_is_redone_alone(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "many.jsonl").write_bytes(lines(100_000))
    flags = ("--tokenizer", "word", "--vocab-size", "500", "--shard-tokens", "100000", "--workers", "2")
    assert start(tmp_path, *flags, "--part", "1/3").wait() == 0
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.parts").rglob("*")}
    process = start(tmp_path, *flags, "--part", "2/3")
    partial = "out.parts/part-00002-of-00003.partial-*"
    wait_until(lambda: list(tmp_path.glob(f"{partial}/data/train-*.bin")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = tmp_path.glob(partial)
    # As if it had run on another machine, which is all the same to whoever holds the lock of the part.
    abandoned = left.with_name("part-00002-of-00003.partial-elsewhere-1")
    left.rename(abandoned)
    two_days_ago(abandoned)
    assert PartsFolder(tmp_path / "out").missing(3) == [2, 3]
    again = start(tmp_path, *flags, "--part", "2/3")
    out, err = again.communicate()
    assert again.returncode == 0 and out.startswith("part 2/3 done: ")
    assert err == f"llmtrain: removed {abandoned}, which a killed process left unfinished\n"
    assert not abandoned.exists()
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in first.items() if path.is_file())
    assert start(tmp_path, *flags, "--part", "3/3").wait() == 0
    options = Options((str(tmp_path / "texts"),), tmp_path / "one", "word", 500, shard_tokens=100_000, workers=1)
    prepare(options)
    assert content(tmp_path / "out") == content(tmp_path / "one")


@pytest.mark.slow
def test_parts_that_start_at_once_fit_one_tokenizer_and_join_once(texts, tmp_path):
    processes = [start(tmp_path, "--tokenizer", "bbpe", "--part", f"{i}/4", "--json") for i in (1, 2, 3, 4)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ends
    told = [json.loads(out) for out, _ in ends]
    assert sum(summary.get("already_prepared") is False for summary in told) == 1
    prepare(Options((str(texts),), tmp_path / "one", "bbpe"))
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "texts"]


@pytest.mark.slow
def test_who_waits_for_the_tokenizer_says_so_and_takes_over_when_the_fitter_dies(texts, tmp_path):
    with held_by_another_process(tmp_path / "out.parts" / "plan.lock") as holder:
        abandoned, recent = (tmp_path / "out.parts" / f"plan.partial-elsewhere-{number}" for number in (1, 2))
        abandoned.mkdir()
        recent.mkdir()
        two_days_ago(abandoned)
        process = start(tmp_path, "--tokenizer", "char", "--part", "1/2")
        assert line_of(process).startswith(f"llmtrain: waiting: process {holder.pid} on ")
        assert not (tmp_path / "out.parts" / "plan").exists()
        holder.kill()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.startswith("part 1/2 done")
    assert "removed" in err and "plan.partial-elsewhere-1, which a killed process left unfinished" in err
    assert recent.exists()  # a lock may reach one machine only, so the work of another one may be under way


@pytest.mark.slow
def test_two_that_race_for_the_join_make_one_result(texts, tmp_path):
    options = Options((str(texts),), tmp_path / "out", "char", shard_tokens=1000)
    flags = ("--tokenizer", "char", "--shard-tokens", "1000")
    run_parts(options, [1, 2])
    expected = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    run_parts(options, [1], count=2)
    with held_by_another_process(tmp_path / "out.parts" / "joined.lock"):
        last = start(tmp_path, *flags, "--part", "2/2")
        assert " is joining the parts (" in line_of(last)
        joiner = start(tmp_path, *flags, "--join")
        assert " is joining the parts (" in line_of(joiner)
        shutil.copytree(tmp_path / "out.parts", tmp_path / "killed.parts")
    ends = [process.communicate(timeout=60) for process in (last, joiner)]
    assert [last.returncode, joiner.returncode] == [0, 0], ends
    assert sorted(out.partition(":")[0] for out, _ in ends) == ["already prepared", "prepared"]
    assert content(tmp_path / "out") == expected
    assert not (tmp_path / "out.parts").exists()

    # The copy is also what is left when the joiner is killed: in the middle, or before the very last rename.
    for left, number in (("joined.partial-elsewhere-7", None), ("joined", 1)):
        shutil.copytree(tmp_path / "killed.parts", tmp_path / "out.parts")
        shutil.move(tmp_path / "out", tmp_path / "out.parts" / left)
        (tmp_path / "out.parts" / left / "mark").touch()
        two_days_ago(tmp_path / "out.parts" / left)
        said: list[str] = []
        prepare_part(options, number, number and 2, say=said.append)
        assert ((tmp_path / "out" / "mark").exists(), len(said)) == ((True, 0) if left == "joined" else (False, 1))
        (tmp_path / "out" / "mark").unlink(missing_ok=True)
        assert content(tmp_path / "out") == expected
        assert not (tmp_path / "out.parts").exists()


def test_where_locks_do_not_reach_the_first_result_counts(tmp_path, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    out, said = tmp_path / "out", list[str]()
    living = tmp_path / "out.partial-elsewhere-1"
    living.mkdir()

    def make(what: str, then: Callable[[], None]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            (folder / "file").write_text(what)
            then()

        return write

    def another_process_is_faster() -> None:
        (tmp_path / "faster").mkdir()
        (tmp_path / "faster" / "file").write_text("faster")
        (tmp_path / "faster").rename(out)

    make_once(out, make("slower", another_process_is_faster), is_made=out.is_dir, say=said.append, task="making")
    assert (out / "file").read_text() == "faster"
    assert said == [f"{out}: another process was faster; its result is used"]
    assert living.exists()  # nobody knows whether its maker lives
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.lock", "out.partial-elsewhere-1"]


def test_a_failed_making_gives_the_lock_back(tmp_path):
    def fail(folder: Path) -> None:
        raise UserError("bad input")

    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(UserError, match="bad input"):
            make_once(out, fail, is_made=out.is_dir, say=print, task="making")
    assert FileLock(tmp_path / "out.lock").acquire() is None
    assert not out.exists()
