from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from llmtrain.observe.pace import Pace

LINE = "epoch 2/10  34 %  step 1,200/3,500  loss 2.134  val 2.201  lr 3.0e-04  412k tok/s  mfu 38 %  eta 0:12:30"

RUN = """
import sys
from llmtrain.observe.console import open_console
from llmtrain.observe.record import Record

def record(step, val_loss):
    speed = dict(tokens_per_sec=412345.6, step_time_s=0.25, mfu=0.389, memory_gb=1.0, time=0.25 * step)
    return Record(step, (step - 1) // 350, 2.1342, val_loss, None, 3e-4, 1.0, 1.0, 1, **speed)

console = open_console(total_steps=3500, steps_per_epoch=350)
console.start({"model": "10M parameters", "data": "data/stdlib"})
console.record(record(400, 2.2009))
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


def run_on_terminal(columns, term="xterm-256color", **environment) -> str:
    """What the program writes to a real pseudo-terminal, stdout and stderr together."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
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
    values = {"epoch": 1, "train_loss": 2.1342, "val_loss": 2.2009, "mfu": 0.389, "step_time_s": 750 / 2300}
    pieces = progress.pieces(make_record(1200, **values))
    assert "  ".join(pieces.values()) == LINE


def test_what_is_not_known_is_not_on_the_line(make_record):
    pieces = Pace(3500, 350).pieces(make_record(1200))
    assert "val" not in pieces and "mfu" not in pieces


def test_the_time_left_follows_the_clock_and_forgets_a_slow_start(make_record):
    progress = Pace(total_steps=10_000, steps_per_epoch=100)
    progress.pieces(make_record(10, time=0.0, step_time_s=60.0))
    for step in range(20, 2010, 10):
        pieces = progress.pieces(make_record(step, time=step * 0.5, step_time_s=0.1))  # evaluations take the rest
    assert pieces["eta"] in ("eta 1:06:40", "eta 1:06:41")


def test_no_run_is_too_odd_for_the_line(make_record):
    nan = float("nan")
    odd = make_record(30, train_loss=nan, val_loss=nan, step_time_s=nan, tokens_per_sec=nan, mfu=nan, time=nan)
    progress = Pace(total_steps=20, steps_per_epoch=7)
    for _ in range(2):
        pieces = progress.pieces(odd)
    assert pieces["percent"] == "100 %" and pieces["loss"] == "loss nan"


def test_without_a_terminal_there_is_a_plain_line_per_record_and_no_rich():
    done = run_plain(TERM="xterm-256color")
    assert done.stdout.splitlines() == [
        "model  10M parameters",
        "data   data/stdlib",
        "epoch 2/10  11 %  step 400/3,500  loss 2.134  val 2.201  lr 3.0e-04  412k tok/s  mfu 38 %  eta 0:12:55",
        "sample at step 400:",
        "def main():�[2J",
        "",
        "step 400: saved",
        "epoch 2/10  11 %  step 410/3,500  loss 2.134  lr 3.0e-04  412k tok/s  mfu 38 %  eta 0:12:52",
        "done",
        "rich was not imported",
    ]
    assert done.stderr == "warning: gradient norm 150 is over 100\n"


def test_an_encoding_that_lacks_a_character_does_not_stop_the_run():
    assert "def main():?[2J" in run_plain(PYTHONIOENCODING="ascii", PYTHONUTF8="0").stdout


@pytest.mark.parametrize("environment", [{"term": "dumb"}, {"PYTHONIOENCODING": "ascii"}])
def test_a_terminal_that_cannot_show_a_live_line_gets_plain_lines(environment):
    output = run_on_terminal(120, **environment)
    assert "rich was not imported" in output and "\x1b" not in output


def test_a_terminal_gets_a_live_line_with_a_bar_and_its_cursor_back():
    output = run_on_terminal(140)
    lines = without_escapes(output).splitlines()
    assert "model  10M parameters" in lines
    assert "warning: gradient norm 150 is over 100" in lines
    assert "def main():�[2J" in lines
    assert "\x1b[2J" not in output
    last = [line for line in lines if line.startswith("epoch")][-1]
    # The last known validation loss is still there.
    start = "epoch 2/10  11 %  step 410/3,500  loss 2.134  val 2.201  lr 3.0e-04  412k tok/s  mfu 38 %  eta 0:12:52  ━━"
    assert last.startswith(start)
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")
    assert lines.index("done") > lines.index(last)


@pytest.mark.parametrize("columns", [100, 80, 60, 40])
def test_a_narrow_terminal_keeps_one_line_with_what_tells_most(columns):
    lines = without_escapes(run_on_terminal(columns)).splitlines()
    live = [line for line in lines if "step 410/3,500" in line]
    assert live and all(len(line) <= columns and "loss 2.134" in line for line in live)
