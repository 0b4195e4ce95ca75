"""The guide docs/distributed.md tells the truth: its commands run as written, its table is the code's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs import memory_table
from llmtrain.config import load_config
from llmtrain.resolve import resolve
from tests.distributed.launching import environment, free_port

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    """The code blocks that begin with ```KIND."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)
    return [text for kind_of, text in found if kind_of == kind]


def on_gpus() -> list[list[str]]:
    """The words of each launch on GPUs."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("accelerate launch")]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a fresh checkout, in which the commands are run."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it as written, on ports that are free here."""
    prefix = f'accelerate() {{ command accelerate launch --main_process_port {free_port()} "${{@:2}}"; }}\n'
    script = script.replace("--main_process_port 29511", f"--main_process_port {free_port()}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", prefix + script], cwd=folder, capture_output=True, text=True, timeout=550,
        check=False, env=environment(PATH=path),
    )  # fmt: skip


@pytest.mark.slow
def test_the_commands_run_as_written(here: Path) -> None:
    (script,) = blocks("bash guide")
    done = run(script, here)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lengths = {"one": 20, "two": 30, "four": 20}
    for name, steps in lengths.items():
        metrics = json.loads((here / "checkpoints" / name / "training_metrics.json").read_text())
        assert metrics["steps"][-1] == steps, name
    assert not (here / "checkpoints/three").exists(), "a dry run writes nothing"
    launches = json.loads((here / "checkpoints/two/run.json").read_text())["launches"]
    assert len(launches) == 2, "the second command goes on with the run of the first"


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_with_these_words(here: Path, data: Path) -> None:
    (script,) = blocks("bash refused")
    promised = next(line for block in blocks("") for line in block.splitlines() if line.startswith("llmtrain: error"))
    done = run(f"{script.strip()} data.path={data}", here)
    assert done.returncode == 1
    assert promised in done.stderr.splitlines()


@pytest.mark.parametrize("words", on_gpus(), ids=lambda words: words[3])
def test_the_launches_on_gpus_fit_their_configs(words: list[str]) -> None:
    """Launch file and config exist, and the batch divides by the processes."""
    launch = yaml.safe_load((ROOT / words[words.index("--config_file") + 1]).read_text())
    processes = (
        int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else launch["num_processes"]
    )
    machines = int(words[words.index("--num_machines") + 1]) if "--num_machines" in words else launch["num_machines"]
    assert processes % machines == 0
    config = load_config(ROOT / words[words.index("--config") + 1], words[words.index("--config") + 2 :])
    resolve(
        config, vocab_size=50_304, world_size=processes, bf16_native=True, compile_auto=True
    )  # raises where it does not divide


def test_every_way_of_launching_is_in_the_guide() -> None:
    assert len(on_gpus()) >= 5
    for file in (ROOT / "launch").glob("*.yaml"):
        assert file.name in GUIDE or f"`{file.stem}`" in GUIDE or file.stem.startswith("cpu-"), file.name


def test_the_memory_table_is_that_of_the_formulas() -> None:
    assert memory_table.BEGIN in GUIDE and memory_table.END in GUIDE
    assert memory_table.with_table(GUIDE) == GUIDE, "run: python docs/memory_table.py"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", GUIDE))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / "docs" / target).exists()


def test_named_files_exist() -> None:
    for name in re.findall(r"(?:configs|launch|slurm)/[\w.-]+\.(?:yaml|sbatch|env)", GUIDE):
        assert (ROOT / name).is_file(), name
