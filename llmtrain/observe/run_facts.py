"""The facts of a run that a report shows, JSON-ready: losses, rates, time, interruptions, checkpoints, diagnosis."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from llmtrain.health.diagnosis import Curves, Remark, diagnose
from llmtrain.health.pace_diagnosis import PaceCurves, diagnose_pace
from llmtrain.observe.record import finite
from llmtrain.observe.run_folder import Launch, RunFolder
from llmtrain.observe.series import Floats

Facts = dict[str, Any]
_SILENT_S = 300.0  # without a record, at least, before that is worth a word


def facts_of(run: RunFolder) -> Facts:
    """Everything but the curves themselves; numbers that are not known are None."""
    seconds = _seconds(run)
    return {
        "run": str(run.path),
        "name": run.name,
        "state": run.state(),
        "why": run.launches[-1].why if run.launches and run.state() != "running" else None,
        "records": len(run),
        "steps": {"done": run.last_step, "total": run.total_steps},
        "last_record_age_s": finite(run.read_at - float(run.columns["time"][-1])) if len(run) else None,
        "loss": {"train": _of_losses(run, "train_loss"), "val": _of_losses(run, "val_loss")},
        "epochs": _epochs(run),
        "learning_rate": _rates(run),
        "tokens": _last(run, "tokens"),
        "seconds": seconds,
        "tokens_per_sec": _speed(run, "tokens_per_sec"),
        "step_time_s": _speed(run, "step_time_s"),
        "mfu": _speed(run, "mfu"),
        "memory_gb": _most(run, "memory_gb"),
        "data_share": _data_share(run),
        "machine": {
            "device": run.launches[-1].device if run.launches else None,
            "processes": run.launches[-1].world_size if run.launches else None,
        },
        "launches": [asdict(launch) for launch in run.launches],
        "interruptions": len(interrupted(run.launches)),
        "skipped": _skipped(run),
        "checkpoints": _checkpoints(run),
        "samples": len(run.samples),
        "diagnosis": [asdict(remark) for remark in diagnosis_of(run, seconds)],
        "problems": [*run.problems, *_silence(run)],
    }


def interrupted(launches: list[Launch]) -> list[str]:
    """How each launch ended that another one went on from; one that was done is prolonged, not interrupted."""
    return [launch.how or "killed" for launch in launches[:-1] if launch.how != "done"]


def curves_of(run: RunFolder) -> dict[str, list[float | None]]:
    """Every column of the records, one value for each; null: not known."""
    return {name: [finite(value) for value in column.tolist()] for name, column in run.columns.items()}


def diagnosis_of(run: RunFolder, seconds: Facts) -> list[Remark]:
    """What the curves say."""
    columns, (val_step, val_loss) = run.columns, run.points("val_loss")
    skipped = _skipped(run)
    vocabulary = run.config.get("model.vocab_size")
    curves = Curves(
        step=columns["step"],
        train_loss=columns["train_loss"],
        learning_rate=columns["learning_rate"],
        val_step=val_step,
        val_loss=val_loss,
        warmup_steps=int(run.config.get("schedule.warmup_steps") or 0),
        is_over=run.state() == "done",
        chance=math.log(vocabulary) if isinstance(vocabulary, int) and vocabulary > 1 else None,
        epochs=float(columns["epoch"][-1]) + 1 if len(run) else 0.0,
        skipped=skipped["steps"],
        not_finite=skipped["not_finite"],
        rollbacks=skipped["rollbacks"],
        ended=run.state(),
    )
    pace = PaceCurves(
        tokens_per_sec=columns["tokens_per_sec"],
        step_time_s=columns["step_time_s"],
        data_time_s=columns["data_time_s"],
        spread_s=columns["step_time_spread_s"],
        slowest_rank=columns["slowest_rank"],
        mfu=columns["mfu"],
        training_s=seconds["training"] or 0.0,
        other_s=seconds["other"] or 0.0,
    )
    return [*diagnose(curves), *diagnose_pace(pace)]


def _of_losses(run: RunFolder, name: str) -> Facts | None:
    steps, losses = run.points(name)
    if not len(steps):
        return None
    best = int(losses.argmin())
    return {
        "initial": float(losses[0]),
        "final": float(losses[-1]),
        "best": float(losses[best]),
        "best_step": int(steps[best]),
        "reduction": float(losses[0] - losses[-1]),
        "reduction_share": finite(float((losses[0] - losses[-1]) / losses[0])) if losses[0] else None,
        "values": len(steps),
    }


def _epochs(run: RunFolder) -> list[Facts]:
    """Mean training loss of the records of each epoch, and its last validation loss, as in loss_by_epoch.png."""
    epochs, rows = run.columns["epoch"], []
    for epoch in np.unique(epochs[np.isfinite(epochs)]):
        train, val = (run.columns[name][epochs == epoch] for name in ("train_loss", "val_loss"))
        train, val = train[np.isfinite(train)], val[np.isfinite(val)]
        mean, last = float(train.mean()) if len(train) else None, float(val[-1]) if len(val) else None
        rows.append({"epoch": int(epoch), "train_loss": mean, "val_loss": last})
    return rows


def _rates(run: RunFolder) -> Facts | None:
    steps, rates = run.points("learning_rate")
    if not len(steps):
        return None
    peak = int(rates.argmax())
    return {
        "schedule": run.config.get("schedule.name"),
        "warmup_steps": run.config.get("schedule.warmup_steps"),
        "first": float(rates[0]),
        "peak": float(rates[peak]),
        "peak_step": int(steps[peak]),
        "last": float(rates[-1]),
    }


def _seconds(run: RunFolder) -> Facts:
    """How the time since the first launch was spent; work that a kill undid counts as other."""
    columns = run.columns
    steps = np.diff(columns["step"], prepend=0.0)
    training = float(np.nansum(columns["step_time_s"] * steps))
    times = columns["time"][np.isfinite(columns["time"])]
    starts = [launch.started for launch in run.launches if launch.started is not None]
    if not len(times):
        return {"training": training or None, "other": None, "away": None, "whole": None}
    begin = min([*starts[:1], float(times[0])])
    last = run.launches[-1].ended if run.launches else None
    end = max(float(times[-1]), last or 0.0)
    away = sum(_pause(run, times, number) for number in range(1, len(run.launches)))
    whole = max(training, end - begin)
    return {
        "training": training,
        "other": max(0.0, whole - away - training),
        "away": away,
        "whole": whole,
    }


def _pause(run: RunFolder, times: Floats, number: int) -> float:
    """From the end of the launch before to the start of this one; one that was killed ended with its last record."""
    started, before = run.launches[number].started, run.launches[number - 1]
    if started is None:
        return 0.0
    known = times[times < started]
    ended = max([*([before.started] if before.started else []), *known[-1:].tolist()], default=started)
    return max(0.0, started - (before.ended or ended))


def _speed(run: RunFolder, name: str) -> Facts | None:
    _, values = run.points(name)
    if not len(values):
        return None
    # The first record is slower than the others: compilation, and memory that is touched for the first time.
    usual = values[1:] if len(values) > 2 else values
    return {"median": float(np.median(usual)), "last": float(values[-1])}


def _data_share(run: RunFolder) -> float | None:
    data, steps = run.columns["data_time_s"], run.columns["step_time_s"]
    known = np.isfinite(data) & np.isfinite(steps)
    return float(data[known].sum() / steps[known].sum()) if steps[known].sum() > 0 else None


def _last(run: RunFolder, name: str) -> int | None:
    _, values = run.points(name)
    return int(values[-1]) if len(values) else None


def _most(run: RunFolder, name: str) -> float | None:
    _, values = run.points(name)
    return float(values.max()) if len(values) else None


def _skipped(run: RunFolder) -> Facts:
    steps = [entry for entry in run.skipped if "back_to" not in entry]
    is_finite = [isinstance(entry.get("loss"), float) and isinstance(entry.get("grad_norm"), float) for entry in steps]
    return {
        "steps": len(steps),
        "not_finite": len(is_finite) - sum(is_finite),
        "rollbacks": len(run.skipped) - len(steps),
        "last": [{key: entry.get(key) for key in ("step", "reason", "back_to")} for entry in run.skipped[-3:]],
    }


def _checkpoints(run: RunFolder) -> Facts:
    newest = run.checkpoints[-1] if run.checkpoints else None
    return {
        "count": len(run.checkpoints),
        "bytes": sum(checkpoint.bytes for checkpoint in run.checkpoints),
        "last_step": newest.step if newest else None,
        "last_age_s": run.read_at - newest.time if newest else None,
        "best_step": run.pointers.get("best"),
        "final_step": run.pointers.get("final"),
    }


def _silence(run: RunFolder) -> list[str]:
    """A run that holds its folder, but has not been heard of for 20 times as long as usual."""
    times = run.columns["time"][np.isfinite(run.columns["time"])]
    if run.state() != "running" or len(times) < 3:
        return []
    age, usual = run.read_at - float(times[-1]), float(np.median(np.diff(times)))
    if age < max(_SILENT_S, 20 * usual):
        return []
    return [f"no record for {age / 60:,.0f} minutes, where one usually comes every {usual:,.0f} s: it may hang"]
