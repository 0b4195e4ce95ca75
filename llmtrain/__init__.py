"""llmtrain: pretrain language models with one short loop, from a laptop to ZeRO across nodes."""

import os

__version__ = "0.1.0"

# Threads of a CPU wait for each other many times in a step, in a loop of 300,000 turns: long beside a step, if another
# program has the core of the one that is waited for. After a sixth of that they sleep (docs/LOG.md). libgomp reads it
# as torch is loaded, which nothing but this module comes before in every process of ours.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
