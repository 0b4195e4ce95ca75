"""Make console.svg, what a terminal shows of the demo: `python docs/console_picture.py WORK_FOLDER` (with tmux).

The run is interrupted first; then the same command is typed into a terminal of tmux, which is asked for its screen,
colours included, once the run has come far enough. About three minutes on two cores.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("console.svg")
COLUMNS, ROWS = 110, 32
STOP_AT, SHOW_AT = 250, 415  # optimizer steps of 500
COMMAND = ["llmtrain", "train", "--config", "configs/demo.yaml"]


def interrupted_demo(work: Path) -> Path:
    """Prepare the data of the demo and train to the middle of it; return the run folder."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "configs").exists():
        (work / "configs").symlink_to(ROOT / "configs")
    subprocess.run(["llmtrain", "prepare", "--input", "stdlib", "--out", "data/stdlib"], cwd=work, check=True)
    stopped = subprocess.run([*COMMAND, f"training.stop_after={STOP_AT}"], cwd=work, check=False)
    assert stopped.returncode == 75, stopped
    return work / "checkpoints" / "demo"


def steps_done(run: Path) -> int:
    """Of the newest record."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return int(json.loads(lines[-1])["step"])


def screen_of(work: Path, run: Path) -> str:
    """Type the command into a terminal; return its screen at step SHOW_AT, with the escape codes of its colours."""
    tmux = ["tmux", "-L", f"llmtrain-{os.getpid()}", "-u", "-f", "/dev/null"]
    size = ["-x", str(COLUMNS), "-y", str(ROWS)]
    shell = ["env", "PS1=$ ", "COLORTERM=truecolor", "bash", "--norc", "--noprofile"]
    subprocess.run([*tmux, "new-session", "-d", "-s", "demo", *size, shlex.join(shell)], cwd=work, check=True)
    try:
        subprocess.run([*tmux, "set", "-g", "status", "off"], check=True)
        subprocess.run([*tmux, "send-keys", "-t", "demo", shlex.join(COMMAND), "Enter"], check=True)
        while steps_done(run) < SHOW_AT:
            time.sleep(0.05)
        time.sleep(0.5)  # the console draws ten times a second
        shown = subprocess.run([*tmux, "capture-pane", "-t", "demo", "-p", "-e"], capture_output=True, check=True)
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)
    return shown.stdout.decode()


def as_svg(screen: str) -> str:
    """The screen as a picture that loads nothing."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen.rstrip("\n"), no_wrap=True))
    svg = console.export_svg(title=shlex.join(COMMAND), unique_id="console")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code, monospace", "monospace")
    assert "url(http" not in svg
    return svg


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    PICTURE.write_text(as_svg(screen_of(folder, interrupted_demo(folder))), encoding="utf-8")
