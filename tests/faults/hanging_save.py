"""`llmtrain train` on storage that takes the tensors of step 6 and never gives a sign of life again.

As `python -m tests.faults.hanging_save PIPE …`, where nobody writes to the pipe. It says when it hangs, and when it has
heard a stop signal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from llmtrain.checkpoint import format as fmt
from llmtrain.errors import run_main
from llmtrain.health.signals import StopSignals
from llmtrain.train import main
from tests.faults.small_files import make_small

STEP = "step-00000006"


def make_hang(pipe: Path) -> None:
    """From now on, in this process."""
    write_rank, remember = fmt.write_rank, StopSignals._remember

    def hang(folder: Path, *part: Any) -> None:
        write_rank(folder, *part)
        if folder.name == STEP:
            print("hangs", flush=True)
            pipe.read_bytes()

    def heard(signals: StopSignals, number: int, frame: FrameType | None) -> None:
        remember(signals, number, frame)
        print("heard", flush=True)

    fmt.write_rank = hang
    StopSignals._remember = heard  # type: ignore[method-assign]


if __name__ == "__main__":
    make_small()
    make_hang(Path(sys.argv[1]))
    sys.exit(run_main(main, sys.argv[2:]))
