from __future__ import annotations

import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from itertools import pairwise

import pytest

from llmtrain.observe.pace import Pace
from llmtrain.observe.plain import PlainConsole
from llmtrain.observe.sparkline import Sparkline

LINE = (
    "epoch 2/10  34 %  step 1,200/3,500  loss 2.134  val 2.201  lr 3.0e-04  412k tok/s  mfu 38 %  1.25 GB  "
    "rank 3 slowest, by 0.012 s  eta 0:12:30"
)

RUN = """
import os, sys
from pathlib import Path
from llmtrain.observe.console import open_console
from llmtrain.observe.record import Record

def record(step, val_loss):
    speed = dict(tokens_per_sec=412345.6, step_time_s=0.25, mfu=0.389, memory_gb=1.0, time=0.25 * step)
    more = dict(skipped=1, step_time_spread_s=0.012, slowest_rank=3)
    loss = 2.1342 + (4000 - 10 * step if step < 400 else 0)
    return Record(step, (step - 1) // 350, loss, val_loss, None, 3e-4, 1.0, 1.0, 1, **speed, **more)

console = open_console(os.environ.get("KIND", "auto"), total_steps=3500, steps_per_epoch=350)
console.start({"model": "10M parameters", "data": "data/stdlib"})
console.record(record(200, None))
console.record(record(390, None))
console.record(record(400, 2.2009))
console.saved(Path("run/step-00000400"))
console.warn("gradient norm 150 is over 100")
console.sample(400, "def ", "main():\\x1b[2J\\n")
console.message("step 400: saved")
console._drawn_at = 0.0  # as if a second had passed
console.record(record(410, None))
console.close("done")
print("rich was imported" if "rich" in sys.modules else "rich was not imported")
"""


def run_plain(**environment):
    return subprocess.run(
        [sys.executable, "-c", RUN],
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
        encoding="utf-8",
    )


def run_on_terminal(columns, term="xterm-256color", rows=24, **environment) -> str:
    """What the program writes to a real pseudo-terminal, stdout and stderr together."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        env={**env, "TERM": term, "PYTHONUTF8": "1", **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    assert process.wait() == 0, output.decode()
    return output.decode()


def without_escapes(output: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).replace("\r", "\n")


def test_the_line_says_what_one_wants_to_know(make_record):
    progress = Pace(total_steps=3500, steps_per_epoch=350)
    values = {
        "epoch": 1, "train_loss": 2.1342, "val_loss": 2.2009, "mfu": 0.389, "step_time_s": 750 / 2300,
        "step_time_spread_s": 0.012, "slowest_rank": 3,
    }  # fmt: skip
    progress.take(make_record(1200, **values))
    assert "  ".join(progress.pieces().values()) == LINE


def test_what_is_not_known_is_not_on_the_line(make_record):
    progress = Pace(3500, 350)
    progress.take(make_record(1200))
    assert not {"val", "mfu", "slowest"} & set(progress.pieces())


def test_the_time_left_follows_the_clock_and_forgets_a_slow_start(make_record):
    progress = Pace(total_steps=10_000, steps_per_epoch=100)
    progress.take(make_record(10, time=0.0, step_time_s=60.0))
    for step in range(20, 2010, 10):
        progress.take(make_record(step, time=step * 0.5, step_time_s=0.1))  # evaluations take the rest
    assert progress.pieces()["eta"] in ("eta 1:06:40", "eta 1:06:41")


def test_no_run_is_too_odd_for_the_line(make_record):
    nan = float("nan")
    odd = make_record(30, train_loss=nan, val_loss=nan, step_time_s=nan, tokens_per_sec=nan, mfu=nan, time=nan)
    progress = Pace(total_steps=20, steps_per_epoch=7)
    for _ in range(2):
        progress.take(odd)
        pieces = progress.pieces()
    assert pieces["percent"] == "100 %" and pieces["loss"] == "loss nan"


REST = "lr 3.0e-04  412k tok/s  mfu 38 %  1 GB  rank 3 slowest, by 0.012 s"


def test_without_a_terminal_there_are_plain_lines_and_no_rich():
    """The first record, one with a validation loss and the last have a line each, with the time of day."""
    done = run_plain(TERM="xterm-256color", TZ="UTC")
    assert done.stdout.splitlines() == [
        "model  10M parameters",
        "data   data/stdlib",
        f"01-01 00:00:50  epoch 1/10  5 %  step 200/3,500  loss 2002.134  {REST}  eta 0:13:45",
        f"01-01 00:01:40  epoch 2/10  11 %  step 400/3,500  loss 2.134  val 2.201  {REST}  eta 0:12:55",
        "saved run/step-00000400",
        "sample at step 400:",
        "def main():�[2J",
        "",
        "step 400: saved",
        f"01-01 00:01:42  epoch 2/10  11 %  step 410/3,500  loss 2.134  {REST}  eta 0:12:52",
        "done",
        "rich was not imported",
    ]
    assert done.stderr == "warning: gradient norm 150 is over 100\n"


def test_a_log_of_weeks_is_not_a_million_lines(make_record, capsys):
    """A record a second for three days: a hundred lines or so for each factor of e, then one a minute."""
    now = 0.0
    console = PlainConsole(Pace(10**6, 10**6), clock=lambda: now)
    lines = []
    for step in range(1, 3 * 86_400):
        now = float(step)
        console.record(make_record(step))
        if told := capsys.readouterr().out:
            lines.append((step, told))
    assert lines[0][0] == 1
    assert 1440 * 2.5 < len(lines) < 1440 * 3 + 1000
    assert max(later - earlier for (earlier, _), (later, _) in pairwise(lines)) <= 60
    console.close("done")
    *_, last, outcome = capsys.readouterr().out.splitlines()
    assert (f"step {step:,}/" in last or lines[-1][0] == step) and outcome == "done"


def test_a_quiet_run_says_what_asks_for_attention_and_how_it_ended():
    done = run_plain(KIND="quiet")
    assert done.stdout.splitlines() == ["done", "rich was not imported"]
    assert done.stderr == "warning: gradient norm 150 is over 100\n"


def test_live_can_be_asked_for_where_there_is_no_terminal():
    done = run_plain(KIND="live", COLUMNS="120")
    assert "rich was imported" in done.stdout and "\x1b[" in done.stdout


def test_an_encoding_that_lacks_a_character_does_not_stop_the_run():
    assert "def main():?[2J" in run_plain(PYTHONIOENCODING="ascii", PYTHONUTF8="0").stdout


@pytest.mark.parametrize("environment", [{"term": "dumb"}, {"PYTHONIOENCODING": "ascii"}])
def test_a_terminal_that_cannot_show_a_live_line_gets_plain_lines(environment):
    output = run_on_terminal(120, **environment)
    assert "rich was not imported" in output and "\x1b" not in output


def last_panel(output: str) -> list[str]:
    """The live lines as they were drawn last."""
    lines = without_escapes(output).splitlines()
    begin = max(number for number, line in enumerate(lines) if line.startswith("step 410/3,500"))
    return [line.rstrip() for line in lines[begin : lines.index("done")] if line]


def test_a_terminal_gets_live_lines_with_a_bar_and_curves_and_its_cursor_back():
    output = run_on_terminal(140)
    lines = without_escapes(output).splitlines()
    assert "model  10M parameters" in lines
    assert "warning: gradient norm 150 is over 100" in lines
    assert "def main():�[2J" in lines
    assert "\x1b[2J" not in output
    # The last known validation loss is still there.
    bar = "━━━━╸" + "━" * 35
    assert last_panel(output) == [
        f"step 410/3,500  {bar}  11 %  epoch 2/10  eta 0:12:52",
        "loss 2.134  █▅▁▁  val 2.201  best 2.201 at 400  lr 3.0e-04",
        "412k tok/s  mfu 38 %  1 GB  rank 3 slowest, by 0.012 s  4 skipped  saved step-00000400, 0 s ago",
        "1 warning: gradient norm 150 is over 100",
    ]
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")


@pytest.mark.parametrize("columns", [100, 80, 60, 40])
def test_a_narrow_terminal_keeps_what_tells_most(columns):
    panel = last_panel(run_on_terminal(columns))
    assert len(panel) == 4 and all(len(line) <= columns for line in panel)
    assert "step 410/3,500" in panel[0] and "eta" in panel[0]
    assert "loss 2.134" in panel[1] and "val 2.201" in panel[1]
    assert "412k tok/s" in panel[2]


def test_a_low_terminal_keeps_two_lines():
    panel = last_panel(run_on_terminal(100, rows=6))
    assert len(panel) == 2 and "loss 2.134" in panel[1]


def test_a_sparkline_shows_the_whole_run_in_its_width():
    line = Sparkline(8)
    assert str(line) == ""
    for step in range(1, 10_001):
        line.add(math.exp(-step / 2000))
        assert len(str(line)) <= 8 and len(line._means) < 16
    assert str(line)[0] == "█" and str(line)[-1] == "▁" and list(str(line)) == sorted(str(line), reverse=True)
    flat = Sparkline(8)
    for value in (1.0, math.nan, 1.0, math.inf, 1.0):
        flat.add(value)
    assert str(flat) == "▁▁▁"
