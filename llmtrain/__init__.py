"""llmtrain: pretrain language models with one short loop, from a laptop to ZeRO across nodes."""

__version__ = "0.1.0"
