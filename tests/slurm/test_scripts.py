"""The scripts in slurm/ as text, and what they refuse; no cluster is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import is_one_clear_line

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted(REPOSITORY.glob("slurm/*"))
IN_A_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1"}


def bash(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash in an environment without anything of Slurm or of ours but what is given."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "LLMTRAIN"))}
    return subprocess.run(
        ["bash", *arguments], cwd=cwd, env={**plain, **environment}, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def test_shellcheck_finds_nothing() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck on this machine; Debian: apt-get install shellcheck (.ci/run does)")
    command = ["shellcheck", "--external-sources", ".ci/run", *(str(path.relative_to(REPOSITORY)) for path in SCRIPTS)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_site_env_says_every_variable_that_the_scripts_read() -> None:
    name = re.compile(r"LLMTRAIN_[A-Z_]+")
    declared = set(re.findall(rf"^default ({name.pattern})", (REPOSITORY / "slurm/site.env").read_text(), re.MULTILINE))
    used = {found for path in SCRIPTS if path.name != "site.env" for found in name.findall(path.read_text())}
    assert declared == used - {"LLMTRAIN_EXIT_CODE_FILE"}


def test_a_value_set_at_submission_wins_an_empty_one_too() -> None:
    show = "source slurm/site.env; echo [$LLMTRAIN_LOGS] [$LLMTRAIN_VENV]; env | grep -c ^LLMTRAIN_LOGS="
    assert bash("-c", show).stdout == "[logs] [.venv]\n1\n"
    assert bash("-c", show, LLMTRAIN_LOGS="elsewhere", LLMTRAIN_VENV="").stdout == "[elsewhere] []\n1\n"


def test_the_folder_that_slurm_writes_logs_to_is_in_the_repository() -> None:
    # Without it a job fails at its start and says nothing anywhere.
    outputs = {re.search(r"--output=(\S+)/", path.read_text())[1] for path in REPOSITORY.glob("slurm/*.sbatch")}  # type: ignore[index]
    assert outputs == {"logs"}
    tracked = subprocess.run(["git", "ls-files", "logs"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert tracked.returncode != 0 or tracked.stdout.split() == ["logs/.gitignore"]  # not 0: not a git repository


def test_a_config_that_ends_every_launch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training: {max_steps: 9}\n# stop_after: 5\n")
    launch = {"LLMTRAIN_LAUNCH_FILE": "launch/absent.yaml"}  # the next thing that is checked
    assert "launch/absent" in bash("slurm/train.sh", str(tmp_path / "run.yaml"), **IN_A_JOB, **launch).stderr
    (tmp_path / "run.yaml").write_text("training:\n  stop_after: 5\n")
    assert "contradict" in bash("slurm/train.sh", str(tmp_path / "run.yaml"), **IN_A_JOB, **launch).stderr


@pytest.mark.parametrize("script", ["single-node", "multi-node", "evaluate"])
def test_a_job_started_elsewhere_says_where_to_start_it(tmp_path: Path, script: str) -> None:
    done = bash(str(REPOSITORY / f"slurm/{script}.sbatch"), "configs/debug.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert is_one_clear_line(done.stderr), done.stderr
    assert "from the root of the repository" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "no config"),
        (["configs/absent.yaml"], {}, "configs/absent.yaml: no such config file"),
        (["configs/debug.yaml"], {"SLURM_GPUS_ON_NODE": ""}, "--gpus-per-node=N"),
        (["configs/debug.yaml"], {"LLMTRAIN_PROCESSES_PER_NODE": "two"}, "(is 'two')"),
        (["configs/debug.yaml"], {"LLMTRAIN_LAUNCH_FILE": "launch/absent.yaml"}, "launch/absent.yaml: no such file"),
        (["configs/debug.yaml", "training.stop_after=5"], {}, "contradict each other"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    arguments: list[str], environment: dict[str, str], message: str
) -> None:
    launch = {"LLMTRAIN_LAUNCH_FILE": "launch/single.yaml"}
    done = bash("slurm/train.sh", *arguments, **{**IN_A_JOB, **launch, **environment})
    assert done.returncode == 2
    assert is_one_clear_line(done.stderr), done.stderr
    assert message in done.stderr
