"""The run as a whole: exact resume, accumulation, stopping, early stopping, the files it leaves, bad input."""

from __future__ import annotations

import copy
import fcntl
import gzip
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.assemble import Assembly, assemble
from llmtrain.checkpoint.folders import committed_steps, point, pointed
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.compiling import COMPILED_FROM_FLOPS
from llmtrain.config import load_config, make_config
from llmtrain.data.shards import MANIFEST
from llmtrain.engine import make_engine
from llmtrain.engine.processes import Processes
from llmtrain.errors import DivergedError, LlmtrainError, Stopped, UserError
from llmtrain.health.peers import Peers
from llmtrain.health.signals import StopSignals
from llmtrain.model import document_mask
from llmtrain.model.cost import BF16_PEAK_FLOPS, flops_per_token
from llmtrain.observe.validation import Validation
from llmtrain.run import Run
from llmtrain.train import main
from tests.conftest import Command, prose, records, write_data
from tests.documents import write_documents

Config = dict[str, Any]


def merged(config: Config, **sections: dict[str, Any]) -> Config:
    result = copy.deepcopy(config)
    for section, values in sections.items():
        result.setdefault(section, {}).update(values)
    return result


def run(config: Config, *arguments: str) -> Path:
    """Train in this process; return the run folder."""
    folder = Path(config["run"]["dir"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    main(["--config", str(path), *arguments])
    return folder


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    """What must be equal bit for bit between two runs."""
    keys = (
        "step",
        "epoch",
        "train_loss",
        "val_loss",
        "val_accuracy",
        "learning_rate",
        "grad_norm",
        "param_norm",
        "tokens",
    )
    return [tuple(record[key] for key in keys) for record in records(folder)]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / f"step-{step:08d}" / "rank00000.safetensors")


# One setting at a time that has state of its own: dropout (random numbers), Muon and SGD (other moments), accumulation;
# and bf16, which has none: what is saved are float32 masters.
RESUMED: dict[str, Config] = {
    "plain": {},
    "dropout": {"model": {"dropout": 0.2}},
    "muon": {"optimizer": {"name": "muon"}},
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.1}},
    "accumulated": {"training": {"micro_batch_size": 2}},
    "stride": {"data": {"stride": 40}},
    "bf16": {"training": {"precision": "bf16"}},
}


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_and_resumed_writes_the_same_numbers_bit_for_bit(
    config_dict: Config, tmp_path: Path, name: str
) -> None:
    """Stopped mid-epoch, mid-logging-interval, twice in a row at the same place, and in the second epoch."""
    base = merged(config_dict, **RESUMED[name])
    whole = run(merged(base, run={"dir": str(tmp_path / "whole")}))
    broken = merged(base, run={"dir": str(tmp_path / "broken")})
    for stop_after in (7, 7, 11, 26):
        with pytest.raises(Stopped) as stopped:
            run(broken, f"training.stop_after={stop_after}")
        assert stopped.value.exit_code == 75
    resumed = run(broken)
    assert numbers(resumed) == numbers(whole)
    before, after = weights(whole, 30), weights(resumed, 30)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    metrics = [json.loads((f / "training_metrics.json").read_text()) for f in (whole, resumed)]
    assert metrics[0] == metrics[1]


def test_resume_keeps_the_patience_of_early_stopping(config_dict: Config, tmp_path: Path) -> None:
    hopeless = merged(
        config_dict, optimizer={"lr": 0.0}, schedule={"min_lr": 0.0, "warmup_steps": 0},
        training={"max_steps": 100, "eval_every": 5, "early_stopping_patience": 3},
    )  # fmt: skip
    whole = run(merged(hopeless, run={"dir": str(tmp_path / "whole")}))
    assert records(whole)[-1]["step"] == 20  # best at 5, then 10, 15, 20 are no better
    broken = merged(hopeless, run={"dir": str(tmp_path / "broken")})
    with pytest.raises(Stopped):
        run(broken, "training.stop_after=12")
    assert numbers(run(broken)) == numbers(whole)
    assert pointed(tmp_path / "broken", "final") == tmp_path / "broken" / "step-00000020"
    assert pointed(tmp_path / "broken", "best") == tmp_path / "broken" / "step-00000005"
    assert numbers(run(broken)) == numbers(whole)  # once more: it stays stopped


@pytest.mark.slow
def test_killed_without_warning_resumes_to_the_same_numbers(config_dict: Config, tmp_path: Path) -> None:
    """kill -9 in a real process, at several moments; what was lost is trained again, not doubled in any file."""
    base = merged(config_dict, training={"max_steps": 60}, logging={"plots": False})
    whole = run(merged(base, run={"dir": str(tmp_path / "whole")}))
    broken = merged(base, run={"dir": str(tmp_path / "broken")})
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(broken))
    command = [sys.executable, "-m", "llmtrain.train", "--config", str(path)]
    for wait_for_step in (8, 25, 41):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: last_step(tmp_path / "broken") >= wait_for_step, process)  # noqa: B023
        finally:
            process.kill()
            process.wait()
        metrics = json.loads((tmp_path / "broken" / "training_metrics.json").read_text())
        assert len({len(values) for values in metrics.values()}) == 1
    assert numbers(run(broken)) == numbers(whole)


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended early with exit code {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [
    (signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGUSR1, 0), (signal.SIGTERM, 1), (signal.SIGINT, 1),
])  # fmt: skip
def test_a_signal_to_all_processes_saves_and_exits_75(
    config_dict: Config, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    config = merged(
        config_dict, training={"max_steps": 100_000, "eval_every": None}, checkpoint={"save_every": None},
        data={"workers": workers},
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.train", "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: last_step(tmp_path / "run") >= 4, process)
    os.killpg(process.pid, number)
    assert process.wait(60) == 75
    assert process.stderr is not None
    assert number.name in process.stderr.read()
    [step] = committed_steps(tmp_path / "run")
    assert step >= 4
    assert CheckpointReader(tmp_path / "run" / f"step-{step:08d}").verify() == []


@pytest.mark.slow
def test_accumulation_equals_the_big_batch(config_dict: Config, tmp_path: Path) -> None:
    """4 × 8 = 1 × 32, with an uneven last batch in each epoch (187 windows = 5 × 32 + 27)."""
    results = []
    for micro in (32, 8, 4):
        training = {"micro_batch_size": micro, "global_batch_size": 32, "max_steps": 18, "eval_every": 6}
        config = merged(config_dict, run={"dir": str(tmp_path / str(micro))}, training=training)
        results.append(records(run(merged(config, logging={"every": 1}))))
    assert [r["tokens"] for r in results[0]][:6] == [2048, 4096, 6144, 8192, 10240, 10240 + 27 * 64]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # float32 sums in another order: 2^-24 each, grown over 18 steps of training.
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            assert a["learning_rate"] == b["learning_rate"]


def test_utilization_is_that_of_the_tokens_a_second_as_they_attend_and_as_palm_counts(
    config_dict: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BF16_PEAK_FLOPS, "cpu", 1e12)
    folder = run(merged(config_dict, training={"max_steps": 4, "eval_every": None}, logging={"every": 2}))
    config = load_config(folder / "config.yaml")
    for record in records(folder):
        for name, causal in (("mfu", True), ("mfu_palm", False)):
            flops = flops_per_token(config.model, config.data.seq_len, causal=causal)
            assert record[name] == pytest.approx(record["tokens_per_sec"] * flops / 1e12)


@pytest.mark.slow
def test_the_logged_loss_is_the_mean_of_the_steps_since_the_last_record(config_dict: Config, tmp_path: Path) -> None:
    training = {"max_steps": 24, "eval_every": None, "global_batch_size": 32}
    every_step, fourth = (
        records(run(merged(config_dict, run={"dir": str(tmp_path / str(n))}, training=training, logging={"every": n})))
        for n in (1, 4)
    )
    tokens = [0] + [r["tokens"] for r in every_step]
    for i, record in enumerate(fourth):
        steps = range(4 * i, 4 * i + 4)
        total = sum(every_step[s]["train_loss"] * (tokens[s + 1] - tokens[s]) for s in steps)
        assert record["train_loss"] == pytest.approx(total / (tokens[4 * i + 4] - tokens[4 * i]), rel=1e-6)


class HostReads(TorchDispatchMode):
    """Counts what on a GPU makes the host wait for the device: a value, or a shape that values decide."""

    VALUES_DECIDE = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # where an index is a mask
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags)
        if func in self.VALUES_DECIDE:
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        self.count += bool(waits)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sections", [
    {"optimizer": {"name": "adamw"}}, {"optimizer": {"name": "muon"}},
    {"training": {"activation_checkpointing": "selective"}}, {"training": {"activation_checkpointing": "full"}},
    {"data": {"document_mask": True}}, {"data": {"packing": "best_fit"}}, {"model": {"dropout": 0.1}},
    {"data": {"sources": [{"weight": 2}, {"weight": 1}]}},
], ids=str)  # fmt: skip
def test_the_host_reads_nothing_between_logging_steps(
    config_dict: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sections: Config
) -> None:
    """As on a GPU: where there is no device beside the host, nothing waits."""
    splits = {"train": [prose(60, seed) for seed in range(200)], "val": [prose(60, seed) for seed in range(300, 310)]}
    data = write_documents(tmp_path / "data", splits)
    shutil.copytree(data, tmp_path / "more")
    sections = copy.deepcopy(sections)
    config = merged(config_dict, data={"path": str(data)})
    if sources := sections.get("data", {}).get("sources"):
        del config["data"]["path"]
        for source, folder in zip(sources, ("data", "more"), strict=True):
            source["path"] = str(tmp_path / folder)
    monkeypatch.setattr(Processes, "host_sees_all", False)
    monkeypatch.setattr(document_mask, "_repeated_begins", document_mask._scanned_begins)  # as other devices do
    reads: list[int] = []
    with HostReads() as reading:

        def step_begins(_launch: Run) -> None:
            reads.append(reading.count)

        monkeypatch.setattr(Run, "stop_if_told", step_begins)
        every = {"logging": {"every": 10}, "training": {"eval_every": None}, "checkpoint": {"save_every": None}}
        run(merged(merged(config, **every), **sections))
    between = [after - before for before, after in itertools.pairwise(reads)]
    logging = [count for index, count in enumerate(between, start=1) if index % 10 == 0]
    assert all(count > 0 for count in logging)  # the counter counts
    assert sum(between) - sum(logging) == 0


@pytest.mark.parametrize(("length", "steps"), [
    ({"max_steps": 7}, 7), ({"epochs": 2}, 48), ({"max_tokens": 187 * 64 + 1}, 25), ({"max_tokens": 8 * 64 * 3}, 3),
])  # fmt: skip
def test_a_run_ends_by_steps_epochs_or_tokens(config_dict: Config, length: Config, steps: int) -> None:
    training = {"max_steps": None, "eval_every": None, **length}
    folder = run(merged(config_dict, training=training, checkpoint={"save_every": None}))
    assert records(folder)[-1]["step"] == steps
    assert committed_steps(folder) == [steps]


def test_more_steps_go_on_from_a_finished_run_and_change_nothing_before(config_dict: Config, tmp_path: Path) -> None:
    constant = merged(config_dict, schedule={"name": "constant"})
    whole = run(merged(constant, run={"dir": str(tmp_path / "whole")}))
    part = merged(constant, run={"dir": str(tmp_path / "part")})
    run(merged(part, training={"max_steps": 20}))
    assert numbers(run(part)) == numbers(whole)


def test_every_sample_comes_once_an_epoch_when_the_batch_size_changes_on_the_way(config_dict: Config) -> None:
    training = {"max_steps": None, "epochs": 1, "eval_every": None}
    with pytest.raises(Stopped):
        run(merged(config_dict, training={**training, "stop_after": 10}))
    folder = run(merged(config_dict, training={**training, "global_batch_size": 16, "micro_batch_size": 16}))
    # 10 × 8 samples, then the other 107 in batches of 16.
    assert records(folder)[-1]["step"] == 10 + 7
    assert records(folder)[-1]["tokens"] == 187 * 64


def test_the_ledger_shows_every_sample_once_an_epoch_also_after_a_resume(config_dict: Config) -> None:
    base = merged(config_dict, training={"max_steps": None, "epochs": 2}, logging={"sample_ledger": True})
    with pytest.raises(Stopped):
        run(base, "training.stop_after=33")
    folder = run(base)
    lines = [json.loads(line) for line in (folder / "samples-rank00000.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 49))
    for epoch in (lines[:24], lines[24:]):
        assert sorted(i for line in epoch for i in line["ids"]) == list(range(187))


def test_the_run_folder_holds_what_is_promised(config_dict: Config) -> None:
    folder = run(merged(config_dict, logging={"plots": True}, training={"sample_every": 15, "sample_tokens": 10}))
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml", "run.json", "training_metrics.json", "metrics.jsonl", "training_log.csv", "training_curve.png",
        "loss_by_epoch.png", "samples.jsonl", "best", "latest", "final",
    }  # fmt: skip
    metrics = json.loads((folder / "training_metrics.json").read_text())
    assert metrics["steps"] == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert metrics["epochs"] == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert [value is not None for value in metrics["val_loss"]] == [s in (10, 20, 30) for s in metrics["steps"]]
    assert metrics["train_loss"][-1] < metrics["train_loss"][0]
    [launch] = json.loads((folder / "run.json").read_text())["launches"]
    assert launch["packages"]["torch"] == torch.__version__
    assert len(launch["data"]["fingerprint"]) == 64
    assert [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()] == [15, 30]


@pytest.mark.slow
def test_the_resolved_config_gives_the_same_run(config_dict: Config, tmp_path: Path) -> None:
    first = run(merged(config_dict, run={"dir": str(tmp_path / "first")}))
    main(["--config", str(first / "config.yaml"), f"run.dir={tmp_path / 'second'}"])
    assert numbers(tmp_path / "second") == numbers(first)
    again = load_config(tmp_path / "second" / "config.yaml")
    assert again.model == load_config(first / "config.yaml").model


def test_best_and_the_last_three_are_kept(config_dict: Config) -> None:
    training = {"max_steps": 40, "eval_every": 8}
    checkpoint = {"save_every": 5, "keep_last": 2, "keep_every": 15}
    folder = run(merged(config_dict, training=training, checkpoint=checkpoint))
    best = pointed(folder, "best")
    assert best is not None
    expected = {35, 40, 15, 30, int(best.name[5:])}
    assert set(committed_steps(folder)) == expected


def test_every_validation_window_counts_once(config_dict: Config) -> None:
    """1,500 tokens, windows of 64: 23 windows, also when training windows overlap and the last batch is short."""
    config = merged(config_dict, training={"micro_batch_size": 4}, data={"stride": 10})
    with closing(make_engine(60.0)) as engine, Peers(engine) as peers:
        launch = Run(assemble(make_config(config), engine), "never", peers, StopSignals())
        validation = launch.validate(0, torch.zeros(()))
    assert validation is not None
    assert validation.tokens == 23 * 64
    assert validation.loss == pytest.approx(math.log(29), abs=0.1)


def test_init_from_starts_with_the_weights_of_another_run(config_dict: Config, tmp_path: Path) -> None:
    first = run(merged(config_dict, run={"dir": str(tmp_path / "first")}))
    trained = records(first)[-1]["val_loss"]
    second = merged(config_dict, run={"dir": str(tmp_path / "second")}, model={"init_from": str(first)})
    second = merged(second, optimizer={"lr": 0.0}, schedule={"min_lr": 0.0}, training={"max_steps": 1, "eval_every": 1})
    assert records(run(second))[-1]["val_loss"] == pytest.approx(trained, rel=1e-6)


def test_dry_run_checks_takes_a_step_and_writes_nothing(
    config_dict: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(config_dict, "--dry-run")
    printed = capsys.readouterr().out
    assert "one step" in printed
    assert re.search(r"memory  0\.0\d GB of tensors by the formulas, at the [a-z ]+$", printed, re.MULTILINE)
    assert "nothing was written" in printed
    assert not folder.exists()


def test_the_header_says_that_the_device_has_less_memory(
    config_dict: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmtrain.assemble.free_memory", lambda _device: 0)
    run(config_dict, "--dry-run")
    printed = capsys.readouterr().out
    assert re.search(r"memory  0\.0\d GB of tensors by .*; but 0\.00 GB are free$", printed, re.MULTILINE)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same_also_over_a_resume(config_dict: Config, tmp_path: Path) -> None:
    """Bit for bit over a resume, which compiles anew, as a process of its own does; else up to fused sums."""
    base = merged(config_dict, training={"max_steps": 6, "eval_every": None}, logging={"every": 1})

    def trained(name: str, *arguments: str, compiled: bool = True) -> Path:
        torch._dynamo.reset()
        return run(merged(base, run={"dir": str(tmp_path / name)}, training={"compile": compiled}), *arguments)

    plain, whole = trained("plain", compiled=False), trained("whole")
    for a, b in zip(records(plain), records(whole), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)  # fused float32 sums, 6 steps
    with pytest.raises(Stopped):
        trained("broken", "training.stop_after=3")
    resumed = trained("broken")
    assert numbers(resumed) == numbers(whole) != numbers(plain)
    before, after = weights(whole, 6), weights(resumed, 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles every run")
@pytest.mark.parametrize(
    ("length", "has_compiler", "is_compiled"),
    [("max_steps", True, True), ("max_tokens", True, True), ("epochs", True, True), ("epochs", False, False)],
)
def test_on_a_cpu_a_run_is_compiled_where_it_is_long_enough_for_that_to_pay(
    config_dict: Config, monkeypatch: pytest.MonkeyPatch, length: str, has_compiler: bool, is_compiled: bool
) -> None:
    if not has_compiler:
        monkeypatch.setattr("shutil.which", lambda _: None)

    def parts(flops: float) -> Assembly:
        with closing(make_engine(60.0)) as engine:
            short = assemble(make_config(config_dict), engine)
            tokens = flops * torch.get_num_threads() / short.flops_per_token()
            per_step = short.config.training.global_batch_size * short.config.data.seq_len
            unit = {"max_steps": per_step, "max_tokens": 1, "epochs": short.data.train_tokens}[length]
            training = {"compile": "auto", "max_steps": None, length: math.ceil(tokens / unit)}
            return assemble(make_config(merged(config_dict, training=training)), engine)

    assert parts(COMPILED_FROM_FLOPS).config.training.compile == is_compiled
    assert not parts(0.8 * COMPILED_FROM_FLOPS).config.training.compile


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles by other means")
@pytest.mark.parametrize(("asked", "code"), [("auto", 0), (True, 2)])
def test_a_compiler_that_does_not_work_costs_a_long_run_a_warning_and_who_asked_for_it_an_error(
    config_dict: Config, tmp_path: Path, llmtrain: Command, asked: object, code: int
) -> None:
    config = merged(config_dict, training={"compile": asked, "max_steps": 10**9})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = llmtrain("train", "--config", tmp_path / "config.yaml", "--dry-run", env={**os.environ, **broken})
    assert done.returncode == code, done.stderr
    line = "not compiled, by which this run would gain (training.compile): "
    line = line if asked == "auto" else "training.compile: true, but it does not work here: "
    assert line in done.stderr and "Traceback" not in done.stderr
    assert ("all checks passed" in done.stdout) == (code == 0)


@pytest.mark.parametrize(("saved", "now"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_may_go_on_in_another_precision_and_says_so(
    config_dict: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], saved: str, now: str
) -> None:
    """Into that of `now` and back before any step costs no bit, for the masters are float32 in both."""

    def goes_on(name: str, precision: str, before: str, *arguments: str) -> Path:
        config = merged(config_dict, run={"dir": str(tmp_path / name)}, training={"precision": precision})
        return run(config, "--resume", str(tmp_path / before / "step-00000007"), *arguments)

    whole = run(merged(config_dict, run={"dir": str(tmp_path / "whole")}, training={"precision": saved}))
    begin = merged(config_dict, run={"dir": str(tmp_path / "begun")}, training={"precision": saved})
    with pytest.raises(Stopped):
        run(begin, "training.stop_after=7")
    capsys.readouterr()
    with pytest.raises(Stopped):
        goes_on("other", now, "begun", "training.stop_after=7")
    assert f"changed since then: training.precision: {saved} → {now}\n" in capsys.readouterr().out
    before, after = weights(tmp_path / "begun", 7), weights(tmp_path / "other", 7)
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.float32}
    assert all(torch.equal(before[key], after[key]) for key in before)
    there, back = numbers(goes_on("there", now, "begun")), numbers(goes_on("back", saved, "other"))
    expected = [record for record in numbers(whole) if record[0] > 7]
    assert back == expected
    assert [record[0] for record in there] == [record[0] for record in expected]
    assert all(a[2] != b[2] for a, b in zip(there, expected, strict=True))  # it does compute in the other


def test_bf16_learns_as_float32_does(config_dict: Config, tmp_path: Path) -> None:
    results = []
    for precision in ("fp32", "bf16"):
        config = merged(config_dict, run={"dir": str(tmp_path / precision)}, training={"precision": precision})
        results.append(records(run(config)))
    assert results[0][0]["train_loss"] != results[1][0]["train_loss"]  # it really is another arithmetic
    # bf16 keeps 8 bits: relative error 2^-9 for each product, averaging out over thousands of targets.
    assert results[0][-1]["train_loss"] == pytest.approx(results[1][-1]["train_loss"], rel=2**-7)
    saved = weights(tmp_path / "bf16", 30)
    assert {value.dtype for value in saved.values()} == {torch.float32}  # masters


@pytest.mark.slow
def test_a_branch_starts_from_another_run_and_the_same_command_goes_on_and_says_so(
    config_dict: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = run(merged(config_dict, run={"dir": str(tmp_path / "trunk")}))
    start = str(trunk / "step-00000020")
    branch = merged(config_dict, run={"dir": str(tmp_path / "branch")}, training={"max_steps": 40})
    with pytest.raises(Stopped):
        run(branch, "--resume", start, "training.stop_after=25")
    assert "went on from there before" not in capsys.readouterr().err
    run(branch, "--resume", start)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "went on from there before" in line]
    assert line == (
        f"llmtrain: warning: --resume {start}: {tmp_path / 'branch'} went on from there before, and has come to step "
        "25 since: going on with that; to begin there once more, choose another run.dir"
    )
    assert [r["step"] for r in records(tmp_path / "branch")] == [24, 28, 30, 32, 36, 40]
    other = merged(config_dict, run={"dir": str(tmp_path / "other")})
    run(other)
    before = contents(tmp_path / "other")
    assert "holds another run than one from" in refused(other, "--resume", start)
    assert contents(tmp_path / "other") == before


def test_a_run_goes_back_to_one_of_its_own_checkpoints_and_again_only_where_that_is_meant(
    config_dict: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(config_dict)
    whole = numbers(folder)
    back = ("--resume", str(folder / "step-00000010"))
    with pytest.raises(Stopped):
        run(config_dict, *back, "training.stop_after=25")
    assert committed_steps(folder) == [10, 20, 25]
    assert len(list(folder.glob("step-*.aside-*"))) == 2  # renamed, not deleted
    assert "went on from there before" not in capsys.readouterr().err
    run(config_dict, *back)  # as a scheduler that starts the same command again
    assert numbers(folder) == whole
    assert committed_steps(folder) == [20, 25, 30]
    advice = "to go back once more, rename its later steps before (step-00000025 to step-00000025.aside-1)"
    assert f"has come to step 25 since: going on with that; {advice}\n" in capsys.readouterr().err
    assert len(list(folder.glob("step-*.aside-*"))) == 2


def test_the_advice_for_going_back_once_more_is_true(config_dict: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config = merged(config_dict, checkpoint={"keep_last": 9})
    folder = run(config)
    run(config, "--resume", str(folder / "step-00000010"))
    for step in ("step-00000020", "step-00000030"):
        (folder / step).rename(folder / f"{step}.aside-1")
    with pytest.raises(Stopped):
        run(config, "--resume", str(folder / "step-00000010"), "training.stop_after=15")
    assert committed_steps(folder) == [10, 15] and "went on from there before" not in capsys.readouterr().err


def test_links_left_behind_by_a_kill_are_set_right(config_dict: Config) -> None:
    with pytest.raises(Stopped):
        run(config_dict, "training.stop_after=25")
    folder = Path(config_dict["run"]["dir"])
    for name in ("best", "latest"):  # as a kill between the commit of 20 and its links would leave them
        point(folder, name, "step-00000010")
    with pytest.raises(Stopped):
        run(config_dict, "training.stop_after=25")
    assert pointed(folder, "best") == folder / "step-00000020"
    assert pointed(folder, "latest") == folder / "step-00000025"


def test_a_damaged_run_json_is_set_aside(config_dict: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped):
        run(config_dict, "training.stop_after=5")
    folder = Path(config_dict["run"]["dir"])
    (folder / "run.json").write_text("")
    run(config_dict)
    assert len(json.loads((folder / "run.json").read_text())["launches"]) == 1
    assert "run.unreadable.json" in capsys.readouterr().err


@pytest.mark.slow
def test_two_launches_in_one_folder_do_not_meet(config_dict: Config, tmp_path: Path) -> None:
    config = merged(config_dict, training={"max_steps": 100_000, "eval_every": None})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    first = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.train", "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: last_step(tmp_path / "run") >= 4, first)
        assert f"another launch is running in it (process {first.pid} on" in refused(config)
        assert first.poll() is None
    finally:
        first.terminate()
        assert first.wait(60) == 75


@pytest.mark.slow
def test_signals_after_the_first_do_not_cut_the_end_short(config_dict: Config, tmp_path: Path) -> None:
    config = merged(config_dict, training={"max_steps": 100_000, "eval_every": None}, logging={"plots": True})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.train", "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: last_step(tmp_path / "run") >= 4, process)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert process.returncode == 75
    assert (tmp_path / "run" / "training_curve.png").exists()


def test_an_empty_sample_prompt_begins_a_document(config_dict: Config) -> None:
    folder = run(merged(config_dict, training={"sample_every": 30, "sample_prompts": [""], "sample_tokens": 5}))
    [line] = (folder / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == ""


def test_missing_validation_is_said(config_dict: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = write_data(tmp_path / "short", {"train": prose(5_000), "val": prose(40)})
    run(merged(config_dict, data={"path": str(short)}, training={"max_steps": 2}))
    assert "no validation: the val split" in capsys.readouterr().err


def test_a_validation_loss_that_is_no_number_is_divergence(
    config_dict: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model, which may have no probabilities any more, is not asked to write before that is said."""
    broken = Validation(math.nan, 0.0, 1)
    monkeypatch.setattr("llmtrain.observe.validation.validate", lambda *_: broken)
    with pytest.raises(DivergedError, match="validation loss nan"):
        run(merged(config_dict, training={"sample_every": 10, "sample_prompts": ["The"]}))
    assert not (Path(config_dict["run"]["dir"]) / "samples.jsonl").exists()


@pytest.mark.parametrize(("variable", "value"), [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"), ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ("ACCELERATE_MIXED_PRECISION", "fp16"), ("ACCELERATE_USE_FSDP", "true"),
])  # fmt: skip
def test_a_launch_file_that_contradicts_the_config_is_refused(
    config_dict: Config, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    refused(config_dict)


# ---- bad input: one clear line, exit 2 (4 where nothing good is left), nothing lost ----


def corrupt_last(folder: Path) -> Path:
    path = folder / f"step-{committed_steps(folder)[-1]:08d}" / "rank00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(
    config_dict: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(merged(config_dict, run={"dir": str(tmp_path / "whole")}))
    broken = merged(config_dict, run={"dir": str(tmp_path / "broken")})
    with pytest.raises(Stopped):
        run(broken, "training.stop_after=26")
    damaged = corrupt_last(tmp_path / "broken")
    assert numbers(run(broken)) == numbers(whole)
    assert str(damaged) in capsys.readouterr().err


def test_no_good_checkpoint_left_is_exit_4(config_dict: Config) -> None:
    with pytest.raises(Stopped):
        run(config_dict, "training.stop_after=3")
    corrupt_last(Path(config_dict["run"]["dir"]))
    with pytest.raises(LlmtrainError) as error:
        run(config_dict)
    assert error.value.exit_code == 4


def refused(config: Config, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        run(config, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_folder_with_another_run_is_refused_and_left_alone(config_dict: Config, tmp_path: Path) -> None:
    folder = run(config_dict)
    before = contents(folder)
    assert "holds another run" in refused(config_dict, "--resume", "never")
    assert "model.dim=32, this run has 64" in refused(merged(config_dict, model={"dim": 64}))
    other = write_data(tmp_path / "other", {"train": prose(9_000, seed=5), "val": prose(900)})
    assert "other data" in refused(merged(config_dict, data={"path": str(other)}))
    letters = write_data(tmp_path / "letters", {"train": prose(9_000).upper(), "val": prose(900).upper()})
    assert "another tokenizer" in refused(merged(config_dict, data={"path": str(letters)}))
    assert contents(folder) == before


@pytest.mark.parametrize(("sections", "reason"), [
    ({"model": {"dim": 33}}, "not divisible by heads"),
    ({"training": {"micro_batch_size": 3}}, "not divisible by micro_batch_size"),
    ({"data": {"seq_len": 50_000}}, "longer than the data"),
    ({"model": {"vocab_size": 5}}, "smaller than"),
    ({"data": {"path": "nowhere"}}, "not prepared data"),
    ({"training": {"sample_every": 5, "sample_prompts": ["日本"]}}, "日"),
    ({"model": {"init_from": "nowhere"}}, "nowhere: no such folder"),
    ({"run": {"dir": "/dev/null/run"}}, "cannot be written"),
])  # fmt: skip
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_contradictions_are_refused_before_anything_is_written(
    config_dict: Config, tmp_path: Path, sections: Config, reason: str, arguments: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(merged(config_dict, **sections)))
    with pytest.raises(UserError) as error:
        main(["--config", str(path), *arguments])
    assert reason in str(error.value)
    assert not (tmp_path / "run").exists()


def test_init_from_a_run_with_another_tokenizer_is_refused(config_dict: Config, tmp_path: Path) -> None:
    """The same number of characters, but other ones: the shapes fit and the ids mean something else."""
    first = run(merged(config_dict, run={"dir": str(tmp_path / "first")}))
    swapped = {ord("e"): "z"}
    splits = {"train": prose(9000).translate(swapped), "val": prose(900, seed=1).translate(swapped)}
    data = write_data(tmp_path / "swapped", splits)
    config = merged(config_dict, data={"path": str(data)}, model={"init_from": str(first)})
    assert "another tokenizer" in refused(config)


def copied(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def test_a_truncated_shard_is_named(config_dict: Config, data: Path, tmp_path: Path) -> None:
    folder = copied(data, tmp_path)
    with (folder / "train-00001.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(LlmtrainError, match=r"train-00001\.bin: has 100 bytes where the manifest says"):
        run(merged(config_dict, data={"path": str(folder)}))


def test_an_id_outside_the_vocabulary_is_named_and_checkpoints_stay(
    config_dict: Config, data: Path, tmp_path: Path
) -> None:
    folder = copied(data, tmp_path)
    with (folder / "train-00001.bin").open("r+b") as file:
        file.seek(2 * 4000)
        file.write(b"\xff\xff")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][1]["sample_sha256"] = None  # which would notice it before
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LlmtrainError, match=r"train-00001\.bin: token id 65535 at position 4000 is outside"):
        run(merged(config_dict, data={"path": str(folder)}))


@pytest.mark.slow
def test_errors_of_the_user_are_one_line_and_exit_2(llmtrain: Command, config_dict: Config, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("optimizer: {learning_rate: 1.0}\n")
    for arguments in (["--config", path], ["--config", tmp_path / "none.yaml"], ["--config", path, "--resume"]):
        result = llmtrain("train", *arguments)
        assert result.returncode == 2, result
        assert len(result.stderr.strip().splitlines()) == 1
    assert "unknown key 'optimizer.learning_rate'" in llmtrain("train", "--config", path).stderr


def test_divergence_is_exit_3_and_leaves_the_good_checkpoints(config_dict: Config, tmp_path: Path) -> None:
    config = merged(
        config_dict, optimizer={"name": "sgd", "lr": 1e30, "clip_norm": None},
        schedule={"warmup_steps": 0, "min_lr": 0.0}, checkpoint={"save_every": 1}, logging={"every": 7},
    )  # fmt: skip
    with pytest.raises(LlmtrainError, match="diverged") as error:
        run(config)
    assert error.value.exit_code == 3
    assert committed_steps(tmp_path / "run")
    for step in committed_steps(tmp_path / "run"):
        assert all(value.isfinite().all() for value in weights(tmp_path / "run", step).values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of its own, of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_cleanly(
    llmtrain: Command, config_dict: Config, small_disk: Path, tmp_path: Path
) -> None:
    folder = small_disk / "run"
    config = merged(config_dict, run={"dir": str(folder)}, checkpoint={"save_every": 5, "keep_last": 100})
    path = tmp_path / "full.yaml"
    path.write_text(yaml.safe_dump(merged(config, training={"max_steps": 500, "eval_every": None})))
    result = llmtrain("train", "--config", path)
    assert result.returncode == 2, result
    assert "No space left on device" in result.stderr and "the second save in a row that failed" in result.stderr
    assert "Traceback" not in result.stderr
    steps = committed_steps(folder)
    assert steps
    for step in steps:
        assert CheckpointReader(folder / f"step-{step:08d}").verify() == []


@pytest.mark.slow
def test_a_run_goes_on_when_a_full_disk_has_room_again(config_dict: Config, small_disk: Path, tmp_path: Path) -> None:
    """Full at one save: a warning. Room again: the next one is committed."""
    training = {"max_steps": 100_000, "eval_every": None}
    config = merged(
        config_dict, run={"dir": str(small_disk / "run")}, checkpoint={"save_every": 200}, training=training
    )
    path, folder = tmp_path / "full.yaml", small_disk / "run"
    path.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.train", "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    wait_until(lambda: bool(committed_steps(folder)), process)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
    warning = next(line for line in process.stderr if "failed" in line)
    assert "No space left on device" in warning and "earlier checkpoints are intact" in warning
    (small_disk / "ballast").unlink()
    failed = int(warning.split("saving step ")[1].split()[0])
    wait_until(lambda: committed_steps(folder)[-1] > failed, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 75, said
    assert failed not in committed_steps(folder) and not (folder / f"step-{failed:08d}").exists()
    assert CheckpointReader(folder / f"step-{committed_steps(folder)[-1]:08d}").verify() == []


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_goes_on_and_is_stopped_as_ever(
    config_dict: Config, tmp_path: Path
) -> None:
    """Ctrl-C ends the `tee` behind the pipe, too: the run still saves, and 0 would say that it is done."""
    path, folder = tmp_path / "read.yaml", tmp_path / "run"
    training = {"max_steps": 100_000, "eval_every": 10}
    path.write_text(yaml.safe_dump(merged(config_dict, training=training, checkpoint={"save_every": 10})))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.train", "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    wait_until(lambda: bool(committed_steps(folder)), process)
    process.stdout.close()
    last = committed_steps(folder)[-1]
    wait_until(lambda: committed_steps(folder)[-1] > last + 50, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 75
    assert committed_steps(folder)[-1] >= records(folder)[-1]["step"]
    assert CheckpointReader(folder / f"step-{committed_steps(folder)[-1]:08d}").verify() == []


@pytest.mark.slow
@pytest.mark.parametrize("is_kept_on", [False, True], ids=["as started", "nohup"])
def test_a_terminal_that_is_closed_stops_a_run_as_a_signal_does_unless_it_is_to_be_kept_on(
    config_dict: Config, tmp_path: Path, is_kept_on: bool
) -> None:
    path, folder = tmp_path / "closed.yaml", tmp_path / "run"
    path.write_text(
        yaml.safe_dump(
            merged(
                config_dict,
                training={"max_steps": 100_000},
                checkpoint={"save_every": 10},
                logging={"console": "live"},
            )
        )
    )

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_kept_on else signal.SIG_DFL)
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)

    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.train", "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
        stdin=theirs, stdout=theirs, stderr=theirs, text=True, start_new_session=True,
        preexec_fn=take_terminal,  # noqa: PLW1509 -- no other thread runs here
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)

    def reads_until_saved() -> bool:
        with suppress(BlockingIOError):
            os.read(ours, 1 << 16)
        return bool(committed_steps(folder))

    wait_until(reads_until_saved, process)
    os.close(ours)
    if is_kept_on:
        last = committed_steps(folder)[-1]
        wait_until(lambda: committed_steps(folder)[-1] > last + 50, process)
        process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 75
    assert committed_steps(folder)[-1] >= records(folder)[-1]["step"]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused(
    llmtrain: Command, config_dict: Config, small_disk: Path, tmp_path: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    path = tmp_path / "ro.yaml"
    path.write_text(yaml.safe_dump(merged(config_dict, run={"dir": str(small_disk / "run")})))
    result = llmtrain("train", "--config", path)
    assert result.returncode == 2, result
    assert "cannot be written" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_profile_says_where_the_time_goes_and_changes_no_number(
    config_dict: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(merged(config_dict, training={"max_steps": 8}, run={"dir": str(tmp_path / "plain")}))
    capsys.readouterr()
    profiled = run(merged(config_dict, training={"max_steps": 8, "profile": {"start": 3, "steps": 2}}))
    said = capsys.readouterr().out
    assert numbers(profiled) == numbers(plain)
    assert f"profile of steps 3 to 4; traces: {profiled / 'profile'}" in said
    result = json.loads((profiled / "profile" / "rank00000.json").read_text())
    assert (result["first_step"], result["steps"], result["exchanges_ms_per_step"]) == (3, 2, 0)
    phases = {"between steps", "data", "forward", "backward", "update"}
    assert phases <= result["ms_per_step"].keys() and all(ms > 0 for ms in result["ms_per_step"].values())
    assert result["ms_per_step"]["backward"] > result["ms_per_step"]["between steps"]
    assert all(f"  {phase} " in said for phase in phases) and "ms a step" in said
    with gzip.open(profiled / "profile" / "rank00000.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert len([event for event in events if event.get("name", "").startswith("Optimizer.step")]) == 2


def test_a_profile_that_the_end_of_the_run_cuts_short_is_written(config_dict: Config) -> None:
    folder = run(merged(config_dict, training={"max_steps": 4, "profile": {"start": 3, "steps": 50}}))
    assert json.loads((folder / "profile" / "rank00000.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_a_stop_in_the_middle_of_a_profile_is_a_stop(config_dict: Config, tmp_path: Path) -> None:
    """In a process of its own: a profile that is left on crashes the end of the interpreter."""
    config = merged(config_dict, training={"max_steps": 8, "stop_after": 4, "profile": {"start": 3, "steps": 50}})
    (tmp_path / "stopped.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "llmtrain", "train", "--config", str(tmp_path / "stopped.yaml")]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == 75, stopped.stderr
    folder = run(merged(config, training={"stop_after": None, "profile": {"start": 6, "steps": 2}}))
    assert json.loads((folder / "profile" / "rank00000.json").read_text())["first_step"] == 6
