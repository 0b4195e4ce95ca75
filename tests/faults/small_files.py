"""`llmtrain train` whose checkpoints are of several small files, each written in several pieces, as large ones are.

As a script it is `llmtrain.train` with such files.
"""

from __future__ import annotations

import sys

from llmtrain.checkpoint import direct_io, tensor_files
from llmtrain.errors import run_main
from llmtrain.train import main


def make_small() -> None:
    """From now on, in this process and those forked from it.

    The tests' models have 8 KB of tensors for each of two ranks, 17 KB for one alone.
    """
    direct_io.PIECE_BYTES = 4096  # O_DIRECT wants whole blocks, and a reader whole pages
    tensor_files.FILE_BYTES = 6144  # with its header two pieces and a rest


if __name__ == "__main__":
    make_small()
    sys.exit(run_main(main))
