"""Benchmarks of EleutherAI's lm-evaluation-harness, on a trained model as it is: nothing is exported."""
