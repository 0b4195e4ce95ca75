"""Damaged files: a launch goes back to the newest whole checkpoint, or says what is wrong; never other numbers."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import committed_steps, step_folder
from llmtrain.data.outside import SAMPLE_BYTES, SAMPLES
from llmtrain.data.shards import MANIFEST
from llmtrain.verify import main as verify
from tests.conftest import Call, is_one_clear_line, prose, write_data
from tests.faults.conftest import (
    Config,
    Launcher,
    assert_as_undisturbed,
    config_of,
    contents,
    copied,
    numbers,
    two_ranks,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LONG = bool(os.environ.get("LLMTRAIN_LONG_TESTS"))


@pytest.fixture(scope="module")
def six(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints at steps 2, 4 (the best) and 6, where it was stopped."""
    run_dir = tmp_path_factory.mktemp("six") / "run"
    assert launcher.train(config_of(data, run_dir, keep_last=9), "training.stop_after=6").code == 75
    assert committed_steps(run_dir) == [2, 4, 6]
    return run_dir


@pytest.fixture
def config(data: Path, tmp_path: Path, six: Path) -> Config:
    """Of a copy of that run."""
    copied(six, tmp_path / "run")
    return config_of(data, tmp_path / "run", keep_last=9)


def flip(path: Path, place: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    size = len(content)
    if place is None:  # of tensors a number, which no parser would miss
        place = random.Random(path.name).randrange(size - size // 4 if path.suffix == ".safetensors" else 0, size)
    content[place] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGES = {"flipped byte": flip, "truncated": truncate, "missing": Path.unlink}
FILES = [
    "COMMITTED", "manifest.json", "state.json", "config.yaml", "rank00000.json", "rank00000.safetensors",
    "rank00000-1.safetensors", "rank00000-2.safetensors", "tokenizer/llmtrain_tokenizer.json",
]  # fmt: skip


def test_these_are_all_files_of_a_checkpoint(six: Path) -> None:
    folder = step_folder(six, 6)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(FILES)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_the_newest_checkpoint(
    launcher: Launcher, config: Config, undisturbed: Path, call: Call, name: str, damage: str
) -> None:
    """It is named, the run goes on from the one before, and what is damaged is set aside, not deleted."""
    run_dir = Path(config["run"]["dir"])
    folder = step_folder(run_dir, 6)
    DAMAGES[damage](folder / name)
    unmarked = name == "COMMITTED" and damage == "missing"
    if not unmarked:  # without its marker it does not exist
        code, out, _ = call(verify, run_dir)
        assert code == 4 and [line[:4] for line in out.splitlines()] == ["ok  ", "ok  ", "FAIL"]
        assert str(folder) in out.splitlines()[2]
    ended = launcher.train(config)
    assert ended.code == 0 and "after step 4\n" in ended.out
    assert str(folder) in ended.err and ("unfinished" if unmarked else "going back to an older") in ended.err
    assert len(list(run_dir.glob("step-00000006.aside-*"))) == (not unmarked)
    assert committed_steps(run_dir) == [2, 4, 6, 8]
    assert numbers(run_dir) == numbers(undisturbed)
    last = "step-00000008/rank00000.safetensors"
    assert contents(run_dir)[last] == contents(undisturbed)[last]
    assert call(verify, run_dir)[0] == 0


OF_THE_SECOND_RANK = [
    (name, damage) for name in ("rank00001.json", "rank00001.safetensors", "rank00001-1.safetensors")
    for damage in DAMAGES
]  # fmt: skip
SHORT = [("rank00001.json", "missing"), ("rank00001.safetensors", "flipped byte"),
         ("rank00001-1.safetensors", "flipped byte"), ("rank00001-1.safetensors", "truncated")]  # fmt: skip


@pytest.fixture(scope="module")
def six_of_two(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same from two ranks."""
    run_dir = tmp_path_factory.mktemp("six-of-two") / "run"
    ended = launcher.train_ranks(2, two_ranks(data, run_dir, keep_last=9), "training.stop_after=6")
    assert [one.code for one in ended] == [75, 75]
    names = {path.name for path in step_folder(run_dir, 6).iterdir()}
    assert {name for name, _ in OF_THE_SECOND_RANK} <= names
    assert {name.replace("rank00000", "rank00001") for name in names} <= names
    return run_dir


@pytest.mark.parametrize(("name", "damage"), OF_THE_SECOND_RANK if LONG else SHORT)
def test_a_damaged_file_of_the_second_rank(
    launcher: Launcher, data: Path, tmp_path: Path, six_of_two: Path, undisturbed_two: Path, call: Call, name: str,
    damage: str,
) -> None:  # fmt: skip
    """Whichever rank finds it, both go back to the same checkpoint."""
    run_dir = copied(six_of_two, tmp_path / "run")
    folder = step_folder(run_dir, 6)
    DAMAGES[damage](folder / name)
    code, out, _ = call(verify, run_dir)
    assert code == 4 and [line[:4] for line in out.splitlines()] == ["ok  ", "ok  ", "FAIL"]
    assert f"{folder}/{name}" in out.splitlines()[2]
    ended = launcher.train_ranks(2, two_ranks(data, run_dir, keep_last=9))
    assert [one.code for one in ended] == [0, 0] and "after step 4\n" in ended[0].out, ended
    assert f"{folder}/{name}" in ended[0].err and "going back to an older" in ended[0].err
    assert len(list(run_dir.glob("step-00000006.aside-*"))) == 1
    assert committed_steps(run_dir) == [2, 4, 6, 8]
    assert numbers(run_dir) == numbers(undisturbed_two)
    for last in (f"step-00000008/{name}" for name, _ in OF_THE_SECOND_RANK if name.endswith(".safetensors")):
        assert contents(run_dir)[last] == contents(undisturbed_two)[last]
    assert call(verify, run_dir)[0] == 0


def test_no_checkpoint_is_whole(launcher: Launcher, config: Config) -> None:
    """Exit code 4, one line, and the folder as it was: what is there may still be saved by hand."""
    run_dir = Path(config["run"]["dir"])
    for step, name in ((2, "state.json"), (4, "rank00000.safetensors"), (6, "manifest.json")):
        flip(step_folder(run_dir, step) / name)
    before = contents(run_dir)
    ended = launcher.train(config)
    lines = ended.err.splitlines()
    assert ended.code == 4 and [line.split(":")[1] for line in lines] == [" warning"] * 3 + [" error"]
    assert "none of its 3 checkpoints is good" in lines[-1]
    assert contents(run_dir) == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [
    "config.yaml", "run.json", "training_metrics.json", "training_log.csv", "best", "latest",
])  # fmt: skip
def test_a_damaged_view_or_link_in_the_run_folder_is_made_again(
    launcher: Launcher, config: Config, undisturbed: Path, name: str, damage: str
) -> None:
    """None of them decides about numbers; what cannot be made again (run.json) is set aside with a word."""
    run_dir = Path(config["run"]["dir"])
    if (run_dir / name).is_symlink() and damage != "missing":
        (run_dir / name).unlink()
        (run_dir / name).symlink_to({"flipped byte": "step-00000014", "truncated": "step-000"}[damage])
    else:
        DAMAGES[damage](run_dir / name)
    ended = launcher.train(config)
    assert ended.code == 0, ended.err
    assert numbers(run_dir) == numbers(undisturbed)
    assert (run_dir / "training_metrics.json").read_bytes() == (undisturbed / "training_metrics.json").read_bytes()
    for link in ("best", "latest", "final"):
        assert (run_dir / link).readlink() == (undisturbed / link).readlink()


@pytest.mark.parametrize("place", ["digit", "comma", "line"])
def test_records_that_are_not_those_of_the_checkpoint_are_told_of(
    launcher: Launcher, config: Config, place: str
) -> None:
    """metrics.jsonl is the one file that nothing else could make again: what changed in it is said."""
    path = Path(config["run"]["dir"]) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if place == "line":
        del lines[2]
    else:
        begin = lines[2].index('"train_loss": ') + len('"train_loss": ')
        lines[2] = lines[2][:begin] + "9" + lines[2][begin + 1 :] if place == "digit" else lines[2].replace(",", "l", 1)
    path.write_text("".join(lines))
    ended = launcher.train(config, "training.stop_after=7")
    assert ended.code == 75
    assert "metrics.jsonl: not what was written up to step 6" in ended.out + ended.err
    again = launcher.train(config)
    assert again.code == 0 and "not what was written" not in again.out + again.err


def test_a_damaged_tokenizer_of_the_data_gets_into_no_checkpoint(
    launcher: Launcher, data: Path, config: Config, tmp_path: Path
) -> None:
    """Two letters exchanged: a tokenizer that loads, and would name every text otherwise."""
    config["data"]["path"] = str(shutil.copytree(data, tmp_path / "data"))
    path = tmp_path / "data" / "tokenizer" / "llmtrain_tokenizer.json"
    text = path.read_text()
    assert "ac" in text
    path.write_text(text.replace("ac", "ca", 1))
    ended = launcher.train(config)
    assert ended.code == 4 and is_one_clear_line(ended.err) and str(path) in ended.err


def test_a_flipped_byte_in_the_data_is_found_by_verify_and_on_the_pages_that_are_looked_at_by_the_next_launch(
    launcher: Launcher, tmp_path: Path, call: Call
) -> None:
    """That launch changes nothing; once the byte is as it was, the same command ends as if nothing had been."""
    texts = {"train": prose(12_000), "val": prose(1_500, seed=1)}
    folder = write_data(tmp_path / "data", texts)  # one shard, of which less than all is looked at
    shard, tokenizer = folder / "train-00000.bin", folder / "tokenizer" / "llmtrain_tokenizer.json"
    whole, begun, run_dir = (tmp_path / name for name in ("whole", "begun", "run"))
    assert launcher.train(config_of(folder, whole)).code == 0
    assert launcher.train(config_of(folder, begun), "training.stop_after=4").code == 75
    config, size, dice = config_of(folder, copied(begun, run_dir)), shard.stat().st_size, random.Random(0)
    pages = [(size - SAMPLE_BYTES) * number // (SAMPLES - 1) for number in range(SAMPLES)]
    looked_at = {place for begin in pages for place in range(begin, begin + SAMPLE_BYTES)}
    others = sorted({*range(size)} - looked_at)
    assert len(others) > size // 5
    most = 40 if LONG else 3
    places = [(shard, place) for place in (pages[0], size - 1, *dice.sample(sorted(looked_at), most))]
    places += [(tokenizer, place) for place in dice.sample(range(tokenizer.stat().st_size), most)]
    before = contents(run_dir), numbers(run_dir)
    for path, place in places:
        flip(path, place)
        code, out, _ = call(verify, folder)
        assert code == 4 and f"FAIL  {path}: " in out, (path, place, out)
        ended = launcher.train(config)
        assert ended.code == 4 and is_one_clear_line(ended.err) and str(path) in ended.err, (path, place, ended)
        assert (contents(run_dir), numbers(run_dir)) == before
        flip(path, place)
    for place in dice.sample(others, most):
        flip(shard, place)
        code, out, _ = call(verify, folder)
        assert code == 4 and f"FAIL  {shard}: " in out, (place, out)
        flip(shard, place)
    assert launcher.train(config).code == 0
    assert_as_undisturbed(run_dir, whole)


def test_a_flipped_byte_in_the_manifest_of_the_data(
    launcher: Launcher, data: Path, config: Config, tmp_path: Path, undisturbed: Path, six: Path
) -> None:
    """Refused in one line, or without effect (how the data was made); never other numbers."""
    config["data"]["path"] = str(shutil.copytree(data, tmp_path / "data"))
    path = tmp_path / "data" / MANIFEST
    whole, codes = path.read_bytes(), set()
    for place in range(7, len(whole), len(whole) // (200 if LONG else 8)):
        flip(path, place)
        copied(six, tmp_path / "run")
        ended = launcher.train(config)
        codes.add(ended.code)
        if ended.code == 0:
            assert numbers(tmp_path / "run") == numbers(undisturbed), place
        else:
            assert ended.code in (2, 4) and is_one_clear_line(ended.err), (place, ended.err)
        path.write_bytes(whole)
    assert codes & {2, 4}
