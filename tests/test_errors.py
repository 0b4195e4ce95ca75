"""How a verb's end becomes an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain import cli
from llmtrain.errors import CorruptError, DivergedError, Stopped, UserError, end_everywhere, run_main
from llmtrain.report import main as report
from tests.conftest import Call, is_one_clear_line

Main = Callable[[list[str]], None]


@pytest.fixture
def code_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the exit code is asked for, in a process that a launcher did not start."""
    monkeypatch.setenv("LLMTRAIN_EXIT_CODE_FILE", str(tmp_path / "code"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "code"


def raising(error: BaseException | None) -> Main:
    def main(_argv: list[str]) -> None:
        if error is not None:
            raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (UserError("x"), 2), (DivergedError("x"), 3), (CorruptError("x"), 4), (Stopped("x"), 75)],
)
def test_the_exit_code_is_left_in_the_file(code_file: Path, error: BaseException | None, code: int) -> None:
    code_file.write_text("of an earlier launch\n")
    assert run_main(raising(error), []) == code
    assert code_file.read_text() == f"{code}\n"
    assert list(code_file.parent.iterdir()) == [code_file]


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("bug"), 1), (SystemExit(0), 0), (SystemExit(3), 3), (SystemExit("x"), 1)]
)
def test_what_is_not_foreseen_is_left_in_the_file_too(code_file: Path, error: BaseException, code: int) -> None:
    with pytest.raises(type(error)):
        run_main(raising(error), [])
    assert code_file.read_text() == f"{code}\n"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 131.32 GiB of which 3.49"
                " GiB is free. Of the allocated memory 124.14 GiB is allocated by PyTorch. If reserved but unallocated"
            ),
            "out of memory: CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 131.32 GiB "
            "of which 3.49 GiB is free; to train in less: a smaller training.micro_batch_size",
        ),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
            "out of memory: CUDA error: out of memory; to train",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `c`"), "out of memory: CUBLAS_STATUS_ALLOC"),
        (MemoryError(), "out of memory; to train in less"),
    ],
)
def test_no_memory_is_one_line_that_says_what_takes_less(
    code_file: Path, error: Exception, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(raising(error), []) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"llmtrain: error: {cause}")
    assert said.count("\n") == 1
    assert code_file.read_text() == "2\n"


def test_memory_of_the_host_that_torch_cannot_have_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(lambda _: print(torch.empty(1 << 60)), []) == 2
    assert capsys.readouterr().err.startswith(
        "llmtrain: error: out of memory: can't allocate memory: you tried to allocate 4611686018427387904 bytes."
    )


def test_a_file_that_cannot_be_written_changes_no_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMTRAIN_EXIT_CODE_FILE", str(tmp_path / "absent" / "code"))
    assert run_main(raising(Stopped("saved")), []) == 75
    assert "absent/code cannot be written" in capsys.readouterr().err


def test_the_real_command_leaves_it(code_file: Path) -> None:
    command = [sys.executable, "-m", "llmtrain", "no-such-verb"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, check=False, timeout=60)
    assert done.returncode == 2
    assert code_file.read_text() == "2\n"


def ended(raised: str, code_file: Path, **place: str) -> subprocess.CompletedProcess[str]:
    """A process that a launcher started, with a library that does not survive the interpreter's end."""
    program = (
        "import atexit, os\n"
        "from llmtrain.errors import *\n"
        "atexit.register(os.abort)\n"
        f"def main(_): {raised}\n"
        "print('its output')\n"
        "run_main(main, [])"
    )
    environment = {**os.environ, "LLMTRAIN_EXIT_CODE_FILE": str(code_file), **place}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("raised", "code"), [
    ("pass", 0), ("raise UserError('x')", 2), ("raise PeerLostError('rank 1 is gone')", 5), ("raise Stopped('x')", 75),
])  # fmt: skip
def test_a_launched_process_ends_with_its_exit_code_whatever_its_libraries_do(
    code_file: Path, raised: str, code: int
) -> None:
    done = ended(raised, code_file, RANK="8", LOCAL_RANK="0")
    assert (done.returncode, code_file.read_text(), done.stdout) == (code, f"{code}\n", "its output\n")
    assert len(done.stderr.splitlines()) == (code != 0)


@pytest.mark.parametrize("place", [{}, {"RANK": "0", "LOCAL_RANK": "0"}])
def test_only_who_reads_the_output_may_leave_without_an_error(code_file: Path, place: dict[str, str]) -> None:
    """A connection that breaks raises the same: one rank of two once ended with 0 for it, having said nothing."""
    done = ended("raise BrokenPipeError(32, 'Broken pipe')", code_file, **place)
    assert done.returncode == (1 if place else -signal.SIGABRT) and code_file.read_text() == "1\n"
    assert "BrokenPipeError: [Errno 32] Broken pipe" in done.stderr and "This is a fault of llmtrain" in done.stderr
    program = "from llmtrain.errors import run_main; run_main(lambda _: print('line\\n' * 100_000), [])"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env={**os.environ, **place}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as head:
        assert head.stdout and head.stderr and head.stdout.readline() == b"line\n"
        head.stdout.close()
        assert head.wait(60) == 0 and head.stderr.read() == b"" and code_file.read_text() == "0\n"


@pytest.mark.parametrize("place", [{}, {"RANK": "0", "LOCAL_RANK": "0"}])
@pytest.mark.parametrize(("raised", "code"), [
    ("raise Stopped('saved')", 75), ("error = Stopped('x'); error.is_at_once = True; raise error", 75),
    ("raise UserError('x')", 2), ("raise PeerLostError('rank 1 is gone')", 5), ("raise KeyboardInterrupt", 130),
    ("tell('saved', sys.stdout); raise Stopped('saved')", 75),
])  # fmt: skip
@pytest.mark.parametrize("output", ["nobody reads it", "its disk is full"])
def test_the_exit_code_does_not_depend_on_whether_the_last_line_can_be_said(
    code_file: Path, place: dict[str, str], raised: str, code: int, output: str
) -> None:
    """As where Ctrl-C ends the `tee` behind the pipe, too, or the disk of the log is full."""
    program = f"import sys\nfrom llmtrain.errors import *\ndef main(_): {raised}\nsys.exit(run_main(main, []))"
    reader, writer = os.pipe() if output == "nobody reads it" else (None, os.open("/dev/full", os.O_WRONLY))
    if reader is not None:
        os.close(reader)
    environment = {**os.environ, "LLMTRAIN_EXIT_CODE_FILE": str(code_file), **place}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, stdout=writer, stderr=writer, check=False, timeout=60)
    os.close(writer)
    assert (done.returncode, code_file.read_text()) == (code, f"{code}\n")


def test_what_was_to_be_read_and_is_lost_is_no_success(code_file: Path) -> None:
    program = "from llmtrain.errors import run_main; run_main(lambda _: print('a result'), [])"
    environment = {**os.environ, "LOCAL_RANK": "0", "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", program], env=environment, stdout=full, check=False, timeout=60)
    assert done.returncode == 1


def test_an_interrupted_process_ends_at_once_whatever_still_runs(code_file: Path) -> None:
    """A thread that never ends, as a save on a file system that hangs."""
    raised = "import threading; threading.Thread(target=threading.Event().wait).start(); raise KeyboardInterrupt"
    done = ended(raised, code_file)
    assert (done.returncode, code_file.read_text(), done.stdout) == (130, "130\n", "its output\n")
    assert done.stderr == "llmtrain: interrupted\n"


def test_only_the_first_process_of_a_machine_writes(code_file: Path) -> None:
    assert ended("raise Stopped('x')", code_file, RANK="1", LOCAL_RANK="1").returncode == 75
    assert not code_file.exists()


@pytest.mark.parametrize(("rank", "said"), [(0, "llmtrain: saved\n"), (1, "")])
def test_what_ends_all_ranks_is_said_and_left_before_any_of_them_goes(
    code_file: Path, capsys: pytest.CaptureFixture[str], rank: int, said: str
) -> None:
    before: list[str] = []
    error = Stopped("saved")
    end_everywhere(error, rank, lambda: before.extend([capsys.readouterr().err, code_file.read_text()]))
    assert before == [said, "75\n"]
    assert run_main(raising(error), []) == 75
    assert capsys.readouterr().err == ""  # once


def test_a_folder_that_is_closed_to_the_user_is_no_fault_of_ours(closed: Path, call: Call) -> None:
    code, _, err = call(report, closed / "run")
    assert code == 2 and is_one_clear_line(err) and f"{closed}/run: Permission denied" in err
    assert "Traceback" in call(report, closed / "run", "--debug")[2]


def test_debug_shows_where_bad_input_was_found_and_only_then(call: Call) -> None:
    code, _, err = call(raising(UserError("x")))
    assert (code, err) == (2, "llmtrain: error: x\n")
    code, _, err = call(raising(UserError("x")), "--debug")
    assert code == 2 and err.startswith("Traceback") and err.endswith("llmtrain: error: x\n")
    for argv in (["--debug", "verify", "none"], ["verify", "none", "--debug"]):
        code, _, err = call(cli.main, *argv)
        assert code == 2 and "Traceback" in err and err.endswith("llmtrain: error: none: no such folder\n"), argv


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_a_fault_of_ours_always_shows_its_traceback_and_says_whose_it_is(options: list[str]) -> None:
    program = "import sys; from llmtrain.errors import run_main\ndef main(_): 1 / 0\nsys.exit(run_main(main))"
    done = subprocess.run([sys.executable, "-c", program, *options], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "fault of llmtrain" in done.stderr


def test_the_last_words_of_a_process_that_ends_for_a_hung_disk_do_not_hang_with_it(tmp_path: Path) -> None:
    """The exit code's file lies there as well: a pipe that nobody reads."""
    code = (
        "import os, time\nfrom llmtrain import errors\nerrors._LAST_WORDS_S = 0.5\n"
        "os.mkfifo(f\"{os.environ['LLMTRAIN_EXIT_CODE_FILE']}.{os.getpid()}\")\n"
        "errors.end_within(0.1, errors.PeerLostError('rank 1 is gone'))\ntime.sleep(60)"
    )
    environment = {**os.environ, "LLMTRAIN_EXIT_CODE_FILE": str(tmp_path / "code")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == 5 and result.stderr == "llmtrain: error: rank 1 is gone\n"
