from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
from itertools import pairwise

import pytest

from llmtrain.config import make_config
from llmtrain.errors import UserError
from llmtrain.observe.observer import NullObserver, Observer, _Plotter


@pytest.fixture
def observe(tmp_path):
    def make(resume_step=0, sinks=(), run_dir=tmp_path, **logging):
        config = make_config({"run": {"name": "a run"}, "logging": logging})
        return Observer(
            config,
            run_dir=run_dir,
            resume_step=resume_step,
            total_steps=100,
            steps_per_epoch=10,
            header={"model": "tiny", "run dir": str(tmp_path)},
            sinks=sinks,
        )

    return make


class ListSink:
    """A user's own sink, as small as it can be."""

    def __init__(self):
        self.seen = []

    def log(self, record):
        self.seen.append(record.step)

    def text(self, step, prompt, text):
        self.seen.append((step, prompt + text))

    def close(self):
        self.seen.append("closed")


class BrokenSink(ListSink):
    def log(self, record):
        super().log(record)
        raise ConnectionError("the service is down")


def test_a_run_leaves_the_files_of_the_contract(tmp_path, observe, make_record, capsys):
    observer = observe(tensorboard=True)
    for step in range(1, 21):
        observer.log(make_record(step, val_loss=2.5 if step == 20 else None))
    observer.sample(20, "def ", "main(): \ud83d")
    observer.saved(tmp_path / "step-00000020")
    observer.close("done: 20 steps")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "metrics.jsonl", "training_metrics.json", "training_log.csv", "training_curve.png", "loss_by_epoch.png",
        "tensorboard", "samples.jsonl",
    }  # fmt: skip
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {
        "step": 20,
        "prompt": "def ",
        "text": "main(): \ud83d",
    }
    out = capsys.readouterr().out
    assert out.startswith("model    tiny\nrun dir  ")
    assert f"saved {tmp_path / 'step-00000020'}\n" in out
    assert f"done: 20 steps\ncurves: {tmp_path / 'training_curve.png'}\n" in out


def test_switches_that_are_off_leave_nothing(tmp_path, observe, make_record, capsys):
    observer = observe(csv=False, plots=False)
    observer.log(make_record(1))
    observer.close("done")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "training_metrics.json"}
    assert capsys.readouterr().out.endswith("\ndone\n")


@pytest.mark.slow
def test_a_checkpoint_brings_the_arrays_up_to_date(tmp_path, observe, make_record):
    observer = observe(plots=False)
    for step in range(1, 4001):
        observer.log(make_record(step))
    assert len(json.loads((tmp_path / "training_metrics.json").read_text())["steps"]) < 4000
    observer.flush()
    assert len(json.loads((tmp_path / "training_metrics.json").read_text())["steps"]) == 4000
    observer.close("done")


def test_samples_beyond_the_resumed_step_are_dropped(tmp_path, observe):
    observer = observe(plots=False)
    for step in (10, 10, 20, 30):
        observer.sample(step, "a", "b")
    observer.close("stopped")
    observer = observe(resume_step=20, plots=False)
    observer.sample(30, "a", "c")
    observer.close("done")
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["text"]) for line in lines] == [(10, "b"), (10, "b"), (20, "b"), (30, "c")]


def test_warnings_go_to_stderr_once_also_over_a_resume(observe, make_record, capsys):
    first = observe(plots=False)
    first.log(make_record(1, grad_norm=50.0))
    state = json.loads(json.dumps(first.state()))
    first.close("stopped")
    assert "warning: step 1: gradient norm 50 is over 10" in capsys.readouterr().err
    second = observe(resume_step=1, plots=False)
    second.load_state(state)
    second.log(make_record(2, grad_norm=50.0))
    second.close("done")
    assert capsys.readouterr().err == ""


def test_a_users_own_sink_gets_everything(observe, make_record):
    sink = ListSink()
    observer = observe(sinks=[sink], plots=False)
    observer.log(make_record(1))
    observer.sample(1, "a", "b")
    observer.close("done")
    assert sink.seen == [1, (1, "ab"), "closed"]


def test_a_sink_that_fails_costs_a_warning_and_not_the_run(tmp_path, observe, make_record, capsys):
    broken, sound = BrokenSink(), ListSink()
    observer = observe(sinks=[broken, sound], plots=False)
    observer.log(make_record(1))
    observer.log(make_record(2))
    observer.close("done")
    assert broken.seen == [1] and sound.seen == [1, 2, "closed"]
    err = capsys.readouterr().err
    assert err == "warning: BrokenSink failed and gets no more records: ConnectionError: the service is down\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_sink_that_does_not_close_gets_half_of_what_is_left_until_the_end(tmp_path, observe, make_record, capsys):
    """Or a run that is told to stop is killed while its sink waits for a network, and not started again."""
    never = threading.Event()
    slow = ListSink()
    slow.close = never.wait
    observer = observe(sinks=[slow], plots=True)
    observer.log(make_record(1))
    observer.close("stopped", left_s=2.0)
    captured = capsys.readouterr()
    assert captured.err == "warning: ListSink: not closed within 1 s; the last records may be missing there\n"
    assert captured.out.endswith("stopped\n") and not (tmp_path / "training_curve.png").exists()
    never.set()


def test_a_plot_that_fails_costs_a_warning_and_not_the_run(tmp_path, observe, make_record, capsys):
    observer = observe()
    observer.log(make_record(1))
    (tmp_path / "training_curve.png").mkdir()
    observer.close("done")
    captured = capsys.readouterr()
    assert "warning: the plots could not be drawn: IsADirectoryError" in captured.err
    assert captured.out.endswith("\ndone\n")


def test_close_may_come_twice_and_after_an_error(observe, make_record, capsys):
    observer = observe(plots=False)
    observer.log(make_record(1))
    observer.close("failed")
    observer.close("done")
    assert capsys.readouterr().out.count("failed") == 1


def test_a_read_only_run_folder_is_refused_at_once(observe, read_only):
    with pytest.raises(UserError, match="Permission denied; earlier checkpoints are intact"):
        observe(run_dir=read_only)


FULL_DISK = """
import resource, sys
from pathlib import Path
from llmtrain.config import make_config
from llmtrain.errors import run_main
from llmtrain.observe.observer import Observer
from llmtrain.observe.record import Record

def main(argv):
    size = dict(resume_step=0, total_steps=9, steps_per_epoch=9)
    observer = Observer(make_config({}), run_dir=Path(argv[0]), header={}, **size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        for step in range(1, 1000):
            observer.log(Record(step, 0, 2.0, None, None, 1e-3, 1.0, 1.0, step, 1.0, 1.0, None, 1.0, 1.0))
    finally:
        observer.close("failed")

sys.exit(run_main(main, sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_clear_line_and_exit_2(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"llmtrain: error: {tmp_path / 'metrics.jsonl'}: cannot be written: File too large")
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "failed"
    assert len(json.loads((tmp_path / "training_metrics.json").read_text())["steps"]) > 10


def test_an_observer_imports_nothing_that_is_not_used(tmp_path):
    script = """
import sys
from pathlib import Path
from llmtrain.config import make_config
from llmtrain.observe.observer import Observer
size = dict(resume_step=0, total_steps=9, steps_per_epoch=9)
observer = Observer(make_config({}), run_dir=Path(sys.argv[1]), header={}, **size)
print(sorted({"rich", "matplotlib", "tensorboard", "wandb", "torch", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_null_observer_takes_every_call_and_does_nothing(tmp_path, make_record, capsys):
    observer = NullObserver()
    observer.log(make_record(1))
    observer.message("m")
    observer.warn("w")
    observer.sample(1, "a", "b")
    observer.saved(tmp_path)
    observer.load_state(observer.state())
    observer.close("done")
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in vars(Observer) if not name.startswith("_")])
def test_both_observers_have_the_same_methods(name):
    assert inspect.signature(getattr(Observer, name)) == inspect.signature(getattr(NullObserver, name))


def test_plots_take_little_of_the_runs_time(tmp_path):
    now, passing_s = 0.0, 0.0

    def clock() -> float:
        nonlocal now
        now += passing_s
        return now

    plotter = _Plotter(tmp_path, None, clock)
    drawn_at = []
    while now < 20_000:
        now += 10  # a checkpoint every ten seconds
        if plotter.is_due():
            drawn_at.append(now)
            passing_s = 2.5  # from look to look at the clock, while it draws
            plotter.draw()
            passing_s = 0.0
    assert drawn_at[0] >= 100
    assert min(later - earlier for earlier, later in pairwise(drawn_at)) >= 60
    assert 0.018 * 20_000 < 2.5 * len(drawn_at) <= 0.02 * 20_000


def test_plots_that_take_no_time_are_drawn_once_a_minute(tmp_path):
    now = 0.0
    plotter = _Plotter(tmp_path, None, clock=lambda: now)
    drawn_at = []
    for now in range(0, 1000, 10):
        if plotter.is_due():
            drawn_at.append(now)
            plotter.draw()
    assert drawn_at == list(range(100, 1000, 60))


def test_sinks_hear_how_far_an_earlier_launch_had_come_before_the_files_forget_it(observe, make_record, monkeypatch):
    seen = []

    def open_sinks(config, run_dir, resume_step, warn, reached_step):
        lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
        seen.append((resume_step, reached_step, len(lines)))
        return []

    monkeypatch.setattr("llmtrain.observe.observer.open_sinks", open_sinks)
    first = observe(plots=False)
    for step in (10, 20, 30):
        first.log(make_record(step))
    first.sample(35, "Once", " upon")
    first.close("killed")
    observe(resume_step=20, plots=False).close("done")
    observe(resume_step=20, plots=False).close("done")
    assert seen == [(0, 0, 0), (20, 35, 3), (20, 20, 2)]
