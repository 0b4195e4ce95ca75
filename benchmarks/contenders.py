"""The trainers of `benchmarks.peers`: for each the command that a user would type, at one size, over the same ids."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT
from benchmarks.synthetic import write_random_data
from llmtrain.config import default_ff_dim
from llmtrain.data.shards import TokenDataset

DRIVERS = Path(__file__).parent / "peer_drivers"
WHOLE_RUN_STEPS = 10_000  # of which a turn as shipped takes the first: a run that is worth being compiled at 10m
STOPPED = 75  # how llmtrain ends where it was told to stop before the end of its run
BARE_LINE = re.compile(r"^step \d+ loss")


@dataclass(frozen=True)
class Size:
    """A model, its batch, and how many optimizer steps one turn takes, with a log line `every` so many of them."""

    dim: int
    layers: int
    heads: int
    vocab_size: int
    seq_len: int
    batch: int
    steps: int
    every: int


SIZES = {
    "tiny": Size(dim=64, layers=1, heads=2, vocab_size=256, seq_len=64, batch=4, steps=1000, every=10),
    "10m": Size(dim=256, layers=8, heads=4, vocab_size=8192, seq_len=256, batch=8, steps=30, every=5),
    "30m": Size(dim=384, layers=12, heads=6, vocab_size=16384, seq_len=512, batch=8, steps=30, every=5),
    "124m": Size(dim=768, layers=12, heads=12, vocab_size=50304, seq_len=1024, batch=12, steps=50, every=5),
}


@dataclass(frozen=True)
class Launch:
    """One process: what it trains, in which numbers, for how long, over which tokens, and where it writes."""

    size: Size
    precision: str  # fp32: and eager; as-shipped: what the trainer chooses itself
    device: str
    data: Path
    out: Path

    @property
    def is_fp32(self) -> bool:
        return self.precision == "fp32"


@dataclass(frozen=True)
class Command:
    arguments: list[str | Path]
    cwd: Path
    environment: dict[str, str] = field(default_factory=dict)
    exit_code: int = 0


@dataclass(frozen=True)
class Contender:
    """A trainer: its command, the line that it prints for each record, and the python and folder of its bare loop."""

    name: str
    model: str  # what peer_drivers/bare.py calls it
    python: str
    command: Callable[[Launch], Command]
    line: re.Pattern[str]
    folder: Path | None = None
    architecture: dict[str, Any] = field(default_factory=dict)  # where llmtrain trains the model of another

    def bare(self, launch: Launch) -> Command:
        """The bare loop over this trainer's model, in float32 and eager."""
        more = {"llmtrain_config": str(_llmtrain_config(launch, self.architecture)), "nanogpt": str(self.folder)}
        spec = _spec(launch, **more, litgpt_config=_litgpt_config(launch.size))
        # Found as `python -m llmtrain` finds it; the peers' python shall not see this repository.
        path = {"PYTHONPATH": str(ROOT)} if self.model == "llmtrain" else {}
        return Command([self.python, DRIVERS / "bare.py", self.model, spec], launch.out, path)


def llmtrain(name: str = "llmtrain", **architecture: Any) -> Contender:
    """This repository, over its own model, or with the keys of the `model` section that make it another's."""

    def command(launch: Launch) -> Command:
        config = _llmtrain_config(launch, architecture)
        arguments = [sys.executable, "-m", "llmtrain", "train", "--config", config]
        return Command(arguments, ROOT, exit_code=0 if launch.is_fp32 else STOPPED)

    line = re.compile(r"^record of step \d+/")
    return Contender(name, "llmtrain", sys.executable, command, line, architecture=architecture)


def llmtrain_as_gpt2() -> Contender:
    """llmtrain over nanoGPT's model, operator for operator."""
    gpt2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "qk_norm": False}
    return llmtrain("llmtrain, GPT-2", **gpt2)


def llmtrain_as_llama() -> Contender:
    """llmtrain over the model of litgpt and transformers."""
    return llmtrain("llmtrain, Llama", qk_norm=False)


def nanogpt(folder: Path) -> Contender:
    """nanoGPT from a checkout: `python train.py` in it, with the flags that size, data and device take."""

    def command(launch: Launch) -> Command:
        size = launch.size
        flags = {
            "dataset": launch.data,  # an absolute path stands for itself there
            "out_dir": launch.out,
            "device": launch.device,
            "n_layer": size.layers,
            "n_head": size.heads,
            "n_embd": size.dim,
            "block_size": size.seq_len,
            "batch_size": size.batch,
            "gradient_accumulation_steps": 1,
            "max_iters": size.steps - 1,
            "log_interval": size.every,
            "eval_interval": 10**9,
            "eval_iters": 1,  # before the first step it evaluates in any case
            "always_save_checkpoint": False,
        } | ({"dtype": "float32", "compile": False} if launch.is_fp32 else {})
        return Command([sys.executable, "train.py", *(f"--{name}={value}" for name, value in flags.items())], folder)

    return Contender("nanoGPT", "nanogpt", sys.executable, command, re.compile(r"^iter \d+:"), folder)


def litgpt(python: str) -> Contender:
    """`litgpt pretrain` with a data module over the token file; its torch.compile is switched off from outside."""

    def command(launch: Launch) -> Command:
        size = launch.size
        tokens = {"train": str(launch.data / "train.bin"), "val": str(launch.data / "val.bin")}
        config = {
            "model_config": _litgpt_config(size),
            "out_dir": str(launch.out),
            "data": {"class_path": "litgpt_tokens.TokenFiles", "init_args": tokens},
            "train": {
                "global_batch_size": size.batch,
                "micro_batch_size": size.batch,
                "max_tokens": size.steps * size.batch * size.seq_len,
                "log_interval": size.every,
                "save_interval": None,
                "max_norm": 1.0,
                "tie_embeddings": True,
            },
            "eval": {"interval": 10**9, "max_iters": 1, "final_validation": False},
            "devices": 1,
            "logger_name": "csv",
        } | ({"precision": "32-true"} if launch.is_fp32 else {})
        file = _write_json(launch.out / "litgpt.yaml", config)  # JSON is YAML
        eager = {"TORCH_COMPILE_DISABLE": "1"} if launch.is_fp32 else {}
        environment = {"PYTHONPATH": str(DRIVERS), **eager}
        return Command([python, "-m", "litgpt", "pretrain", "random", "--config", file], launch.out, environment)

    return Contender("litgpt", "litgpt", python, command, re.compile(r"\| iter \d+ step \d+ \|"))


def trainer(python: str) -> Contender:
    """The `transformers` Trainer over a Llama; float32 and eager is what it ships with."""

    def command(launch: Launch) -> Command:
        return Command([python, DRIVERS / "hf_trainer.py", _spec(launch)], launch.out)

    return Contender("transformers Trainer", "transformers", python, command, re.compile(r"^\{'loss'"))


def write_data(folder: Path, size: Size) -> Path:
    """The same random ids twice: as llmtrain prepares them, and as uint16 files with nanoGPT's `meta.pkl`."""
    tokens = max(2_000_000, 2 * size.steps * size.batch * size.seq_len)
    prepared = TokenDataset(write_random_data(folder / "prepared", tokens, size.vocab_size))
    for split in ("train", "val"):
        stream = prepared.split(split)
        stream.gather(np.array([0]), len(stream))[0].astype(np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": size.vocab_size}))
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout; None where there is no git, or the folder is in no repository."""
    if shutil.which("git") is None:
        return None
    asked = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _llmtrain_config(launch: Launch, architecture: dict[str, Any]) -> Path:
    size = launch.size
    steps = max(1, size.steps)
    chosen: dict[str, Any] = {"max_steps": WHOLE_RUN_STEPS, "stop_after": steps}
    if launch.is_fp32:
        chosen = {"max_steps": steps, "precision": "fp32", "compile": False}
    config = {
        "run": {"dir": str(launch.out / "run")},
        "data": {"path": str(launch.data / "prepared"), "seq_len": size.seq_len},
        "model": {
            **{key: getattr(size, key) for key in ("dim", "layers", "heads", "vocab_size")},
            "kv_heads": size.heads,
            "ff_dim": default_ff_dim(size.dim, architecture.get("activation", "swiglu")),
            **architecture,
        },
        "training": {
            "micro_batch_size": size.batch,
            "global_batch_size": size.batch,
            "eval_every": None,
            **chosen,
        },
        "checkpoint": {"save_every": None},
        "logging": {
            "every": size.every,
            "plots": False,
            "console": "quiet",
            "sinks": ["benchmarks.peer_drivers.record_lines:RecordLines"],
        },
    }
    return _write_json(launch.out / "llmtrain.yaml", config)


def _litgpt_config(size: Size) -> dict[str, Any]:
    """A Llama, as the other two of the four that are not GPT-2."""
    return {
        "name": "random",
        "block_size": size.seq_len,
        "n_layer": size.layers,
        "n_head": size.heads,
        "n_embd": size.dim,
        "vocab_size": size.vocab_size,
        "padded_vocab_size": size.vocab_size,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": default_ff_dim(size.dim, "swiglu"),
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
    }


def _spec(launch: Launch, **more: Any) -> Path:
    size = launch.size
    place = {"device": launch.device, "tokens": str(launch.data / "train.bin"), "out": str(launch.out)}
    spec = {**asdict(size), **place, "ff_dim": default_ff_dim(size.dim, "swiglu"), **more}
    return _write_json(launch.out / "spec.json", spec)


def _write_json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path
