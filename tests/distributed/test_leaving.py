"""The last moments of several processes: what was decided is what each says, whoever is gone by then."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import start_ranks

pytestmark = pytest.mark.slow
PROGRAM = """
import os, signal, sys
from contextlib import ExitStack
from llmtrain.engine import make_engine
from llmtrain.errors import Stopped, run_main
from llmtrain.health.agreement import leave

def main(_):
    with ExitStack() as at_the_end:
        engine = make_engine(60.0)
        at_the_end.push(lambda _, error, __: leave(engine, error))
        engine.barrier()
        if engine.rank == int(os.environ["GONE"]):
            os.kill(os.getpid(), signal.SIGKILL)
        raise Stopped("saved")

run_main(main)
"""


@pytest.mark.parametrize("gone", [0, 1])
def test_a_machine_that_is_taken_away_once_all_is_saved_changes_no_exit_code(tmp_path: Path, gone: int) -> None:
    """Rank 0 may still be at its last plots and uploads when the other's grace is over, or the other way round."""
    code_file = tmp_path / "exit-code"
    ranks = start_ranks(
        [tmp_path] * 2, [tmp_path] * 2, ("-c", PROGRAM), GONE=str(gone), LLMTRAIN_EXIT_CODE_FILE=str(code_file)
    )
    _, said = ranks[1 - gone].communicate(timeout=100)
    ranks[gone].communicate(timeout=100)
    assert ranks[1 - gone].returncode == 75, said
    lines = [line for line in said.splitlines() if line.startswith("llmtrain: ")]
    assert lines == (["llmtrain: saved"] if gone else []) and "Traceback" not in said
    if gone:
        assert code_file.read_text() == "75\n"
