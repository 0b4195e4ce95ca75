from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from llmtrain.observe.metrics import MetricsLog
from llmtrain.observe.record import Record

MakeRecord = Callable[..., Record]


@pytest.fixture
def make_record() -> MakeRecord:
    """Plausible records: each field can be set, the rest follows from the step."""

    def make(step: int, **fields: Any) -> Record:
        plausible = {
            "step": step,
            "epoch": step // 100,
            "train_loss": 2.0 + 8.0 / (step + 1),
            "val_loss": None,
            "val_accuracy": None,
            "learning_rate": 3e-4,
            "grad_norm": 0.7,
            "param_norm": 51.5,
            "tokens": 4096 * step,
            "tokens_per_sec": 412_345.6,
            "step_time_s": 0.01,
            "mfu": None,
            "memory_gb": 1.25,
            "step_time_spread_s": None,
            "slowest_rank": None,
            "time": 1.7e9 + step,
        }
        return Record(**(plausible | fields))

    return make


@pytest.fixture
def strict_json() -> Callable[[str | bytes], Any]:
    """A parser that refuses NaN and Infinity, as every parser but Python's does."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return lambda text: json.loads(text, parse_constant=refuse)


@pytest.fixture
def read_only(make_record: MakeRecord) -> Iterator[Path]:
    """A run folder with a record that this process can read and not write, also where the tests run as root."""
    with TemporaryDirectory() as parent:  # pytest's own are closed to everybody else, for reading too
        folder = Path(parent) / "run"
        folder.mkdir()
        log = MetricsLog(folder, csv=True, resume_step=0)
        log.log(make_record(1))
        log.close()
        Path(parent).chmod(0o755)
        folder.chmod(0o555)
        for path in folder.iterdir():
            path.chmod(0o444)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield folder
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
