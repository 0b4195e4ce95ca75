"""One micro-batch ahead: the same values in the same order, and the same runs, however slowly they travel.

Here the way to the device is a thread that copies late, so that what is used too early, or out of turn, shows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.data.ahead import Ahead, Arrival, SideStream, ahead
from llmtrain.data.batches import inputs_and_targets
from llmtrain.errors import CorruptError, Stopped
from llmtrain.model.loss import IGNORE_INDEX
from llmtrain.train import main
from tests.conftest import records, small_config
from tests.faulty_steps import Faults, faulty

CPU = torch.device("cpu")


@pytest.fixture
def slow_way() -> Iterator[Callable[[Tensor], Arrival]]:
    """Copies in a thread of its own, one after the other, as a stream does."""
    with ThreadPoolExecutor(1) as thread:

        def copy(tensor: Tensor) -> Tensor:
            time.sleep(0.002)
            return tensor.clone()

        yield lambda tensor: thread.submit(copy, tensor).result


def counted(count: int, log: list[str]) -> Iterator[Tensor]:
    for number in range(count):
        log.append(f"read {number}")
        yield torch.full((2, 3), number)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_everything_comes_once_and_in_order(slow_way: Callable[[Tensor], Arrival], count: int) -> None:
    found = list(Ahead(counted(count, []), slow_way))
    assert [tensor.tolist() for tensor in found] == [[[number] * 3] * 2 for number in range(count)]


def test_each_is_on_its_way_before_the_one_in_front_of_it_is_used_and_no_more(
    slow_way: Callable[[Tensor], Arrival],
) -> None:
    log: list[str] = []
    tensors = Ahead(counted(4, log), slow_way)
    assert log == []  # nothing is read before it is asked for
    for tensor in tensors:
        log.append(f"use {int(tensor[0, 0])}")
    assert log == ["read 0", "read 1", "use 0", "read 2", "use 1", "read 3", "use 2", "use 3"]


def test_what_cannot_be_read_is_told_when_it_is_its_turn(slow_way: Callable[[Tensor], Arrival]) -> None:
    def damaged() -> Iterator[Tensor]:
        yield from counted(2, [])
        raise CorruptError("id 70000 is outside the vocabulary")

    tensors = Ahead(damaged(), slow_way)
    assert [int(next(tensors)[0, 0]) for _ in range(2)] == [0, 1]
    for _ in range(2):
        with pytest.raises(CorruptError, match="70000"):
            next(tensors)


def test_on_a_cpu_tensors_pass_as_they_are() -> None:
    tensors = counted(1, [])
    assert ahead(tensors, CPU) is tensors


def launch(folder: Path, config: dict[str, Any], *overrides: str) -> list[dict[str, Any]]:
    """Train; return the records without what depends on the clock."""
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(config | {"run": {"dir": str(folder)}}))
    main(["--config", str(file), *overrides])
    kept = {"step", "epoch", "train_loss", "val_loss", "val_accuracy", "grad_norm", "param_norm", "tokens", "skipped"}
    return [{key: value for key, value in record.items() if key in kept} for record in records(folder)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_is_ahead_resumes_and_goes_back_to_the_same_numbers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_way: Callable[[Tensor], Arrival], workers: int
) -> None:
    """Two micro-batches a step, short batches at each epoch's end, evaluations, a stop, and skips that lead back."""
    bad: Faults = {96: "nan loss", 120: "nan gradient"}
    monkeypatch.setattr("llmtrain.train.accumulate", faulty(bad))
    config = small_config(data, tmp_path)
    config["data"]["workers"] = workers
    config["checkpoint"]["save_every"] = 4
    config["health"] = {"spike_window": 8, "max_skips": 2}
    plain = launch(tmp_path / "plain", config)
    assert plain[-1]["step"] == 30
    used: list[object] = []

    def ahead_here(tensors: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
        used.append(device)
        return Ahead(tensors, slow_way)

    monkeypatch.setattr("llmtrain.run.ahead", ahead_here)
    with pytest.raises(Stopped):
        launch(tmp_path / "ahead", config, "training.stop_after=7")
    assert launch(tmp_path / "ahead", config) == plain
    assert len(used) > 3  # both launches, going back, evaluations
    ledgers = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("plain", "ahead")]
    assert ledgers[0] == ledgers[1] and "back_to" in ledgers[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32])
def test_a_side_stream_brings_the_same_bits_while_the_device_is_busy(dtype: type[np.generic]) -> None:
    """In the dtypes that ids are stored in; a rank that a short batch has nothing for gets no rows."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = np.random.default_rng(0)
    rows = [number % 9 for number in range(50)]
    sent = [torch.from_numpy(generator.integers(0, 60_000, (count, 1025)).astype(dtype)) for count in rows]
    busy = torch.randn(4096, 4096, device=device)
    sums, shapes = [], []
    for tensor in Ahead(iter(sent), SideStream(device)):
        busy = (busy @ busy).clamp(-1, 1)  # so that the host is far ahead of the device
        sums.append(tensor.long().sum())
        shapes.append((tuple(tensor.shape), tensor.dtype))
    assert torch.stack(sums).tolist() == [int(tensor.long().sum()) for tensor in sent]
    assert shapes == [(tuple(tensor.shape), tensor.dtype) for tensor in sent]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_ids_as_they_are_stored_and_no_rows_come_through(
    slow_way: Callable[[Tensor], Arrival], dtype: type[np.generic]
) -> None:
    highest = np.iinfo(dtype).max
    sent = [torch.full((count, 3), highest, dtype=torch.from_numpy(np.empty(0, dtype)).dtype) for count in (2, 0, 1)]
    for tensor, original in zip(Ahead(iter(sent), slow_way), sent, strict=True):
        assert tensor.dtype == original.dtype and tensor.shape == original.shape
        inputs, targets = inputs_and_targets(tensor, 2, CPU)
        assert inputs.tolist() == [[highest] * 2] * len(original) + [[0] * 2] * (2 - len(original))
        assert targets.tolist() == [[highest] * 2] * len(original) + [[IGNORE_INDEX] * 2] * (2 - len(original))
