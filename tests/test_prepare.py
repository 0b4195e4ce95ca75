"""prepare: the same bytes however it is run, whole or not at all, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llmtrain.data.corpus import CHUNK_BYTES, cut_into_chunks
from llmtrain.data.encode import Division
from llmtrain.data.fit import SAMPLE_BYTES
from llmtrain.data.shards import TokenDataset, verify_files
from llmtrain.data.split import AUGMENTATIONS, Picker, Splitter, augmented
from llmtrain.data.staging import staged_folder
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import UserError
from llmtrain.prepare import Options, main, prepare
from tests.data.inputs import content

COMMAND = [sys.executable, "-m", "llmtrain.prepare"]
ROOT = Path(__file__).parents[1]


def run(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False, **options
    )


def refused(*arguments: object, cwd: Path, out: str = "out") -> str:
    """Run the real command on bad input; check how it ends; return its one line."""
    before = {path for path in cwd.rglob("*")}
    result = run(*arguments, "--out", out, cwd=cwd)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("llmtrain: error: ")
    assert result.stdout == ""
    assert {path for path in cwd.rglob("*")} == before
    return result.stderr


def documents_of(folder: Path, split: str) -> list[str]:
    """The texts of a split, as its ids and tokenizer give them back."""
    data, tokenizer = TokenDataset(folder), load_tokenizer(folder / "tokenizer")
    stream = data.split(split)
    ids = stream.gather(np.array([0]), len(stream))[0]
    cuts = np.flatnonzero(ids == tokenizer.eos_id) + 1
    return [tokenizer.decode(part) for part in np.split(ids, cuts)[:-1]]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty documents of several kinds."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"Document {i}.\n" + f"line {i} é\n" * (i * 7 % 11 + 1))
    lines = [json.dumps({"text": f"line document {i}\n"}) for i in range(30)]
    (folder / "zz.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("tokenizer", ["char", "byte", "word", "bpe", "unigram", "bbpe"])
def test_every_document_is_in_exactly_one_split_and_comes_back(texts, tmp_path, tokenizer):
    outcome = prepare(Options((str(texts),), tmp_path / "out", tokenizer, shard_tokens=300))
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    source = [path.read_text() for path in sorted(texts.glob("*.txt"))] + [f"line document {i}\n" for i in range(30)]
    assert len(val) == 3
    if tokenizer not in ("char", "word"):  # which may have met unknown words or characters in validation
        assert sorted(train + val) == sorted(source)
    assert [text for text in source if text in set(train)] == train
    splits = outcome.manifest.splits
    assert splits["train"].documents + splits["val"].documents == 60
    assert splits["train"].text_bytes + splits["val"].text_bytes == sum(len(text.encode()) for text in source)
    assert len(splits["train"].shards) > 1
    assert verify_files(tmp_path / "out", outcome.manifest.files()) == []
    assert outcome.manifest.recipe["split_by"] == "document"


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["char", "bbpe"])
def test_the_number_of_workers_does_not_change_a_byte(texts, tmp_path, tokenizer):
    (texts / "0big.txt").write_text("A document that is larger than a chunk. é\n" * (CHUNK_BYTES // 40))
    (texts / "1many.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(30_000)))
    for workers in (1, 2, 3):
        options = Options((str(texts),), tmp_path / f"out{workers}", tokenizer, 500 if tokenizer == "bbpe" else None)
        prepare(replace(options, workers=workers))
    one = content(tmp_path / "out1")
    assert len(one) >= 6
    assert one == content(tmp_path / "out2") == content(tmp_path / "out3")


def test_one_document_is_split_at_its_tail_and_both_parts_join_up(tmp_path):
    text = "".join(f"sentence number {i} é.\n" for i in range(500))
    (tmp_path / "book.txt").write_text(text)
    outcome = prepare(Options((str(tmp_path / "book.txt"),), tmp_path / "out", "byte", val_split=0.1))
    (train,), (val,) = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert train + val == text
    assert abs(len(val) / len(text) - 0.1) < 0.001
    assert outcome.manifest.recipe["split_by"] == "tail"


def test_val_split_zero_has_no_validation_split(texts, tmp_path):
    assert set(prepare(Options((str(texts),), tmp_path / "out", "byte", val_split=0)).manifest.splits) == {"train"}


def test_the_tokenizer_is_fitted_on_training_text_only_and_unknown_characters_are_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc" * 100 + "xyz")
    main(
        [
            "--input",
            str(tmp_path / "a.txt"),
            "--tokenizer",
            "char",
            "--val-split",
            "0.01",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert "3 tokens of val are <unk>" in capsys.readouterr().out
    assert TokenDataset(tmp_path / "out").manifest.tokenizer.vocab_size == 5
    assert documents_of(tmp_path / "out", "val") == ["c\ufffd\ufffd\ufffd"]


@settings(max_examples=200, deadline=None)
@given(fraction=st.integers(1, 99).map(lambda percent: percent / 100), seed=st.integers(0, 9))
def test_the_picked_share_is_exact_from_the_first_stretch_on(fraction, seed):
    picker = Picker(fraction, seed)
    picked = [picker.picks(i) for i in range(1000)]
    counts = np.cumsum(picked)
    expected = np.arange(1, 1001) * fraction
    assert np.abs(counts - expected).max() <= 1 + 1e-9


def test_a_tiny_share_is_picked_too():
    assert not any(Picker(1e-9, 0).picks(i) for i in range(1000))
    assert all(Picker(1.0, 0).picks(i) for i in range(1000))


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=2), fraction=st.floats(0.001, 0.999))
def test_a_tail_split_loses_nothing_and_leaves_both_parts_something(text, fraction):
    train, val = Splitter(fraction, "tail", 0).divide(7, text)
    assert train + val == text
    assert train and val


def test_augmentation_adds_seeded_copies_to_training_only(texts, tmp_path):
    text = "Hello, World!  This is -- text.\n" * 20
    case, punctuation, whitespace = augmented(text, AUGMENTATIONS, 1, 0)
    assert case != text and case.lower() == text.lower()
    assert punctuation != text and len(punctuation) < len(text)
    assert whitespace != text and whitespace.split() == text.split()
    assert (
        augmented(text, AUGMENTATIONS, 1, 0) == [case, punctuation, whitespace] != augmented(text, AUGMENTATIONS, 2, 0)
    )
    plain = prepare(Options((str(texts),), tmp_path / "plain", "char")).manifest.splits
    options = Options((str(texts),), tmp_path / "more", "char", augment=AUGMENTATIONS)
    more = prepare(options).manifest.splits
    assert prepare(replace(options, out=tmp_path / "same", workers=2)).manifest.splits == more
    assert more["train"].documents == 4 * plain["train"].documents
    assert more["val"].text_bytes == plain["val"].text_bytes
    assert documents_of(tmp_path / "more", "train")[::4] == documents_of(tmp_path / "plain", "train")


def test_an_existing_tokenizer_prepares_other_text(texts, tmp_path):
    prepare(Options((str(texts),), tmp_path / "one", "bbpe", 300))
    (tmp_path / "b.txt").write_text("other text 日本語 " * 50)
    file = tmp_path / "one" / "tokenizer" / "tokenizer.json"
    other = prepare(Options((str(tmp_path / "b.txt"),), tmp_path / "two", str(file))).manifest
    assert other.tokenizer.vocab_size == 300
    assert "".join(documents_of(tmp_path / "two", "train")).startswith("other text 日本語")


@pytest.mark.slow
def test_the_same_command_twice_says_so_and_another_is_refused(texts, tmp_path):
    command = ("--input", texts, "--tokenizer", "char", "--out", "out")
    first = run(*command, "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["already_prepared"] is False
    before = content(tmp_path / "out")
    second = run(*command, "--workers", 2, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("already prepared: out")
    assert "next: llmtrain train --config configs/debug.yaml data.path=out" in second.stdout
    assert "holds data prepared from other input or options" in refused(
        *command[:2], "--tokenizer", "byte", cwd=tmp_path
    )
    (texts / "00.txt").write_text("changed")
    assert "other input or options" in refused(*command[:4], cwd=tmp_path)
    assert content(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "exists and is not data prepared here" in refused(*command[:4], cwd=tmp_path, out="mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "missing.txt"], "missing.txt: no such file or folder"),
        (["--input", "empty.txt"], "empty.txt: the file is empty"),
        (["--input", "blank.jsonl"], "no text in it (2 empty documents); name the field that has it by --text-field"),
        (
            ["--input", "blank.jsonl", "--text-field", "body", "--skip-bad"],
            "no text in it (2 bad lines); name the field that has it by --text-field",
        ),
        (["--input", "binary.dat"], "binary.dat: a binary file"),
        (["--input", "tokens.bin"], "tokens.bin: token ids belong to a tokenizer; name it"),
        (
            ["--input", "table.parquet"],
            "table.parquet: no column 'text' (it has: body, size; --text-field names another)",
        ),
        (["--input", "latin.txt"], "latin.txt: not UTF-8 (byte 0xe9 at offset 3)"),
        (["--input", "broken.jsonl"], "broken.jsonl: line 2: not JSON"),
        (["--input", "late.jsonl", "--workers", "2"], "late.jsonl: line 30: no field 'text'"),
        (["--input", "book.txt", "--vocab-size", "100000"], "the largest possible for bbpe is"),
        (["--input", "book.txt", "--tokenizer", "unigram", "--vocab-size", "9999"], "the largest possible for unigram"),
        (["--input", "book.txt", "--tokenizer", "none"], "unknown tokenizer 'none'"),
        (["--input", "book.txt", "--tokenizer", "book.json"], "book.json: no such tokenizer file"),
        (["--input", "letter.txt"], "too little text: the val split is empty"),
        (["--input", "book.txt", "--val-by", "document"], "too few to set 0.05 of them aside"),
        (["--input", "book.txt", "--val-split", "1"], "argument --val-split: must be at least 0 and under 1"),
        (["--input", "book.txt", "--workers", "0"], "argument --workers: must be a whole number of at least 1"),
        (["--input", "book.txt", "--augment", "rot13"], "no 'rot13'; there are case, punctuation, whitespace"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, arguments, message):
    files = {
        "empty.txt": b"",
        "blank.jsonl": b'{"text": ""}\n\n{"text": ""}\n',
        "binary.dat": b"\x7fELF\0\0",
        "tokens.bin": b"\x01\0\x02\0",
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "broken.jsonl": b'{"text": "a"}\n{"text": \n',
        "late.jsonl": b'{"text": "some text"}\n' * 29 + b"{}\n",
        "book.txt": b"It was a dark and stormy night. " * 50,
        "letter.txt": b"a",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    parquet.write_table(pa.table({"body": ["some text"], "size": [9]}), tmp_path / "table.parquet")
    assert message in refused(*arguments, cwd=tmp_path)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c", "d", "e", "f"]])
def test_a_tokenizer_is_fitted_on_a_sample_of_an_input_that_is_too_large(tmp_path, monkeypatch, names):
    monkeypatch.setitem(SAMPLE_BYTES, "word", 1000)
    monkeypatch.setattr(cut_into_chunks, "__defaults__", (1,))
    for name in names:
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i} " for i in range(2000)))
    manifest = prepare(Options((f"{tmp_path}/*.txt",), tmp_path / "out", "word")).manifest
    assert 100 < manifest.tokenizer.vocab_size < 500
    assert documents_of(tmp_path / "out", "train")[0].startswith(("a0 a1 ", "\ufffd \ufffd "))


def test_bad_records_are_skipped_and_counted_on_request(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_bytes(b'{"text": "good text"}\nbad\n{"text": "\xff"}\n{"text": "more"}\n')
    (tmp_path / "a" / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "a" / "b.bin").write_bytes(b"\0")
    result = run("--input", "a", "--tokenizer", "byte", "--skip-bad", "--out", "out", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["skipped"] == {"bad files": 1, "bad lines": 2, "binary files": 1}


def test_a_folder_that_cannot_be_made_is_one_clear_line(texts, tmp_path):
    out = "o" * 250  # itself no longer than a name may be, but with what marks it as unfinished
    problem = refused("--input", texts, "--tokenizer", "byte", cwd=tmp_path, out=out)
    assert f"{out}.parts/plan: cannot be read (File name too long)" in problem


@pytest.mark.parametrize("damage", ["truncated", "missing", "counts"])
def test_damaged_data_is_not_taken_for_prepared(texts, tmp_path, damage):
    command = ("--input", texts, "--tokenizer", "char")
    assert run(*command, "--out", "out", cwd=tmp_path).returncode == 0
    manifest = tmp_path / "out" / "manifest.json"
    if damage == "truncated":
        os.truncate(tmp_path / "out" / "train-00000.bin", 10)
    elif damage == "missing":
        (tmp_path / "out" / "val-00000.ends").unlink()
    else:
        content = json.loads(manifest.read_text())
        content["splits"]["train"]["tokens"] += 1
        manifest.write_text(json.dumps(content))
    assert "out: damaged; delete it or choose another --out (out/" in refused(*command, cwd=tmp_path)


def test_an_out_that_cannot_be_made_is_one_clear_line(texts, tmp_path):
    (tmp_path / "file").touch()
    assert "file/out.parts/plan.lock: cannot be written (Not a directory)" in refused(
        "--input", texts, "--tokenizer", "byte", cwd=tmp_path, out="file/out"
    )


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(texts, tmp_path):
    def at_most_64_kb_a_file() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    (texts / "0big.txt").write_text("much text " * 50_000)
    command = ("--input", texts, "--tokenizer", "byte", "--out", "out")
    result = run(*command, cwd=tmp_path, preexec_fn=at_most_64_kb_a_file)
    assert result.returncode == 2
    joined = tmp_path / "out.parts" / "joined"
    assert result.stderr == f"llmtrain: error: {joined}: cannot be written (File too large); nothing was kept\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


SLOW = [*COMMAND, "--input", "many.jsonl", "--tokenizer", "word", "--vocab-size", "500", "--out", "out"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def slow_command(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    """A prepare that is in the middle of its work with two workers."""
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"word {i} " * 60}) + "\n" for i in range(60_000)))
    process = subprocess.Popen(
        [*SLOW, *flags, "--workers", "2"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell ignores SIGINT for what it starts with `&`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 -- no other thread runs here
    )
    wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob("out.parts/*/data/train-*.bin")), process)
    return process


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def no_process_left(group: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_killed_prepare_leaves_no_out_and_no_process_and_the_next_one_cleans_up(tmp_path):
    process = slow_command(tmp_path)
    process.kill()
    process.communicate()
    assert no_process_left(process.pid)
    assert not (tmp_path / "out").exists()
    left = tmp_path / "out.parts"
    assert not list(left.rglob("manifest.json"))
    (tmp_path / "short.txt").write_text("text " * 100)
    again = run("--input", "short.txt", "--tokenizer", "byte", "--out", "out", cwd=tmp_path)
    removed = f"llmtrain: removed {left}, which was not finished: it was begun with --input many.jsonl, not short.txt\n"
    assert (again.returncode, again.stderr) == (0, removed)
    assert not left.exists()
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ends_by", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_behind_the_shards_that_are_finished(tmp_path, ends_by):
    shards = ("--shard-tokens", "100000")
    process = slow_command(tmp_path, *shards)
    journal = tmp_path / "out.parts" / f"joined.partial-{platform.node()}-kept" / "journal.jsonl"
    wait_until(lambda: journal.exists() and journal.stat().st_size > 0, process)
    os.killpg(process.pid, ends_by)
    _, errors = process.communicate(timeout=30)
    kept = f"llmtrain: what was finished is kept in {journal.parent}: the same command goes on from there\n"
    assert errors == (f"{kept}llmtrain: interrupted\n" if ends_by == signal.SIGINT else "")
    finished = journal.parent / "data" / "train-00000.bin"
    inode = finished.stat().st_ino

    again = subprocess.run(
        [*SLOW, *shards, "--workers", "1"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    told = rf"llmtrain: going on behind [0-9,]+ finished shards? in {finished.parent}; first the hashes are compared\n"
    assert re.fullmatch(told, again.stderr)
    assert (tmp_path / "out" / "train-00000.bin").stat().st_ino == inode
    whole = [*SLOW[:-1], "whole", *shards]
    subprocess.run(whole, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl", "out", "whole"]


@pytest.mark.parametrize("damage", ["finished shard", "open shard", "journal"])
def test_what_was_finished_and_then_damaged_is_named_and_stays(texts, tmp_path, damage):
    command = ("--input", texts, "--tokenizer", "byte", "--shard-tokens", "50", "--out", "out")
    (texts / "z.jsonl").write_bytes(b'{"text": "good"}\nbad\n')
    stopped = run(*command, cwd=tmp_path)
    assert stopped.returncode == 2
    partial = tmp_path / "out.parts" / f"joined.partial-{platform.node()}-kept"
    assert f"llmtrain: what was finished is kept in {partial}: the same command goes on from there\n" in stopped.stderr
    journal, open_shard = partial / "journal.jsonl", max((partial / "data").glob("train-*.bin"))
    damaged = {"finished shard": partial / "data" / "train-00000.bin", "open shard": open_shard, "journal": journal}
    data = bytearray(damaged[damage].read_bytes())
    data[0] ^= 1
    damaged[damage].write_bytes(data)
    before = content(partial)
    again = run(*command, cwd=tmp_path)
    assert again.returncode == 2
    assert f"llmtrain: error: {partial}: cannot be gone on with: " in again.stderr
    assert again.stderr.endswith("; mend that, or delete the folder to make it again\n")
    assert content(partial) == before


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_leaves_nothing(tmp_path):
    process = slow_command(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "llmtrain: interrupted\n")
    assert no_process_left(process.pid)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
def test_a_killed_worker_is_one_clear_line_and_leaves_nothing(tmp_path):
    process = slow_command(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.startswith("llmtrain: error: a worker process was killed")
    assert not list(tmp_path.glob("out*"))


UNGUARDED = """
from pathlib import Path
from llmtrain.prepare import Options, prepare
prepare(Options(inputs=("texts",), tokenizer="byte", out=Path("out"), workers=2))
"""


@pytest.mark.slow
def test_a_script_that_its_workers_import_is_told_what_is_wrong_with_it(texts, tmp_path):
    """Each of them would begin the same, and wait for the process that waits for it."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, "script.py"]
    result = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    assert 'put the call in your script under `if __name__ == "__main__":`' in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_partial_folder_of_a_living_process_is_left_alone(tmp_path):
    other = tmp_path / f"out.partial-{platform.node()}-{os.getppid()}"
    other.mkdir()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("y")
    assert other.exists()
    assert (tmp_path / "out" / "x").read_text() == "y"


def test_only_the_partial_folders_of_this_host_are_taken_for_abandoned(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours = tmp_path / f"out.partial-{platform.node()}-{ended.pid}"
    theirs = tmp_path / f"out.partial-{platform.node()}-2-{ended.pid}"
    for folder in (ours, theirs):
        folder.mkdir()
    with staged_folder(tmp_path / "out"):
        assert not ours.exists()
    assert theirs.exists()


def test_a_staged_folder_vanishes_when_its_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out"):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="cannot be written"), staged_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example_and_starts_without_torch(tmp_path):
    assert "example:\n  llmtrain prepare --input" in run("--help", cwd=tmp_path).stdout
    check = "import sys, llmtrain.prepare; assert not {'torch', 'pyarrow', 'sentencepiece', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_documents_are_divided_the_same_way_when_fitting_and_when_encoding():
    division = Division(None, Splitter(0.2, "document", 3), ("case",), 3)  # type: ignore[arg-type]
    for ordinal in range(50):
        parts = division.divide(ordinal, "Some text.")
        assert (parts["train"][:1] or parts["val"]) == ["Some text."]
        assert bool(parts["train"]) != bool(parts["val"])
