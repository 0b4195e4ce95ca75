"""Shared by all tests: small prepared data, a small config, and running the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from llmtrain.data.shard_writer import ShardWriter
from llmtrain.data.shards import MANIFEST, TOKENIZER_FOLDER, Manifest
from llmtrain.data.tokenizer import Tokenizer, fit_tokenizer, load_tokenizer, tokenizer_info
from llmtrain.errors import run_main
from llmtrain.health.signals import STOP_SIGNALS

# Machines differ in speed; a property does not.
hypothesis.settings.register_profile("llmtrain", deadline=None)
hypothesis.settings.load_profile("llmtrain")

SENTENCE = "the cat sat on a mat and then it ran to see who had come home with fish for tea"


def prose(characters: int, seed: int = 0) -> str:
    """Text with something to learn: words from a small list, sentences, lines."""
    generator = np.random.default_rng(seed)
    words = generator.choice(SENTENCE.split(), characters // 3)
    sentences = [" ".join(words[i : i + 9]).capitalize() + ".\n" for i in range(0, len(words), 9)]
    return "".join(sentences)[:characters]


def write_data(
    folder: Path,
    splits: dict[str, str],
    shard_tokens: int = 1 << 20,
    kind: str = "char",
    like: Path | Tokenizer | None = None,
) -> Path:
    """Prepared data from plain strings, through the real writer; `like`: with this tokenizer, or that of this data."""
    folder.mkdir(parents=True)
    if isinstance(like, Path):
        tokenizer = load_tokenizer(like / TOKENIZER_FOLDER)
    else:
        tokenizer = like or fit_tokenizer(kind, [splits["train"]], validation=[splits.get("val", "")])
    (folder / TOKENIZER_FOLDER).mkdir()
    tokenizer.save(folder / TOKENIZER_FOLDER)
    infos = {}
    for name, text in splits.items():
        writer = ShardWriter(folder, name, "uint16", shard_tokens)
        ids = tokenizer.encode(text)
        writer.append(ids, np.array([len(ids)]), len(text.encode()))
        infos[name] = writer.close()
    info = tokenizer_info(folder / TOKENIZER_FOLDER)
    manifest = Manifest(dtype="uint16", tokenizer=info, splits=infos, recipe={})
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 12,000 training characters in several shards, and 1,500 for validation."""
    splits = {"train": prose(12_000), "val": prose(1_500, seed=1)}
    return write_data(tmp_path_factory.mktemp("data") / "prose", splits, shard_tokens=5_000)


@pytest.fixture
def config_dict(data: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that takes a second or two: 187 windows of 64, 24 steps an epoch, float32."""
    return small_config(data, tmp_path / "run")


def small_config(data: Path, run_dir: Path) -> dict[str, Any]:
    """The config of `config_dict`, for any data and run folder."""
    return {
        "run": {"dir": str(run_dir)},
        "data": {"path": str(data), "seq_len": 64},
        "model": {"dim": 32, "layers": 2, "heads": 2},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 5},
        "training": {
            "micro_batch_size": 4, "global_batch_size": 8, "max_steps": 30, "precision": "fp32", "eval_every": 10,
            "compile": False,
        },
        "checkpoint": {"save_every": 10},
        "logging": {"every": 4, "plots": False},
    }  # fmt: skip


@pytest.fixture(scope="session")
def trained_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run (checkpoints at steps 10, 20 and 30); tests copy it before they change it."""
    from llmtrain.train import main

    folder = tmp_path_factory.mktemp("trained")
    config = folder / "config.yaml"
    config.write_text(json.dumps(small_config(data, folder / "run")))
    torch.set_num_threads(1)  # as `_one_thread` does, which comes later
    main(["--config", str(config)])
    return folder / "run"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave nothing in the user's, and find nothing there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Bitwise comparisons hold for any fixed number of threads; one makes the tests independent of the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A run that was told to stop ignores further signals to its end, and what a test starts would inherit that."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        if handler is not None:  # which is not Python's
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that runs the real command pays for importing torch each time."""
    for item in items:
        if "llmtrain" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def llmtrain(tmp_path: Path) -> Command:
    """Run `python -m llmtrain …` as a user would, in an empty folder."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmtrain", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        options = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 300, **options}
        return subprocess.run(command, env=environment, check=False, **options)

    return run


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a verb's `main` in this process as the command does; return its exit code, stdout and stderr."""

    def run(main: Callable[[list[str]], None], *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_main(main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that this process may not enter, also where the tests run as root; the last argument of a test."""
    with TemporaryDirectory() as parent:  # pytest's own are closed to everybody else, for reading too
        Path(parent).chmod(0o755)
        folder = Path(parent) / "closed"
        folder.mkdir()
        folder.chmod(0o000)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)


def is_one_clear_line(stderr: str) -> bool:
    """Whether a foreseen end was told as the contract says: one line, no traceback."""
    return stderr.startswith("llmtrain: error: ") and stderr.count("\n") == 1 and stderr.endswith("\n")


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The parsed lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
