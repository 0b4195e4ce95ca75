"""How each engine builds a model: the same first weights, float32, under ZeRO-3 never whole; when ranks exchange."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config import make_config
from llmtrain.engine.processes import check_gpus
from llmtrain.errors import UserError
from llmtrain.model.cost import parameter_count
from llmtrain.resolve import resolve
from tests.distributed.launching import LAUNCH, environment, free_port


def built(name: str) -> list[dict[str, Any]]:
    """What each of two ranks found after building."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{name}.yaml"),
        "--main_process_port", str(free_port()), str(Path(__file__).with_name("build_model.py")),
    ]  # fmt: skip
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment(**path))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    ranks: list[dict[str, Any]] = json.loads(line.removeprefix("FOUND "))
    return ranks


@pytest.mark.slow
def test_what_each_rank_holds_and_when_gradients_are_exchanged() -> None:
    config = make_config({"model": {"dim": 64}, "training": {"micro_batch_size": 1}})
    facts = {"world_size": 2, "bf16_native": False, "compile_auto": False}
    size = parameter_count(resolve(config, vocab_size=256, **facts).model, 64)
    kinds = {name: built(name) for name in ("cpu-ddp", "cpu-zero2", "cpu-zero3")}
    for name, ranks in kinds.items():
        assert [found["held_when_made"] for found in ranks] == [0 if name == "cpu-zero3" else size] * 2
        assert sum(found["owned"] for found in ranks) == size
        assert all(found["dtypes"] == ["torch.float32"] for found in ranks)
        # What ZeRO-3 cuts would be whole again in what is kept for a compiled backward pass, unless that is made again.
        assert ranks[0]["compiles"] == {"none": name != "cpu-zero3", "selective": True, "full": True}
        # The same numbers, squared and added up in another order.
        assert [found["norm"] for found in ranks] == pytest.approx([kinds["cpu-ddp"][0]["norm"]] * 2, rel=1e-6)
    # Nothing is exchanged before the last micro-batch: until then each rank has the gradient of its own samples.
    (own, same), (other, again) = (found["gradient_norms"] for found in kinds["cpu-ddp"])
    assert own != other and same == again
    # Beside single slices that ZeRO pads, the ranks share alike.
    assert kinds["cpu-zero3"][0]["owned"] == pytest.approx(size / 2, rel=0.01)


@pytest.mark.parametrize(("processes", "gpus"), [(1, 1), (8, 8), (2, None)])
def test_a_gpu_for_each_process_or_none_at_all(processes: int, gpus: int | None) -> None:
    check_gpus(processes, gpus)


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"starts 8 processes on .* which has 2 GPUs; set num_processes to 2"):
        check_gpus(8, 2)
