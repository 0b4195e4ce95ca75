"""The shape of the code is a promise too: short files, short functions, arrows that point one way, one seam."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "llmtrain").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
VERBS = {
    "prepare",
    "train",
    "generate",
    "evaluate",
    "export",
    "report",
    "plan",
    "tokenizer",
    "doctor",
    "verify",
    "completion",
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it: at the top, in a function, or for typing."""
    names: set[str] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_there_are_no_import_circles() -> None:
    edges = {module: imported(path) & MODULES.keys() - {module} for module, path in MODULES.items()}

    def reached_from(module: str) -> set[str]:
        found: set[str] = set()
        waiting = list(edges[module])
        while waiting:
            if (here := waiting.pop()) not in found:
                found.add(here)
                waiting += edges[here]
        return found

    assert [module for module in MODULES if module in reached_from(module)] == []


def test_only_the_engine_knows_accelerate_and_deepspeed() -> None:
    outside = [path for path in FILES if "engine" not in path.parts]
    users = {
        path.name for path in outside for name in imported(path) if name.split(".")[0] in ("accelerate", "deepspeed")
    }
    assert users == set()


def test_verbs_do_not_import_verbs() -> None:
    for verb in VERBS:
        others = {f"llmtrain.{other}" for other in VERBS - {verb}}
        assert not imported(MODULES[f"llmtrain.{verb}"]) & others


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < (150 if path.name == "train.py" else 500)
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "pydantic", "yaml", "accelerate", "rich", "matplotlib"}
    code = f"import sys, llmtrain.cli; llmtrain.cli.main(['--help']); assert not {heavy} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(verb in result.stdout for verb in VERBS)


# The first three take nearly as long to import as torch itself: its compiler and what that needs.
UNUSED = {
    "torch._dynamo", "torch._inductor", "networkx", "deepspeed", "matplotlib", "wandb", "tensorboard", "pyarrow",
    "pandas", "datasets", "transformers", "tokenizers", "sentencepiece", "gigatoken", "rich", "fsspec",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("muon", "fp32"), ("adamw", "bf16")])
def test_up_to_its_first_record_a_launch_imports_nothing_that_it_does_not_use(
    config_dict: dict[str, Any], tmp_path: Path, optimizer: str, precision: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_dict))
    code = f"""
import sys, llmtrain.cli
from llmtrain.run import Run
def log(self, *_):
    print("found:", *sorted({UNUSED} & set(sys.modules)))
    raise KeyboardInterrupt
Run.log = log
llmtrain.cli.main(["train", "--config", {str(config)!r}, "optimizer.name={optimizer}",
    "training.precision={precision}", "logging.every=1"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert [line for line in result.stdout.splitlines() if line.startswith("found:")] == ["found:"], result.stderr
