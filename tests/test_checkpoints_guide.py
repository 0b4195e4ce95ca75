"""The guide docs/checkpoints.md tells the truth: its reader, which knows no llmtrain, reads what llmtrain writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from llmtrain.checkpoint import tensor_files
from llmtrain.checkpoint.folders import committed_steps, step_folder
from llmtrain.checkpoint.format import CheckpointManifest, CheckpointReader, RankRecord, TensorInfo
from llmtrain.checkpoint.progress import Progress
from llmtrain.data.shards import FileInfo
from llmtrain.engine import Fragment
from tests.checkpoint.test_format import write

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = (DOCS / "checkpoints.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read_checkpoint() -> Any:
    """The function of the guide, as it stands there."""
    (source,) = re.findall(r"^```python reader\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)
    assert "llmtrain" not in source and "torch" not in source
    names: dict[str, Any] = {}
    exec(compile(source, "docs/checkpoints.md", "exec"), names)
    return names["read_checkpoint"]


def read_by_llmtrain(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    wanted = [
        Fragment(name, info.shape, 0, torch.empty(int(np.prod(info.shape, dtype=int))))
        for name, info in reader.tensors().items()
    ]
    assert not reader.load(wanted, [file.path for file in reader.tensor_files()])
    return {fragment.name: fragment.values.view(fragment.shape) for fragment in wanted}


def test_the_reader_reads_every_tensor_of_a_trained_run(read_checkpoint: Any, trained_run: Path) -> None:
    steps = committed_steps(trained_run)
    for step in steps:
        folder = step_folder(trained_run, step)
        expected, found = read_by_llmtrain(folder), read_checkpoint(str(folder))
        assert found.keys() == expected.keys()
        assert {name.partition("/")[0] for name in found} == {"model", "optimizer"}
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)


def test_the_reader_joins_what_two_ranks_hold_in_several_files(
    read_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 1)
    values, bias = torch.arange(12.0), torch.tensor([1.5, -2.0]).bfloat16()
    ranks = [
        [Fragment("model/w", (3, 4), 5, values[5:]), Fragment("model/b", (2,), 0, bias)],
        [Fragment("model/w", (3, 4), 0, values[:5]), Fragment("optimizer/w/step", (), 0, torch.tensor([9.0]))],
    ]
    folder = write(tmp_path / "step-00000001", ranks)
    assert (folder / "rank00001-1.safetensors").is_file()
    found = read_checkpoint(str(folder))
    np.testing.assert_array_equal(found["model/w"], values.view(3, 4).numpy())
    np.testing.assert_array_equal(found["model/b"], bias.view(torch.uint16).numpy())
    assert found["optimizer/w/step"].shape == () and found["optimizer/w/step"] == 9
    with (folder / "rank00000.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(AssertionError, match=r"rank00000\.safetensors is damaged"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize("kind", [CheckpointManifest, RankRecord, TensorInfo, FileInfo])
def test_every_field_of_the_format_is_in_the_guide(kind: type[BaseModel]) -> None:
    for field in kind.model_fields:
        assert re.search(rf'[`"]{field}[`"]', GUIDE), field


def test_every_field_of_the_state_and_every_dtype_is_in_the_guide() -> None:
    for name in [*Progress().to_dict(), *tensor_files._DTYPES.values()]:
        assert f"`{name}`" in GUIDE, name
    assert f"{tensor_files.FILE_BYTES >> 20} MiB" in GUIDE


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", GUIDE))))
def test_links_lead_somewhere(target: str) -> None:
    assert (DOCS / target).exists()
