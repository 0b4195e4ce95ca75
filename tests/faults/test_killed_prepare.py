"""A prepare that is killed, at whatever change of its folder, goes on behind the shards that it had finished."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import killed_prepares

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "2/3", "join"])
def test_killed_at_every_change_it_ends_the_same_and_makes_no_finished_shard_again(tmp_path, part):
    (tmp_path / "texts").mkdir()
    lines = (json.dumps({"text": f"line {i} é " + "words and words " * (i * 7 % 11)}) for i in range(60))
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join(lines))
    for name in ("b.txt", "c.txt", "d.txt"):
        (tmp_path / "texts" / name).write_text(f"Text of {name}.\n" * 60)
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", killed_prepares.__name__, str(tmp_path / "work"), str(tmp_path / "texts"), part],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    *killed, whole = map(json.loads, done.stdout.splitlines())
    assert whole["last"] == 0
    assert len(killed) > 50
    for what in killed:
        assert what["last"] == 0, what
        assert what["remade"] == [], what
        assert what["content"] == whole["content"], what
        assert what["left"] == whole["left"], what
    assert max(what["kept"] for what in killed) >= 4  # files of finished shards
    assert any(what["second"] == -9 for what in killed)
