"""Started by `accelerate launch`: train several times, one after the other, in the same processes.

Usage: train_each.py JOBS, a JSON list with the arguments of `llmtrain train` for each time. Between two times the
model, the optimizer and Accelerate's state go; the group of processes stays: DeepSpeed remembers it in many places.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from llmtrain.errors import Stopped, run_main
from llmtrain.train import main


def train_each(arguments: list[str]) -> None:
    """Do all jobs; one that is told to stop is done."""
    torch.set_num_threads(1)
    dist.destroy_process_group = lambda *_: None
    for job in json.loads(Path(arguments[0]).read_text()):
        try:
            main(job)
        except Stopped as stopped:
            print(stopped)


if __name__ == "__main__":
    sys.exit(run_main(train_each))
