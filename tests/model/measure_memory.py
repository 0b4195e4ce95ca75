"""Run by test_memory.py under `accelerate launch`: trains a few steps; tells how many bytes of tensors each rank held.

Counted is every tensor on the CPU: also those that only C++ holds (DDP's buckets) and those that were never written to.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llmtrain.config import make_config
from llmtrain.engine import Engine, make_engine
from llmtrain.errors import run_main
from llmtrain.model.transformer import Transformer
from llmtrain.resolve import resolve

FIRST_STEPS = 2  # in which ZeRO-3 learns the order of modules
STEPS = 5


def count_tensors() -> None:
    """Let torch's CPU allocator count in all threads: the profiler does in its own, and tensors die in gloo's, too."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_report_cpu_memory_usage").value = True


def measure(engine: Engine, raw: dict[str, Any]) -> int:
    """Bytes that were held at most during a step.

    Of several steps the smallest: a thread of gloo that gets no core drops late what it has sent.
    """
    config = resolve(
        make_config(raw), vocab_size=raw["model"]["vocab_size"], world_size=engine.world_size,
        bf16_native=False, compile_auto=False,
    )  # fmt: skip
    torch.manual_seed(0)
    training = config.training
    engine.build(
        lambda: Transformer(config.model, config.data.seq_len, training.activation_checkpointing),
        training,
        config.optimizer,
    )
    most = []
    for _ in range(FIRST_STEPS + STEPS):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step(engine, config.data.seq_len, config.training.global_batch_size // engine.world_size)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profiler.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())["traceEvents"]
        most.append(max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"))
    return min(most[FIRST_STEPS:])


def step(engine: Engine, seq_len: int, accumulation: int) -> None:
    ids = (torch.arange(seq_len) % 256).view(1, -1)
    for micro_batch in range(accumulation):
        engine.forward_backward(ids, ids, global_targets=ids.numel(), sync=micro_batch == accumulation - 1)
    engine.step(lr=1e-3)


def main(argv: list[str]) -> None:
    count_tensors()
    engine = make_engine(timeout_s=120)
    told = engine.gather(measure(engine, json.loads(argv[0])))
    if engine.rank == 0:
        print("MEASURED " + json.dumps(told), flush=True)
    engine.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
