from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.observe.files import LineAppender, disk_errors, last_step, read_steps, replacing, rewind


def test_the_old_file_stays_when_writing_the_new_one_fails(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_is_visible_to_others_at_once(tmp_path):
    lines = LineAppender(tmp_path / "log.jsonl")
    lines.append("first ö")
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == "first ö\n"
    lines.append("second")
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == "first ö\nsecond\n"
    lines.close()


@pytest.mark.parametrize(("text", "step"), [
    ('{"step": 3}\n{"step": 12}\n', 12),
    ('{"step": 3}\n{"step": 12}\n{"step": 1', 12),  # torn by a kill
    ('{"text": "no step"}\n\x00\n', 0),
    ("", 0),
    ('{"step": 7}\n' * 200_000, 7),
])  # fmt: skip
def test_the_last_step_is_that_of_the_last_whole_line(tmp_path, text, step):
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text(text)
    assert last_step(path) == step


def test_rewind_drops_later_steps_and_torn_lines_only(tmp_path):
    path = tmp_path / "samples.jsonl"
    good = ['{"step": 1, "text": "a"}', '{"step": 5, "text": "b"}', '{"step": 5, "text": "c"}']
    torn = ['{"step": 2, "te', '{"step": 3, "loss": NaN}', "\x00\x00", "[5]", '{"step": "5"}']
    later = ['{"step": 6, "text": "d"}']
    path.write_text("\n".join([good[0], *torn, *good[1:], *later, '{"step": 7, "t']))
    kept: list[dict] = []
    rewind(path, 5, kept.append)
    assert path.read_text() == "".join(f"{line}\n" for line in good)
    assert [entry["text"] for entry in kept] == ["a", "b", "c"]
    assert list(read_steps(path)) == kept


def test_rewind_keeps_a_whole_line_that_lacks_only_its_newline(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    rewind(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_rewind_of_no_file_makes_none(tmp_path):
    rewind(tmp_path / "samples.jsonl", 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_clear_error():
    path = Path("/dev/full")
    with pytest.raises(UserError, match="/dev/full: cannot be written: No space left on device; earlier checkpoints"):
        LineAppender(path).append("x")
    with pytest.raises(UserError, match="No space left"), disk_errors(path):
        path.write_bytes(b"x")


def test_a_read_only_folder_is_a_clear_error(read_only):
    with pytest.raises(UserError, match=r"new.json: cannot be written: Permission denied; earlier checkpoints"):
        LineAppender(read_only / "new.json")
    with pytest.raises(UserError, match="Permission denied"), replacing(read_only / "new.json"):
        pass


def test_a_file_size_limit_is_a_clear_error_and_leaves_whole_lines_to_rewind_to(tmp_path):
    script = """
import resource, sys
from pathlib import Path
from llmtrain.errors import UserError
from llmtrain.observe.files import LineAppender
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
lines = LineAppender(Path(sys.argv[1]))
try:
    for step in range(1, 1000):
        lines.append('{"step": %d, "text": "some text"}' % step)
except UserError as error:
    print(error)
lines.close()
"""
    path = tmp_path / "log.jsonl"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert f"{path}: cannot be written: File too large" in done.stdout
    assert path.stat().st_size == 1000
    rewind(path, 10_000)
    steps = [entry["step"] for entry in read_steps(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 20


def test_other_errors_keep_their_traceback(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "no-such-folder" / "x"):
        pass
