"""The run that every engine trains: small, and of sizes that no number of processes divides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import small_config

STEPS, GLOBAL_BATCH, WINDOWS = 50, 12, 187
# 187 windows in batches of 12: the last batch of an epoch has 7 rows, so the ranks have unlike numbers of targets.
# Neither 2 nor 3 nor 4 divides the size of any parameter, but for the positions: 35, 35², 35 × 49, 47 × 35.
ODD_MODEL = {"dim": 35, "layers": 2, "heads": 5, "ff_dim": 49, "positions": "learned", "vocab_size": 47}

Trained = Callable[..., Path]


def config_of(
    data: Path, run_dir: Path, micro: int, precision: str = "fp32", optimizer: str = "adamw"
) -> dict[str, Any]:
    """The config of a run with the micro-batch, precision and optimizer given; head and embedding are tied.

    With Muon queries, keys and values have biases: beside the matrices that it takes.
    """
    config = small_config(data, run_dir)
    config["model"] = {**ODD_MODEL, "tie_embeddings": True, "qkv_bias": optimizer == "muon"}
    config["optimizer"]["name"] = optimizer
    config["training"] |= {
        "micro_batch_size": micro, "global_batch_size": GLOBAL_BATCH, "max_steps": STEPS, "precision": precision,
    }  # fmt: skip
    config["checkpoint"] = {"save_every": 10, "keep_last": 9}
    config["logging"] |= {"every": 1, "sample_ledger": True}
    return config
