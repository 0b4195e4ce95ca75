"""A checkpoint from somebody else, with every hash right: nothing in it is run, and nothing outside of it is read."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import step_folder
from llmtrain.data.shards import FileInfo
from llmtrain.errors import CorruptError
from llmtrain.generate import main as generate
from llmtrain.verify import main as verify
from tests.conftest import Call, is_one_clear_line
from tests.faults.conftest import Launcher, config_of, copied

pytestmark = pytest.mark.slow


class Bomb:
    """Makes the file EXPLODED where it is unpickled."""

    def __init__(self, exploded: Path):
        self.exploded = exploded

    def __reduce__(self) -> Any:
        return Path.touch, (self.exploded,)


def pickled(path: Path, exploded: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(exploded)))


def torch_saved(path: Path, exploded: Path) -> None:
    torch.save({"model/head": Bomb(exploded)}, path)


def yaml_object(path: Path, exploded: Path) -> None:
    path.write_text(
        f'run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ["{exploded}"]]'
    )


def without_tensors(path: Path, _: Path) -> None:
    save_file({"other@0": torch.zeros(1)}, path)


def outside(path: Path, exploded: Path) -> None:
    """A link to a file that may be read only from where it lies."""
    whole = exploded.with_name(path.name)
    shutil.move(path, whole)
    path.symlink_to(whole)


def rehash(folder: Path) -> None:
    """Make every record and hash right again, as whoever prepared the folder would have done."""
    tensors = sorted(folder.glob("rank00000*.safetensors"))
    record = json.loads((folder / "rank00000.json").read_text())
    record["files"] = [fmt.describe_file(folder, path).model_dump() for path in tensors]
    (folder / "rank00000.json").write_text(json.dumps(record))
    manifest = json.loads((folder / fmt.MANIFEST).read_text())
    manifest["files"] = [fmt.describe_file(folder, folder / file["path"]).model_dump() for file in manifest["files"]]
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest)
    (folder / fmt.MANIFEST).write_text(text)
    (folder / fmt.MARKER).write_text(hashlib.sha256(text.encode()).hexdigest())


@pytest.fixture
def checkpoint(begun: Path, tmp_path: Path) -> Path:
    return step_folder(copied(begun, tmp_path / "run"), 4)


def assert_refused(launcher: Launcher, call: Call, data: Path, checkpoint: Path, reason: str) -> None:
    """Neither going on nor generating runs or uses it; both say why in one line."""
    ended = launcher.train(config_of(data, checkpoint.parent))
    last = ended.err.splitlines()[-1] + "\n"
    assert ended.code in (2, 4) and is_one_clear_line(last) and "Traceback" not in ended.err, ended.err
    code, _, error = call(generate, checkpoint, "--prompt", "The", "--max-new-tokens", 2)
    assert code in (2, 4) and is_one_clear_line(error), error
    assert reason in ended.err + error


@pytest.mark.parametrize(("name", "plant"), [
    ("rank00000.safetensors", pickled), ("rank00000.safetensors", torch_saved), ("config.yaml", yaml_object),
    ("state.json", pickled), ("config.yaml", pickled), ("tokenizer/llmtrain_tokenizer.json", pickled),
    ("rank00000.safetensors", outside), ("rank00000.safetensors", without_tensors),
])  # fmt: skip
def test_what_a_file_brings_along_is_not_run(
    launcher: Launcher, call: Call, data: Path, checkpoint: Path, tmp_path: Path, name: str,
    plant: Callable[[Path, Path], None],
) -> None:  # fmt: skip
    exploded = tmp_path / "exploded"
    plant(checkpoint / name, exploded)
    rehash(checkpoint)
    if name.startswith("tokenizer"):
        # To go on is right: a run takes its tokenizer from its data and never from the checkpoint.
        code, _, error = call(generate, checkpoint, "--prompt", "The")
        assert code in (2, 4) and is_one_clear_line(error), error
    elif name == "state.json":
        assert launcher.train(config_of(data, checkpoint.parent)).code == 4
    else:
        assert_refused(launcher, call, data, checkpoint, "outside" if plant is outside else name)
    assert not exploded.exists()


def test_the_bombs_are_live(tmp_path: Path) -> None:
    """Whoever did unpickle one would see it go off."""
    for plant, read in ((pickled, pickle.load), (torch_saved, lambda file: torch.load(file, weights_only=False))):
        plant(tmp_path / "bomb", tmp_path / "exploded")
        with (tmp_path / "bomb").open("rb") as file:
            read(file)
        (tmp_path / "exploded").unlink()


Lie = Callable[[dict[str, Any]], None]


def _elsewhere(record: dict[str, Any]) -> None:
    for tensor in record["tensors"].values():
        tensor["fragments"][0][0] = "../../outside.safetensors"


def _twice_the_half(record: dict[str, Any]) -> None:
    for tensor in record["tensors"].values():
        [[file, start, numel]] = tensor["fragments"]
        tensor["fragments"] = [[file, start, numel // 2]] * 2


def _longer(record: dict[str, Any]) -> None:
    for tensor in record["tensors"].values():
        tensor["fragments"][0][2] += 1


def _elsewhere_in_it(record: dict[str, Any]) -> None:
    for tensor in record["tensors"].values():
        tensor["fragments"][0][1] -= 1
        tensor["fragments"][0][2] += 1


def _cut(record: dict[str, Any]) -> None:
    for tensor in record["tensors"].values():
        [[file, start, numel]] = tensor["fragments"]
        tensor["fragments"] = [[file, 0, 1], [file, 1, numel - 1]] if numel > 1 else [[file, start, numel]]


@pytest.mark.parametrize(("lie", "reason"), [
    (_elsewhere, "not in the manifest"), (_twice_the_half, "gap or an overlap"), (_longer, "values"),
    (_elsewhere_in_it, "gap or an overlap"), (_cut, "its record says [1]"),
])  # fmt: skip
def test_a_record_that_lies_about_its_tensors(
    launcher: Launcher, call: Call, data: Path, checkpoint: Path, tmp_path: Path, lie: Lie, reason: str
) -> None:
    """The numbers of another place, or of no place at all, never get into the weights."""
    shutil.copy(checkpoint / "rank00000.safetensors", tmp_path / "outside.safetensors")
    record = json.loads((checkpoint / "rank00000.json").read_text())
    lie(record)
    (checkpoint / "rank00000.json").write_text(json.dumps(record))
    rehash(checkpoint)
    assert_refused(launcher, call, data, checkpoint, reason)


@pytest.mark.parametrize("name", [fmt.CONFIG, "rank00000.json"])
def test_a_manifest_that_leaves_out_what_is_read(
    launcher: Launcher, call: Call, data: Path, checkpoint: Path, name: str
) -> None:
    """No hash vouches for it then, and it may be a link to anywhere."""
    manifest = json.loads((checkpoint / fmt.MANIFEST).read_text())
    manifest["files"] = [file for file in manifest["files"] if file["path"] != name]
    write_manifest(checkpoint, manifest)
    assert_refused(launcher, call, data, checkpoint, f"lists no '{name}'")


def test_a_manifest_that_leaves_out_the_state(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / fmt.MANIFEST).read_text())
    manifest["files"] = [file for file in manifest["files"] if file["path"] != fmt.STATE]
    write_manifest(checkpoint, manifest)
    with pytest.raises(CorruptError, match=r"lists no 'state\.json'"):
        fmt.CheckpointReader(checkpoint).state()


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname"])
def test_a_manifest_that_names_files_outside(
    launcher: Launcher, call: Call, data: Path, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "outside").write_text("private")
    manifest = json.loads((checkpoint / fmt.MANIFEST).read_text())
    manifest["files"].append(FileInfo(path=name, bytes=7, sha256="0" * 64).model_dump())
    write_manifest(checkpoint, manifest)
    assert_refused(launcher, call, data, checkpoint, "outside the folder")
    assert call(verify, checkpoint)[0] == 4
