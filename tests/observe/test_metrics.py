from __future__ import annotations

import csv
import itertools
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.observe.metrics import ARRAYS, RECORDS, TABLE, MetricsLog
from llmtrain.observe.record import COLUMNS, Record

ARRAY_NAMES = ["train_loss", "val_loss", "learning_rate", "epochs", "steps"]


def write(run_dir, records, *, resume_step=0, with_csv=True):
    log = MetricsLog(run_dir, csv=with_csv, resume_step=resume_step)
    for record in records:
        log.log(record)
    log.close()


def contents(run_dir):
    return {path.name: path.read_bytes() for path in run_dir.iterdir()}


def read_table(run_dir):
    with (run_dir / TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_three_files_say_the_same(tmp_path, make_record, strict_json):
    records = [make_record(step, val_loss=2.5 if step % 3 == 0 else None) for step in range(1, 8)]
    write(tmp_path, records)
    assert [Record.from_json(line) for line in (tmp_path / RECORDS).read_text().splitlines()] == records
    assert strict_json((tmp_path / ARRAYS).read_text()) == {
        "train_loss": [record.train_loss for record in records],
        "val_loss": [record.val_loss for record in records],
        "learning_rate": [record.learning_rate for record in records],
        "epochs": [record.epoch for record in records],
        "steps": [record.step for record in records],
    }
    table = read_table(tmp_path)
    assert tuple(table[0]) == COLUMNS
    assert [float(row["train_loss"]) for row in table] == [record.train_loss for record in records]
    assert [row["val_loss"] for row in table] == ["", "", "2.5", "", "", "2.5", ""]


def a_minute_each():
    """A clock on which a minute passes each time that it is looked at: records that come slowly."""
    return itertools.count(0.0, 60.0).__next__


def test_a_small_file_is_up_to_date_after_each_record(tmp_path, make_record, strict_json):
    log = MetricsLog(tmp_path, csv=False, resume_step=0, clock=a_minute_each())
    assert strict_json((tmp_path / ARRAYS).read_text()) == {name: [] for name in ARRAY_NAMES}
    for step in range(1, 5):
        log.log(make_record(step))
        assert strict_json((tmp_path / ARRAYS).read_text())["steps"] == list(range(1, step + 1))
    log.close()
    assert not (tmp_path / TABLE).exists()


def test_of_records_that_come_quickly_the_arrays_are_written_once_a_second(tmp_path, make_record, strict_json):
    now = [100.0]
    log = MetricsLog(tmp_path, csv=False, resume_step=0, clock=lambda: now[0])
    steps = []
    for step in range(1, 9):
        now[0] += 0.25
        log.log(make_record(step))
        steps.append(len(strict_json((tmp_path / ARRAYS).read_text())["steps"]))
    assert steps == [0, 0, 0, 4, 4, 4, 4, 8]
    now[0] += 0.25
    log.log(make_record(9))
    log.flush()
    assert strict_json((tmp_path / ARRAYS).read_text())["steps"] == list(range(1, 10))
    log.close()


def test_a_number_that_is_not_finite_is_null_everywhere(tmp_path, make_record, strict_json):
    write(tmp_path, [make_record(1, train_loss=math.nan, val_loss=math.inf, learning_rate=1e-5)])
    arrays = strict_json((tmp_path / ARRAYS).read_text())
    assert arrays["train_loss"] == arrays["val_loss"] == [None]
    assert arrays["learning_rate"] == [1e-5]
    assert strict_json((tmp_path / RECORDS).read_text())["train_loss"] is None
    assert read_table(tmp_path)[0]["train_loss"] == ""


@pytest.mark.parametrize("resume_step", [0, 1, 40, 45, 90, 200])
def test_a_resumed_run_leaves_the_files_of_one_never_interrupted(tmp_path, make_record, resume_step):
    records = [make_record(step) for step in range(10, 210, 10)]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    write(whole, records)
    write(resumed, [record for record in records if record.step <= 90])
    write(resumed, [record for record in records if record.step > min(resume_step, 90)], resume_step=resume_step)
    assert contents(resumed) == contents(whole)


def test_what_a_kill_tore_is_mended_on_resume(tmp_path, make_record):
    records = [make_record(step) for step in range(1, 11)]
    write(tmp_path, records)
    expected = contents(tmp_path)
    for name, end in ((RECORDS, b'{"step": 11, "epo'), (TABLE, b"11,0,2.")):
        with (tmp_path / name).open("ab") as file:
            file.write(end)
    (tmp_path / f".{ARRAYS}.tmp").write_bytes(b'{"train_loss": [2.')
    MetricsLog(tmp_path, csv=True, resume_step=10).close()
    assert contents(tmp_path) == expected


def test_the_views_are_made_again_from_the_records(tmp_path, make_record):
    write(tmp_path, [make_record(step) for step in range(1, 11)])
    expected = contents(tmp_path)
    (tmp_path / ARRAYS).unlink()
    (tmp_path / TABLE).write_text("nonsense")
    MetricsLog(tmp_path, csv=True, resume_step=10).close()
    assert contents(tmp_path) == expected


def test_files_of_others_are_left_alone(tmp_path, make_record):
    (tmp_path / "notes.jsonl").write_text('{"step": 99}\n')
    write(tmp_path, [make_record(1)])
    assert (tmp_path / "notes.jsonl").read_text() == '{"step": 99}\n'


@pytest.mark.slow
def test_a_flush_brings_a_large_file_up_to_date(tmp_path, make_record, strict_json):
    log = MetricsLog(tmp_path, csv=False, resume_step=0, clock=a_minute_each())
    behind = 0
    for step in range(1, 5001):
        log.log(make_record(step))
        if step > 4900:
            behind = max(behind, step - len(strict_json((tmp_path / ARRAYS).read_text())["steps"]))
    assert 0 < behind <= 0.02 * 5000  # at most 2 % of the run
    log.flush()
    assert strict_json((tmp_path / ARRAYS).read_text())["steps"] == list(range(1, 5001))
    log.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes written are counted by the Linux kernel")
def test_the_bytes_written_grow_linearly_with_the_records(tmp_path, make_record):
    def bytes_written() -> int:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["wchar"])

    log = MetricsLog(tmp_path, csv=True, resume_step=0, clock=a_minute_each())
    begin = bytes_written()
    for step in range(1, 10_001):
        log.log(make_record(step))
    ten_thousand = bytes_written() - begin
    for step in range(10_001, 100_001):
        log.log(make_record(step))
    hundred_thousand = bytes_written() - begin
    log.close()
    final = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert final > 20_000_000
    assert hundred_thousand < 20 * final  # rewriting with each record would be some 10,000 times
    assert hundred_thousand < 15 * ten_thousand  # linear is 10 times, quadratic 100 times


WRITER = """
import sys
from pathlib import Path
from llmtrain.observe.metrics import MetricsLog
from llmtrain.observe.record import Record
run_dir, resume_step = Path(sys.argv[1]), int(sys.argv[2])
log = MetricsLog(run_dir, csv=True, resume_step=resume_step)
print("ready", flush=True)
for step in range(resume_step + 1, 10**9):
    loss = 1 / step if step % 7 else float("nan")
    log.log(Record(step, 0, loss, None, None, 1e-3, 1.0, 1.0, step, 1.0, 1.0, None, 1.0, 1.0))
    if step % 3 == 0:
        log.flush()
"""


@pytest.mark.slow
def test_the_files_parse_after_a_kill_at_any_moment(tmp_path, strict_json):
    rng = random.Random(20)
    resume_step = 0
    for _ in range(25):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(resume_step)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        if rng.random() < 0.7:  # the others are killed while they start: before, in or after their rewind
            assert writer.stdout.readline() == "ready\n"
            enough = (tmp_path / RECORDS).stat().st_size + rng.randint(0, 60_000)
            while (tmp_path / RECORDS).stat().st_size < enough:
                time.sleep(random.uniform(0, 0.001))  # not of rng, or what follows would depend on the machine
        else:
            time.sleep(rng.uniform(0.02, 0.12))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        if not (tmp_path / ARRAYS).exists():
            continue
        arrays = strict_json((tmp_path / ARRAYS).read_bytes())
        assert list(arrays) == ARRAY_NAMES
        assert len({len(values) for values in arrays.values()}) == 1
        assert arrays["steps"] == list(range(1, len(arrays["steps"]) + 1))
        lines = (tmp_path / RECORDS).read_bytes().splitlines() if (tmp_path / RECORDS).exists() else []
        whole = [strict_json(line)["step"] for line in lines[:-1]]
        assert whole == list(range(1, len(whole) + 1))
        resume_step = rng.randint(9 * len(whole) // 10, len(whole))  # the step of some checkpoint
    assert resume_step > 500  # the kills came late enough to mean something
    MetricsLog(tmp_path, csv=True, resume_step=resume_step).close()
    assert {path.name for path in tmp_path.iterdir()} == {ARRAYS, RECORDS, TABLE}
    assert strict_json((tmp_path / ARRAYS).read_bytes())["steps"] == list(range(1, resume_step + 1))
    assert [int(row["step"]) for row in read_table(tmp_path)] == list(range(1, resume_step + 1))


@pytest.mark.parametrize("with_csv", [True, False])
def test_a_read_only_run_folder_is_a_clear_error(read_only, with_csv):
    with pytest.raises(UserError, match=r"run/.*: cannot be written: Permission denied; earlier checkpoints"):
        MetricsLog(read_only, csv=with_csv, resume_step=0)


def test_a_full_disk_stops_the_log_and_the_run_goes_on_when_there_is_room(tmp_path, strict_json):
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n{WRITER}"
    done = subprocess.run([sys.executable, "-c", limited, tmp_path, "0"], capture_output=True, text=True, check=False)
    assert f"UserError: {tmp_path / RECORDS}: cannot be written: File too large" in done.stderr
    arrays = strict_json((tmp_path / ARRAYS).read_bytes())
    MetricsLog(tmp_path, csv=True, resume_step=100).close()
    assert len(arrays["steps"]) > 100
    assert [int(row["step"]) for row in read_table(tmp_path)] == list(range(1, 101))
