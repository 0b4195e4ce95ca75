from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from llmtrain.config import make_config
from llmtrain.errors import UserError
from llmtrain.observe.sinks import TensorBoardSink, open_sinks, require_sinks, scalars

FAKE_KEY = "0123456789abcdef0123456789abcdef01234567"


def read_tensorboard(run_dir) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_numbers_have_their_dashboard_names_and_unknown_ones_are_left_out(make_record):
    names = scalars(make_record(1))
    assert {"train/loss", "train/perplexity", "train/lr", "train/grad_norm", "train/tokens_per_sec"} <= set(names)
    assert not {"train/mfu", "val/loss", "val/perplexity", "val/accuracy"} & set(names)
    evaluated = scalars(make_record(1, mfu=0.4, val_loss=2.0, val_accuracy=0.5, grad_norm=math.nan))
    assert evaluated["train/mfu"] == 0.4 and evaluated["val/perplexity"] == math.exp(2.0)
    assert "train/grad_norm" not in evaluated


def test_tensorboard_gets_every_number_at_its_step(tmp_path, make_record):
    records = [make_record(step, val_loss=2.5 if step % 2 == 0 else None, mfu=0.3) for step in range(10, 60, 10)]
    sink = TensorBoardSink(tmp_path, resume_step=0)
    for record in records:
        sink.log(record)
    sink.text(20, "Once", " upon\na time")
    sink.close()
    events = read_tensorboard(tmp_path)
    assert [(e.step, e.wall_time) for e in events.Scalars("train/loss")] == [(r.step, r.time) for r in records]
    for record in records:
        for tag, value in scalars(record).items():
            (event,) = [event for event in events.Scalars(tag) if event.step == record.step]
            assert event.value == pytest.approx(value, rel=1e-6)
    (sample,) = events.Tensors("samples/text_summary")
    assert sample.step == 20 and sample.tensor_proto.string_val[0] == b"    Once upon\n    a time\n"


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path, make_record):
    for resume_step, steps in ((0, range(1, 8)), (4, range(5, 10))):
        sink = TensorBoardSink(tmp_path, resume_step=resume_step)
        for step in steps:
            sink.log(make_record(step, train_loss=float(10 * resume_step + step)))
        sink.close()
    losses = {event.step: event.value for event in read_tensorboard(tmp_path).Scalars("train/loss")}
    assert losses == {1: 1, 2: 2, 3: 3, 4: 4, 5: 45, 6: 46, 7: 47, 8: 48, 9: 49}
    assert len(read_tensorboard(tmp_path).Scalars("train/loss")) == len(losses)


WANDB_RUN = """
import sys
from pathlib import Path
from llmtrain.config import make_config
from llmtrain.observe.record import Record
from llmtrain.observe.sinks import WandbSink
run_dir, resume_step, reached_step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = make_config({"run": {"name": "my run"}, "logging": {"wandb": True, "wandb_project": "my-project"}})
sink = WandbSink(config, run_dir, resume_step, lambda line: print(f'warning: {line}'), reached_step)
for step in (resume_step + 10, resume_step + 20):
    sink.log(Record(step, 0, 2.5, 2.75, None, 1e-3, 1.0, 1.0, step, 1.0, 1.0, None, 1.0, 1.0))
sink.text(step, "<b>Once", " upon")
sink.close()
"""


def wandb_launch(run_dir, resume_step, reached_step=0, **environment):
    return subprocess.run(
        [sys.executable, "-c", WANDB_RUN, run_dir, str(resume_step), str(reached_step)],
        env={**os.environ, "WANDB_API_KEY": FAKE_KEY, "HOME": str(run_dir.parent), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def read_wandb(path: Path) -> list[wandb_internal_pb2.Record]:
    """The records of an offline run: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    data, position, records, parts = path.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_over_a_resume_and_never_the_key(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for resume_step in (0, 20):
        done = wandb_launch(run_dir, resume_step, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    run_id = (run_dir / "wandb_id").read_text().strip()
    launches = [read_wandb(path) for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]
    assert len(launches) == 2
    for records, steps in zip(launches, ([10, 20], [30, 40]), strict=True):
        (run,) = [record.run for record in records if record.HasField("run")]
        assert (run.run_id, run.project, run.display_name) == (run_id, "my-project", "my run")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["optimizer"]["lr"] == 1e-3 and config["run"]["seed"] == 1337
        rows = [record.history for record in records if record.HasField("history")]
        assert [row.step.num for row in rows] == steps
        for row in rows:
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.item}
            assert values["train/loss"] == 2.5 and values["val/loss"] == 2.75
        assert "samples" in values
    pages = [path.read_text() for path in run_dir.rglob("*.html")]
    assert len(pages) == 2 and all("&lt;b&gt;Once</b> upon" in page for page in pages)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if FAKE_KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_wandb_is_rewound_where_steps_come_again_and_only_there(tmp_path):
    """What syncing the launches in their order leaves: each step once, of the launch that logged it last."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for resume_step, reached_step in ((0, 0), (10, 20), (30, 30)):
        done = wandb_launch(run_dir, resume_step, reached_step, WANDB_MODE="offline")
        assert done.returncode == 0 and "warning" not in done.stdout, done.stderr
    run_id = (run_dir / "wandb_id").read_text().strip()
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    history, moments = {}, []
    for launch, path in enumerate(files):
        records = read_wandb(path)
        (run,) = [record.run for record in records if record.HasField("run")]
        assert run.run_id == run_id
        moments.append(None)
        if run.HasField("branch_point"):
            moments[-1] = (run.branch_point.run, run.branch_point.metric, run.branch_point.value)
            history = {step: by for step, by in history.items() if step <= run.branch_point.value}
        for step in (record.history.step.num for record in records if record.HasField("history")):
            assert step not in history, "doubled"
            history[step] = launch
    assert moments == [None, (run_id, "_step", 10), None]
    assert history == {10: 0, 20: 1, 30: 1, 40: 2, 50: 2}


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"a/b"])
def test_a_damaged_id_of_a_wandb_run_costs_a_warning_and_a_new_run(tmp_path, content):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "wandb_id").write_bytes(content)
    done = wandb_launch(run_dir, 20, 25, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert f"{run_dir / 'wandb_id'}: {content!r} is no id of a W&B run; records go to a new one" in line
    (records,) = [read_wandb(path) for path in run_dir.glob("wandb/offline-run-*/*.wandb")]
    assert [record.history.step.num for record in records if record.HasField("history")] == [30, 40]
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run_dir / "wandb_id").read_text().strip() == run.run_id


@pytest.mark.slow
def test_wandb_without_a_key_is_one_clear_line(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    done = wandb_launch(run_dir, 0, WANDB_MODE="online", WANDB_API_KEY="")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("llmtrain.errors.UserError: logging.wandb is on but W&B cannot start: ")
    assert "WANDB_MODE=offline" in last
    assert not (run_dir / "wandb_id").exists()


@pytest.mark.slow
def test_a_relaunch_goes_on_offline_where_wandb_cannot_start(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert wandb_launch(run_dir, 0, WANDB_MODE="offline").returncode == 0
    run_id = (run_dir / "wandb_id").read_text()
    done = wandb_launch(run_dir, 20, 25, WANDB_MODE="online", WANDB_API_KEY="")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert "W&B cannot start" in line and "going on offline" in line and "wandb sync" in line
    records = read_wandb(max(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime))
    assert [record.history.step.num for record in records if record.HasField("history")] == [30, 40]
    assert (run_dir / "wandb_id").read_text() == run_id


@pytest.mark.parametrize(("switch", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, switch, module):
    for name in [name for name in sys.modules if name.split(".")[0] == module or name == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # how Python itself marks what must not be found
    with pytest.raises(UserError, match=rf"pip install -c constraints.txt -e '\.\[{switch}\]'"):
        open_sinks(make_config({"logging": {switch: True}}), tmp_path, 0, print)


def test_a_folder_of_that_name_is_not_the_package(tmp_path, monkeypatch):
    """W&B itself leaves one where a run was started."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version("no such package" if name == "wandb" else name))
    with pytest.raises(UserError, match=r"wandb is not installed: pip install"):
        require_sinks(make_config({"logging": {"wandb": True}}))


def test_no_switch_opens_nothing(tmp_path):
    assert open_sinks(make_config({}), tmp_path, 0, print) == []
    assert not list(tmp_path.iterdir())
