"""Storage that does not answer for a moment costs no checkpoint; one that never answers costs no file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.folders import MARKER, committed_steps, point, pointed
from llmtrain.checkpoint.format import MANIFEST
from llmtrain.storage import again as retrying
from llmtrain.storage.again import again
from llmtrain.train import main as train
from tests.conftest import Call
from tests.storage.test_mirror import written

Fail = Callable[..., None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Let the next `times` calls of a method of Path fail for paths that end so."""
    monkeypatch.setattr(retrying, "WAITS_S", (0.0, 0.0))

    def replace(method: str, end: str, times: int, number: int = errno.ESTALE) -> None:
        plain, left = getattr(Path, method), [times]

        def failing(path: Path, *arguments: Any, **options: Any) -> Any:
            if str(path).endswith(end) and left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return plain(path, *arguments, **options)

        monkeypatch.setattr(Path, method, failing)

    return replace


def test_two_failures_in_a_row_are_got_over_and_a_third_is_not(fail: Fail, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    fail("read_text", "file", 2)
    assert again(file.read_text) == "here"
    fail("read_text", "file", 3)
    with pytest.raises(OSError, match=r"Stale file handle"):
        again(file.read_text)
    assert again(file.read_text) == "here"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR])
def test_what_is_an_answer_is_not_asked_for_again(fail: Fail, tmp_path: Path, number: int) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    fail("read_text", "file", 1, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        again(file.read_text)


@pytest.mark.parametrize(("method", "end"), [("stat", MARKER), ("read_text", MARKER), ("read_text", MANIFEST)])
def test_a_server_that_is_back_soon_costs_no_checkpoint(
    config_dict: dict[str, Any], tmp_path: Path, call: Call, fail: Fail, method: str, end: str
) -> None:
    """Where it fails as the launch looks at the checkpoints, and where it then sets them right."""
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10})
    assert call(train, "--config", config, "training.stop_after=20")[0] == 75
    fail(method, f"step-00000020/{end}", 2)
    code, out, err = call(train, "--config", config, "training.stop_after=21")
    assert code == 75, err
    assert "after step 20" in out and "older" not in err and "removed" not in err
    assert committed_steps(tmp_path / "run") == [10, 20, 21]


def test_a_server_that_stays_away_ends_the_launch_and_no_checkpoint_counts_as_unfinished(
    config_dict: dict[str, Any], tmp_path: Path, call: Call, fail: Fail
) -> None:
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10})
    assert call(train, "--config", config, "training.stop_after=20")[0] == 75
    before = sorted(tmp_path.rglob("*"))
    fail("stat", f"step-00000020/{MARKER}", 10**6)
    code, _, err = call(train, "--config", config)
    assert code == 2
    marker = tmp_path / "run/step-00000020" / MARKER
    assert err.strip().splitlines()[-1] == (
        f"llmtrain: error: {marker}: Stale file handle; mend the storage, and run the same command again"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_listed_is_not_one_without_checkpoints(
    config_dict: dict[str, Any], tmp_path: Path, call: Call, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would begin anew, and set all that it had aside."""
    config = written(config_dict, tmp_path, checkpoint={"save_every": 10})
    assert call(train, "--config", config, "training.stop_after=20")[0] == 75
    before = sorted(tmp_path.rglob("*"))
    plain, left = os.listdir, [10**6]

    def failing(path: Any = ".") -> list[str]:
        if str(path) == str(tmp_path / "run") and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path)

    monkeypatch.setattr(os, "listdir", failing)
    code, _, err = call(train, "--config", config)
    assert code == 2 and f"{tmp_path / 'run'}: Input/output error; mend the storage" in err
    left[0] = 0
    assert sorted(tmp_path.rglob("*")) == before
    left[0] = 2
    code, out, err = call(train, "--config", config, "training.stop_after=21")
    assert code == 75 and "after step 20" in out, err


def test_a_link_that_cannot_be_read_for_a_moment_is_not_gone(tmp_path: Path, fail: Fail) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / MARKER).touch()
    point(tmp_path, "best", "step-00000001")
    fail("readlink", "best", 2)
    assert pointed(tmp_path, "best") == tmp_path / "step-00000001"
    fail("readlink", "best", 3)
    with pytest.raises(OSError, match="Stale file handle"):
        pointed(tmp_path, "best")
