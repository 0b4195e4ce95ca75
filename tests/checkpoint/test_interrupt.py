"""Ctrl-C again while a checkpoint is written: the process is gone at once, and the checkpoint does not exist."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import committed_steps
from llmtrain.train import main
from tests.conftest import Call, small_config

# Trains, with storage that takes the tensors of step 20 and never gives a sign of life again: a pipe nobody writes to.
PROGRAM = """
import sys
from pathlib import Path

from llmtrain.checkpoint import format as fmt
from llmtrain.errors import run_main
from llmtrain.health.signals import StopSignals
from llmtrain.train import main

pipe, *arguments = sys.argv[1:]
write_rank, remember = fmt.write_rank, StopSignals._remember


def hang(folder, rank, fragments):
    write_rank(folder, rank, fragments)
    if folder.name == "step-00000020":
        print("hangs", flush=True)
        Path(pipe).read_bytes()


def heard(signals, number, frame):
    remember(signals, number, frame)
    print("heard", flush=True)


fmt.write_rank, StopSignals._remember = hang, heard
sys.exit(run_main(main, arguments))
"""


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [True, False])
def test_a_second_ctrl_c_does_not_wait_for_a_save(data: Path, tmp_path: Path, call: Call, in_background: bool) -> None:
    config = small_config(data, tmp_path / "run")
    config["checkpoint"] |= {"async_save": in_background}
    file, pipe = tmp_path / "config.yaml", tmp_path / "pipe"
    file.write_text(json.dumps(config))
    os.mkfifo(pipe)
    command = [sys.executable, "-c", PROGRAM, str(pipe), "--config", str(file)]
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout
        for word in ("hangs\n", "heard\n"):
            assert word in iter(process.stdout.readline, "")
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and err.endswith("llmtrain: interrupted\n") and "Traceback" not in err
    assert committed_steps(tmp_path / "run") == [10]
    code, out, err = call(main, "--config", file)
    assert code == 0 and "after step 10\n" in out and "step-00000020: an unfinished checkpoint; removed" in err
    assert committed_steps(tmp_path / "run") == [10, 20, 30]
