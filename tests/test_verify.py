"""verify: whole data and checkpoints pass, any changed byte is named, and nothing else is taken for either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data.shards import MANIFEST, hash_file
from llmtrain.verify import main
from tests.conftest import Call, Command, is_one_clear_line


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run", symlinks=True))


def flip(path: Path, place: int = -1) -> None:
    """Change one bit; an empty file gets a byte."""
    content = bytearray(path.read_bytes() or b"\0")
    content[place] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def problems(call: Call, path: Path, count: int = 1) -> list[str]:
    """Check the two forms of the report of a damaged folder; return its problems."""
    code, out, err = call(main, path)
    assert code == 4 and is_one_clear_line(err) and f"{count} problem" in err
    told = [line.removeprefix("FAIL  ") for line in out.splitlines() if line.startswith("FAIL  ")]
    code, out, err = call(main, path, "--json")
    assert code == 4 and is_one_clear_line(err)
    report = json.loads(out)
    assert report["ok"] is False
    assert [problem for checked in report["checked"] for problem in checked["problems"]] == told
    assert len(told) == count
    return told


def test_what_is_whole_passes(call: Call, data: Path, trained_run: Path) -> None:
    for path, folders in [(data, 1), (trained_run / "step-00000010", 1), (trained_run / "best", 1), (trained_run, 3)]:
        code, out, err = call(main, path)
        assert (code, err) == (0, "")
        assert [line[:6] for line in out.splitlines()] == ["ok    "] * folders
        code, out, _ = call(main, path, "--json")
        report = json.loads(out)
        assert code == 0 and report["ok"] is True
        assert all(checked["files"] >= 4 and checked["bytes"] > 0 for checked in report["checked"])


def test_any_changed_file_of_data_is_named(call: Call, data: Path, tmp_path: Path) -> None:
    files = [path.relative_to(data) for path in sorted(data.rglob("*")) if path.is_file() and path.name != MANIFEST]
    assert len(files) >= 7
    for index, name in enumerate(files):
        damaged = Path(shutil.copytree(data, tmp_path / str(index)))
        flip(damaged / name)
        [problem] = problems(call, damaged)
        assert str(damaged / name) in problem


def test_document_ends_out_of_order_are_found_though_the_hash_is_right(call: Call, copy: Path) -> None:
    path = copy / "val-00000.ends"
    np.array([1501], "<i8").tofile(path)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["splits"]["val"]["shards"][0]["ends"]["sha256"] = hash_file(path)
    rewrite(copy, splits=manifest["splits"])
    assert problems(call, copy) == [f"{path}: not the rising ends of 1 documents"]


def test_any_changed_file_of_a_checkpoint_is_named(call: Call, trained_run: Path, tmp_path: Path) -> None:
    checkpoint = trained_run / "step-00000010"
    files = [path.relative_to(checkpoint) for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert len(files) >= 7
    for index, name in enumerate(files):
        damaged = Path(shutil.copytree(checkpoint, tmp_path / str(index)))
        flip(damaged / name)
        [problem] = problems(call, damaged)
        assert str(damaged / (MANIFEST if name.name == "COMMITTED" else name)) in problem


def test_every_problem_has_its_line_and_the_other_checkpoints_are_checked_too(call: Call, run_copy: Path) -> None:
    flip(run_copy / "step-00000010" / "rank00000.safetensors")
    (run_copy / "step-00000020" / "state.json").unlink()
    flip(run_copy / "step-00000020" / "config.yaml")
    told = problems(call, run_copy, count=3)
    assert [line.split("/step-")[1].split(":")[0] for line in told] == [
        "00000010/rank00000.safetensors", "00000020/state.json", "00000020/config.yaml",
    ]  # fmt: skip
    assert "ok    " + str(run_copy / "step-00000030") in call(main, run_copy)[1]


def test_missing_and_truncated_shards_are_named(call: Call, copy: Path) -> None:
    (copy / "train-00000.bin").write_bytes((copy / "train-00000.bin").read_bytes()[:-10])
    (copy / "train-00001.bin").unlink()
    first, second = problems(call, copy, count=2)
    assert "train-00000.bin: has 9990 bytes where the manifest says 10000" in first
    assert "train-00001.bin: cannot be read" in second


def test_ids_outside_the_vocabulary_are_found_though_the_hash_is_right(call: Call, copy: Path) -> None:
    path = copy / "train-00001.bin"
    ids = np.fromfile(path, "<u2")
    ids[1234], ids[2345] = 70, 71
    ids.tofile(path)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][1]["ids"]["sha256"] = hash_file(path)
    rewrite(copy, splits=manifest["splits"])
    [problem] = problems(call, copy)
    assert f"{path}: token id 70 at position 1234 is outside the vocabulary of" in problem


def test_counts_that_do_not_add_up_are_found(call: Call, copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["splits"]["val"]["tokens"] += 1
    rewrite(copy, splits=manifest["splits"])
    [problem] = problems(call, copy)
    assert problem == f"{copy / MANIFEST}: the val split counts 1501 tokens, its shards 1500"


def test_a_manifest_is_not_followed_out_of_its_folder(call: Call, copy: Path) -> None:
    text = (copy / MANIFEST).read_text().replace('"train-00000.bin"', '"../train-00000.bin"')
    (copy / MANIFEST).write_text(text)
    assert "lies outside the folder" in problems(call, copy)[0]


def test_a_damaged_manifest_is_corrupt_not_unknown(call: Call, copy: Path, run_copy: Path) -> None:
    for folder in (copy, run_copy / "step-00000010"):
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-5])
        assert str(folder / MANIFEST) in problems(call, folder)[0]


@pytest.mark.slow
def test_anything_else_is_refused_in_one_line(call: Call, llmtrain: Command, run_copy: Path, tmp_path: Path) -> None:
    (run_copy / "step-00000010" / "COMMITTED").unlink()
    for name in ("other", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / MANIFEST).write_text('{"manifest_version": 3}')
    for path, message in [
        (tmp_path / "none", "no such folder"),
        (tmp_path, "a folder of runs"),
        (tmp_path / "empty", "neither prepared data nor a checkpoint nor a run"),
        (tmp_path / "other", "belongs neither to prepared data nor to a checkpoint"),
        (run_copy / "step-00000010", "an unfinished checkpoint"),
    ]:
        code, out, err = call(main, path)
        assert code == 2 and is_one_clear_line(err) and message in err
        assert out == ""
    result = llmtrain("verify", tmp_path / "none", "--json")
    assert result.returncode == 2 and is_one_clear_line(result.stderr) and result.stdout == ""
    flip(run_copy / "step-00000020" / "state.json")
    result = llmtrain("verify", run_copy / "step-00000020")
    assert result.returncode == 4 and is_one_clear_line(result.stderr)
