"""Finished runs of every engine, trained once for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.engines import Trained, config_of
from tests.distributed.launching import launch


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Run folders of finished runs; each kind is trained once."""
    folder = tmp_path_factory.mktemp("engines")

    def train(name: str, processes: int, micro: int, precision: str = "fp32", optimizer: str = "adamw") -> Path:
        run_dir = folder / f"{name}-{processes}-{micro}-{precision}-{optimizer}"
        if not run_dir.exists():
            config = config_of(data, run_dir, micro, precision, optimizer)
            config["data"]["workers"] = 2 if processes == 3 else 0
            done = launch(name, processes, config)
            assert done.returncode == 0, done.stderr[-4000:]
        return run_dir

    return train
