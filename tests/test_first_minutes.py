"""What goes wrong in the first ten minutes: each ends in one clear line that says what to do, and exit code 2."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain import cli
from tests.conftest import Call, is_one_clear_line, prose, write_data

ROOT = Path(__file__).parents[1]
TRAIN = "train --config configs/debug.yaml"
MINE = f"{TRAIN} data.path=data/mine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a newcomer has: the configs, some text, some of it prepared, and some files that are no text."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_data(folder / "data/mine", {"train": prose(4_000), "val": prose(500, seed=1)})
    write_data(folder / "data/tiny", {"train": "cat", "val": "a"})
    for name in ("empty", "binaries", "checkpoints"):
        (folder / name).mkdir()
    for name in ("one", "two"):  # what is left of a run whose checkpoints were deleted is a run
        (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs/one/run.json").write_text('{"launches": []}')
    (folder / "runs/two/step-00000009").mkdir()
    (folder / "runs/two/step-00000009/COMMITTED").touch()
    for name, content in {
        "text.txt": b"hello world\n" * 50, "nothing.txt": b"", "binary.txt": b"\x00\xff" * 50,
        "binaries/a.bin.txt": b"\x00" * 9,
        "open.yaml": b"model: {dim: 64\n", "tab.yaml": b"model:\n\tdim: 3\n", "words.yaml": b"just words\n",
        "text.yaml": b"optimizer: {lr: fast}\n", "binary.yaml": b"\xff\xfe\x00", "other.jsonl": b'{"body": "x"}\n',
        "broken.jsonl": b"not json\n",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(("line", "reason"), [
    ("trian", "unknown verb 'trian': did you mean 'train'?"),
    ("train", "add --config FILE; the demo is: llmtrain prepare --input stdlib --out data/stdlib && llmtrain train"),
    ("train data.path=data/mine", "train needs a config: add --config FILE"),
    ("train configs/debug.yaml", "write --config configs/debug.yaml"),
    ("train --config configs/debug.yml", "No such file or directory; did you mean 'configs/debug.yaml'?"),
    ("train --config configs", "Is a directory; there are configs/1.3b.yaml, "),
    ("train --config binary.yaml", "not a text file in UTF-8, so not a config"),
    ("train --config open.yaml", "open.yaml:2: not valid YAML: expected ',' or '}'"),
    ("train --config tab.yaml", "'\\t' that cannot start any token; indent with blanks"),
    ("train --config words.yaml", "must hold sections such as 'model:'"),
    ("train --config text.yaml", "optimizer.lr: should be a number (given: 'fast')"),
    (TRAIN, "data/stdlib: not prepared data (no such folder); make it: llmtrain prepare --input stdlib"),
    (f"{TRAIN} data.path=data/yours", "make it: llmtrain prepare --input YOUR_TEXTS --out data/yours"),
    (f"{TRAIN} data.path=empty", "no manifest.json in it"),
    (f"{TRAIN} data.path=text.txt", "a file, not prepared data; make it: llmtrain prepare --input text.txt"),
    (f"{TRAIN} data.path=data/tiny", "one window takes 65; lower data.seq_len or prepare more"),
    (f"{MINE} data.seq_len=100000", "data.seq_len 100000 is longer than the data"),
    (f"{MINE} lr=3", "write it as section.key=value without blanks, such as optimizer.lr=3e-4"),
    (f"{MINE} training.max_steps= 5", "override '5': write it as section.key=value without blanks"),
    (f"{MINE} --lr 3", "; keys of the config are written section.key=value"),
    (f"{MINE} optimizer.lrr=3", "unknown key 'optimizer.lrr': did you mean 'lr'?"),
    (f"{MINE} training.max_steps=many", "training.max_steps: should be a whole number (given: 'many')"),
    (f"{MINE} training.max_steps=1.5", "training.max_steps: should be a whole number (given: 1.5)"),
    (f"{MINE} logging.csv=perhaps", "logging.csv: should be true or false (given: 'perhaps')"),
    (f"{MINE} training.micro_batch_size=5", "global_batch_size 16 is not divisible by micro_batch_size 5"),
    (f"{MINE} training.precision=fp16", "should be 'auto', 'fp32' or 'bf16' (given: 'fp16')"),
    (f"{MINE} model.heads=3", "dim 64 is not divisible by heads 3"),
    (f"{MINE} model.preset=gpt2", "model.preset 'gpt2': known: 1.3b, "),
    (f"{MINE} model.vocab_size=5", "model.vocab_size 5 is smaller than the "),
    (f"{MINE} training.fp8=true", "training.fp8 "),
    (f"{MINE} run.dir=text.txt", "text.txt: cannot be written: text.txt is not a folder; choose another run.dir"),
    (f"{MINE} --resume checkpoints/none", "checkpoints/none"),
    ("prepare text.txt", "unrecognized arguments: text.txt; what to read is given by --input"),
    ("prepare --input empty --out data/new", "empty: a folder without files"),
    ("prepare --input none --out data/new", "none: no such file or folder"),
    ("prepare --input nothing.txt --out data/new", "nothing.txt: the file is empty"),
    ("prepare --input binary.txt --out data/new", "binary.txt: a binary file (NUL byte at offset 0), not UTF-8 text"),
    ("prepare --input binaries --out data/new", "binaries: no text in it (1 binary files)"),
    ("prepare --input other.jsonl --out data/new", "--text-field"),
    ("prepare --input broken.jsonl --out data/new", "broken.jsonl"),
    ("prepare --input text.txt --tokenizer gpt2 --out data/new", "unknown tokenizer 'gpt2': known: bbpe, "),
    ("prepare --input text.txt --val-split 2 --out data/new", "must be at least 0 and under 1, not 2"),
    ("prepare --input text.txt --out data/mine", "choose another --out or delete it"),
    ("generate", "the following arguments are required: PATH"),
    ("generate checkpoints", "checkpoints: no finished checkpoint in it; give a run folder"),
    ("generate checkpoints/none --prompt hi", "checkpoints/none: no such folder; give a run folder"),
    ("generate data/mine", "data/mine: "),
    ("evaluate checkpoints/none", "no such folder; give a run folder"),
    ("export checkpoints/none --out model", "no such folder; give a run folder"),
    *((f"{verb} runs", "runs: a folder of runs, as llmtrain report runs/one runs/two shows; ") for verb in (
        "report", "verify", "generate --prompt hi", "evaluate", "export --out model", "tokenizer",
    )),
    ("report checkpoints/none", "checkpoints/none: no such folder; name a run"),
    ("verify none", "none: no such folder"),
    ("tokenizer none", "none: no such folder"),
    ("doctor --overfit", "add --config FILE"),
    ("completion powershell", "choose from 'bash', 'zsh', 'fish'"),
])  # fmt: skip
def test_it_ends_in_one_line_that_helps(
    line: str, reason: str, folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = sorted(folder.rglob("*"))
    code, _, err = call(cli.main, *line.split())
    assert code == 2, err
    assert is_one_clear_line(err) and reason in err
    assert sorted(folder.rglob("*")) == before, "nothing is left behind"


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "trains"), [("y", True), ("", False)])
def test_at_a_terminal_the_demo_is_offered(answer: str, trains: bool, data: Path, tmp_path: Path) -> None:
    """A demo of a second: the folder has a config of that name, and data in its place."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text(
        "data: {seq_len: 32}\nmodel: {dim: 16, layers: 1, heads: 1}\nlogging: {plots: false}\n"
        "training: {micro_batch_size: 4, global_batch_size: 4, max_steps: 2, eval_every: null, compile: false}\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data/stdlib").symlink_to(data)
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llmtrain", "train"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment, text=True
    )
    os.close(theirs)
    _, err = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == (0 if trains else 2), err
    assert (tmp_path / "checkpoints/final").exists() is trains
    if not trains:
        assert err.strip().endswith("the demo is: llmtrain train --config configs/demo.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "words"), [
    ("launch/none.yaml", "none.yaml"), ("launch/ddp.yaml", "training.global_batch_size 16 is not divisible"),
])  # fmt: skip
def test_a_launch_that_cannot_be_is_told(launch: str, words: str, folder: Path) -> None:
    """Of Accelerate's own errors the last line at least; a launch file for GPUs starts on a CPU, too."""
    (folder / "launch").exists() or (folder / "launch").symlink_to(ROOT / "launch")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch, "--num_processes", "3", "-m",
        "llmtrain.train", *MINE.split()[1:], "--dry-run",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and words in done.stderr
