"""The checkpoint format: any slices in, any slices out; every flipped byte is found; no name leads outside."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llmtrain.checkpoint import direct_io, tensor_reader
from llmtrain.checkpoint import format as fmt
from llmtrain.engine import Fragment
from llmtrain.errors import CorruptError, UserError
from tests.verified import open_verified


def write(folder: Path, ranks: list[list[Fragment]], step: int = 1) -> Path:
    """A committed checkpoint in which each rank holds the given fragments."""
    folder.mkdir(parents=True)
    for rank, fragments in enumerate(ranks):
        fmt.write_rank(folder, rank, fragments)
    fmt.write_file(folder / fmt.STATE, json.dumps({"step": step}))
    files = [fmt.describe_file(folder, path) for path in sorted(folder.iterdir())]
    manifest = fmt.CheckpointManifest(
        step=step, engine="test", world_size=len(ranks), data_fingerprint="d", tokenizer_sha256="t",
        llmtrain_version="0", torch_version="0", files=tuple(files),
    )  # fmt: skip
    fmt.commit(folder, manifest)
    return folder


def cut(values: torch.Tensor, borders: list[int]) -> list[Fragment]:
    """Slices of a flat tensor between the borders."""
    edges = sorted({0, *borders, values.numel()})
    return [Fragment("model/w", (values.numel(),), a, values[a:b].clone()) for a, b in itertools.pairwise(edges)]


@given(
    size=st.integers(1, 60), saved=st.lists(st.integers(0, 60), max_size=4),
    asked=st.tuples(*[st.integers(0, 60)] * 2), is_checked=st.booleans(),
)  # fmt: skip
def test_any_slice_is_read_back_however_it_was_cut(
    tmp_path_factory: pytest.TempPathFactory, size: int, saved: list[int], asked: tuple[int, int], is_checked: bool
) -> None:
    values = torch.arange(size, dtype=torch.float32)
    ranks = [[fragment] for fragment in cut(values, [min(b, size) for b in saved])]
    reader = fmt.CheckpointReader(write(tmp_path_factory.mktemp("c") / "step-00000001", ranks))
    low, high = sorted(min(a, size) for a in asked)
    wanted = Fragment("model/w", (size,), low, torch.empty(high - low))
    assert not reader.load([wanted], [file.path for file in reader.tensor_files()] if is_checked else ())
    assert torch.equal(wanted.values, values[low:high])


def tensors() -> list[Fragment]:
    generator = torch.Generator().manual_seed(0)
    return [
        Fragment("model/a", (3, 5), 0, torch.randn(15, generator=generator)),
        Fragment("model/b", (7,), 0, torch.randn(7, generator=generator).bfloat16()),
        Fragment("optimizer/a/step", (), 0, torch.tensor([4.0])),
    ]


def test_the_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    folder = write(tmp_path / "step-00000001", [tensors()])
    loaded = load_file(folder / "rank00000.safetensors")
    assert {name: value.tolist() for name, value in loaded.items()} == {
        f"{f.name}@0": f.values.tolist() for f in tensors()
    }


def test_a_flipped_bit_in_any_file_is_found(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", [tensors()])
    open_verified(whole)
    for path in sorted(whole.iterdir()):
        size = path.stat().st_size
        for offset in {0, size // 2, size - 1}:
            damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
            content = bytearray((damaged / path.name).read_bytes())
            content[offset] ^= 1
            (damaged / path.name).write_bytes(content)
            with pytest.raises(CorruptError):
                open_verified(damaged)
            shutil.rmtree(damaged)


def test_a_missing_or_truncated_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [tensors()])
    (folder / "rank00000.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"rank00000\.safetensors: cannot be read"):
        open_verified(folder)
    folder = write(tmp_path / "b", [tensors()])
    with (folder / fmt.STATE).open("r+b") as file:
        file.truncate(2)
    with pytest.raises(CorruptError, match=r"state\.json: has 2 bytes"):
        open_verified(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "link/passwd"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "step-00000001", [tensors()])
    (folder / "link").symlink_to("/etc")
    manifest = json.loads((folder / fmt.MANIFEST).read_text())
    manifest["files"][0]["path"] = name
    fmt.commit(folder, fmt.CheckpointManifest.model_validate(manifest))
    with pytest.raises(CorruptError, match="outside the folder"):
        fmt.CheckpointReader(folder)


def test_what_does_not_fit_is_refused_with_a_reason(tmp_path: Path) -> None:
    reader = fmt.CheckpointReader(write(tmp_path / "a", [tensors()]))
    with pytest.raises(UserError, match="holds no 'model/none'"):
        reader.load([Fragment("model/none", (1,), 0, torch.empty(1))], ())
    with pytest.raises(UserError, match=r"has shape \(3, 5\), the run wants \(5, 3\)"):
        reader.load([Fragment("model/a", (5, 3), 0, torch.empty(15))], ())


@pytest.mark.parametrize(("slices", "reason"), [
    ([(0, 4), (6, 4)], "gap or an overlap at value 4"), ([(0, 5), (0, 5)], "gap or an overlap at value 0"),
    ([(0, 4), (4, 4)], "has 8 of 10 values"), ([(0, 10), (0, 10)], "gap or an overlap"), ([(2, 8)], "at value 0"),
])  # fmt: skip
def test_fragments_that_are_not_the_whole_tensor_are_refused(
    tmp_path: Path, slices: list[tuple[int, int]], reason: str
) -> None:
    """Also where they have as many values as it: what is in none of them would be whatever lay in memory."""
    ranks = [[Fragment("model/w", (10,), start, torch.zeros(numel))] for start, numel in slices]
    reader = fmt.CheckpointReader(write(tmp_path / "c", ranks))
    with pytest.raises(CorruptError, match=reason):
        reader.load([Fragment("model/w", (10,), 0, torch.empty(10))], ())


def test_a_file_with_a_pickle_in_it_is_not_executed(tmp_path: Path) -> None:
    """Whoever can write the folder can write matching hashes; even then nothing is unpickled."""
    import os
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    folder = write(tmp_path / "step-00000001", [tensors()])
    (folder / "rank00000.safetensors").write_bytes(pickle.dumps(Bomb()))
    record = fmt.RankRecord.model_validate_json((folder / "rank00000.json").read_text())
    info = fmt.describe_file(folder, folder / "rank00000.safetensors")
    fmt.write_file(folder / "rank00000.json", record.model_copy(update={"files": (info,)}).model_dump_json())
    paths = [p for p in sorted(folder.iterdir()) if p.name not in (fmt.MANIFEST, fmt.MARKER)]
    files = tuple(fmt.describe_file(folder, path) for path in paths)
    before = fmt.CheckpointReader(folder).manifest
    fmt.commit(folder, before.model_copy(update={"files": files}))
    reader = open_verified(folder)
    [problem] = reader.load(tensors(), ())
    assert "rank00000.safetensors: cannot be read" in problem
    assert not (tmp_path / "exploded").exists()


def test_values_of_another_type_are_converted(tmp_path: Path) -> None:
    reader = fmt.CheckpointReader(write(tmp_path / "c", [tensors()]))
    wanted = [Fragment(f.name, f.shape, f.start, torch.empty(f.values.shape, dtype=torch.float64)) for f in tensors()]
    assert not reader.load(wanted, ())
    assert all(torch.equal(a.values, b.values.double()) for a, b in zip(wanted, tensors(), strict=True))


def test_pieces_of_any_size_end_in_the_right_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors begin and end anywhere in a piece; between two that are wanted, others lie that are not."""
    generator = torch.Generator().manual_seed(0)
    saved = [
        Fragment(f"model/{i}", (n,), 0, torch.randn(n, generator=generator)) for i, n in enumerate((5, 300, 1, 70))
    ]
    reader = fmt.CheckpointReader(write(tmp_path / "c", [saved]))
    for piece in (100, 1000, 4096, 8192):
        monkeypatch.setattr(direct_io, "PIECE_BYTES", piece)
        for names in itertools.product((False, True), repeat=4):
            for check, is_shared in itertools.product(([], ["rank00000.safetensors"]), (False, True)):
                chosen = [f for f, is_wanted in zip(saved, names, strict=True) if is_wanted]
                wanted = [Fragment(f.name, f.shape, 0, torch.zeros(f.values.shape)) for f in chosen]
                assert not reader.load(wanted, check, is_shared=is_shared)
                assert all(torch.equal(a.values, b.values) for a, b in zip(wanted, chosen, strict=True))


def test_what_is_loaded_is_hashed_on_the_way(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [tensors(), cut(torch.ones(9), [])])
    with (folder / "rank00001.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00")
    reader = fmt.CheckpointReader(folder)
    [problem] = reader.load([], [file.path for file in reader.tensor_files()])
    assert "rank00001.safetensors: content differs" in problem
    assert not reader.load(tensors(), ["rank00000.safetensors"])


@pytest.mark.parametrize("change", [
    {"data_offsets": [0, 1 << 60]}, {"data_offsets": [-8, 52]}, {"data_offsets": [60, 0]}, {"shape": [16]},
    {"dtype": "F64"}, {"dtype": "OBJECT"}, {"shape": [3, 5]}, {"more": 1},
])  # fmt: skip
def test_a_header_that_lies_reads_nothing_from_elsewhere(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write(tmp_path / "c", [tensors()])
    path = folder / "rank00000.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model/a@0"] |= change
    lying = json.dumps(header).encode()
    reader = fmt.CheckpointReader(folder)
    path.write_bytes(len(lying).to_bytes(8, "little") + lying + content[8 + length :])
    wishes = [tensor_reader.Wish("model/a@0", 15, 0, torch.empty(15))]
    with pytest.raises(CorruptError, match=r"header is wrong|its record says"):
        tensor_reader.read_file(path, wishes, whole=False, is_shared=False, report=lambda _bytes: None)
    [problem] = reader.load(tensors(), ())
    assert "rank00000.safetensors" in problem


@pytest.mark.parametrize("start", [b"", b"\xff" * 8, (10**6).to_bytes(8, "little"), b"\x02" + b"\x00" * 7 + b"[]"])
def test_a_file_that_is_no_tensor_file_is_refused(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(start)
    with pytest.raises(CorruptError, match="cannot be read: its"):
        wish = tensor_reader.Wish("a@0", 1, 0, torch.empty(1))
        tensor_reader.read_file(path, [wish], whole=True, is_shared=False, report=lambda _bytes: None)
