"""A place of the user's own for the records: the guide's example runs, and what is wrong with one is named."""

from __future__ import annotations

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmtrain.train import main
from tests.conftest import Call, Command, is_one_clear_line
from tests.faulty_steps import faulty

GUIDE = Path(__file__).parents[2] / "docs" / "sinks.md"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_dict: dict[str, Any]) -> Path:
    """A folder that runs are started in."""
    (tmp_path / "config.yaml").write_text(json.dumps(config_dict))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("my_sink", "bad_sink"):
        sys.modules.pop(name, None)
    return tmp_path


def test_the_guides_example_gets_what_it_is_promised(here: Path, call: Call) -> None:
    (source,) = re.findall(r"^```python sink\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (here / "my_sink.py").write_text(source)
    posted: list[str] = []

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quietly."""

    with HTTPServer(("127.0.0.1", 0), Chat) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        (here / "webhook").write_text(f"http://127.0.0.1:{server.server_port}/\n")
        code, _, err = call(main, "--config", "config.yaml", "logging.sinks=[my_sink:Webhook]", "run.name=mine")
        server.shutdown()
        thread.join()
    assert (code, err) == (0, "")
    assert [re.sub(r"loss [\d.]+", "loss L", line) for line in posted] == [
        f"mine: validation loss L at step {step}" for step in (10, 20, 30)
    ]


STUCK = """
import threading

closed = []

class Sink:
    def __init__(self, *_):
        self.waits = threading.Event()
    def log(self, record):
        pass
    def text(self, step, prompt, text):
        pass
    def close(self):
        closed.append(self)
        if len(closed) == 1:
            self.waits.wait()
"""


def test_a_run_that_goes_back_does_not_wait_for_a_sink_that_waits_for_its_network(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch, config_dict: dict[str, Any]
) -> None:
    monkeypatch.setattr("llmtrain.train.accumulate", faulty(dict.fromkeys((96, 104, 120), "nan loss")))
    config_dict |= {"health": {"spike_window": 8, "max_skips": 3, "max_rollbacks": 1, "timeout_s": 8.0}}
    (here / "config.yaml").write_text(json.dumps(config_dict))
    (here / "bad_sink.py").write_text(STUCK)
    code, out, err = call(main, "--config", "config.yaml", "logging.sinks=['bad_sink:Sink']")
    assert code == 0, err
    assert "going back to" in err and "Sink: not closed within 2 s; the last records may be missing there" in err
    assert "rolled back to step 10" in out
    first, second = sys.modules["bad_sink"].closed
    first.waits.set()
    assert second is not first


@pytest.mark.slow
def test_a_run_that_is_done_does_not_wait_for_such_a_sink_either(
    here: Path, llmtrain: Command, config_dict: dict[str, Any]
) -> None:
    """Nor does the watchdog take it for a run that hangs: 5 for it, and the same again at each launch."""
    config_dict |= {"health": {"timeout_s": 300.0, "hang_after_s": 4.0, "grace_s": None}}
    config_dict["training"]["max_steps"] = 4
    (here / "config.yaml").write_text(json.dumps(config_dict))
    (here / "bad_sink.py").write_text(STUCK)
    settings = ("logging.sinks=['bad_sink:Sink']", "health.timeout_s=20")
    done = llmtrain("train", "--config", "config.yaml", *settings, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "warning: Sink: not closed within 10 s; the last records may be missing there" in done.stderr
    assert "\ndone: 4 of 4 steps; best validation loss" in done.stdout
    assert json.loads((here / "run/run.json").read_text())["launches"][-1]["ended"]["how"] == "done"


@pytest.mark.parametrize(("source", "name", "reason"), [
    ("", "no_such_sink:Sink", "cannot be imported: ModuleNotFoundError"),
    ("", "bad_sink:Sink", "cannot be imported: AttributeError"),
    ("1 / 0", "bad_sink:Sink", "cannot be imported: ZeroDivisionError"),
    ("Sink = 3", "bad_sink:Sink", "Sink is a int, not a function or class"),
    ("", "bad_sink", "logging.sinks"),
])  # fmt: skip
def test_one_that_is_not_there_ends_the_run_before_anything_is_written(
    here: Path, call: Call, source: str, name: str, reason: str
) -> None:
    (here / "bad_sink.py").write_text(source)
    code, _, err = call(main, "--config", "config.yaml", f"logging.sinks=['{name}']")
    assert code == 2 and is_one_clear_line(err) and reason in err
    assert not (here / "run").exists()


def test_one_that_cannot_start_is_named_and_one_that_fails_later_costs_a_warning(here: Path, call: Call) -> None:
    (here / "bad_sink.py").write_text("def Sink(config, run_dir, resume_step): raise OSError('no route')")
    code, _, err = call(main, "--config", "config.yaml", "logging.sinks=['bad_sink:Sink']")
    assert code == 2 and is_one_clear_line(err) and "'bad_sink:Sink' cannot start: OSError: no route" in err
    del sys.modules["bad_sink"]
    (here / "bad_sink.py").write_text("class Sink:\n    def __init__(self, *_): pass\n")
    code, _, err = call(main, "--config", "config.yaml", "logging.sinks=['bad_sink:Sink']")
    assert code == 0 and err.startswith("warning: Sink failed and gets no more records: AttributeError")
