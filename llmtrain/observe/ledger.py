"""The sample ledger: which samples each rank consumed at each step, so that anyone can check that none was repeated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from llmtrain.data.batches import Batch
from llmtrain.engine import Engine
from llmtrain.observe.files import LineAppender, rewind


class SampleLedger:
    """Appends `{"step": s, "ids": [window, …]}` to `samples-rankNNNNN.jsonl`; forgets what lies beyond the resume."""

    def __init__(self, run_dir: Path, engine: Engine, resume_step: int):
        path = run_dir / f"samples-rank{engine.rank:05d}.jsonl"
        # The run may have gone on in more processes before; what those did beyond the checkpoint is done again by ours.
        others = run_dir.glob("samples-rank*.jsonl") if engine.rank == 0 else []
        gone = [other for other in others if int(other.stem.removeprefix("samples-rank")) >= engine.world_size]
        for ledger in [path, *gone]:
            rewind(ledger, resume_step)
        self._file = LineAppender(path)

    def write(self, step: int, batch: Batch) -> None:
        """Record this rank's share of the batch that step `step` trained on."""
        positions = np.concatenate(batch.layout.rank_positions(batch.begin))
        self._file.append(json.dumps({"step": step, "ids": batch.order(positions).tolist()}))
