"""`llmtrain train` with a loss made in parts, as for a large vocabulary: of a few tokens at a time."""

from __future__ import annotations

import sys

from llmtrain.errors import run_main
from llmtrain.model import loss
from llmtrain.train import main

loss.MOST_LOGITS = 1 << 10  # 21 tokens of the vocabulary of 47

sys.exit(run_main(main))
