"""The facts of a run in words, as the terminal and the page show them alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmtrain.observe import formats
from llmtrain.observe.run_facts import Facts, interrupted
from llmtrain.observe.run_folder import Launch, RunFolder

STATE_WORDS = {
    "killed": "killed, without a word",
    "?": "running or killed: its lock cannot be seen from here",
}


def rows_of(facts: Facts) -> Iterator[tuple[str, str]]:
    """The lines of a run's table: name, value; only what is known."""
    if facts["why"]:
        yield "ended", formats.printable(facts["why"])
    yield "steps", _steps(facts)
    for name, what in (("training loss", "train"), ("validation loss", "val")):
        if facts["loss"][what]:
            yield name, _losses(facts["loss"][what])
    if rate := facts["learning_rate"]:
        schedule = f"{rate['schedule']}: " if rate["schedule"] else ""
        path = " → ".join(formats.rate(rate[name]) for name in ("first", "peak", "last"))
        yield "learning rate", f"{schedule}{path}, peak at step {formats.count(rate['peak_step'])}"
    if facts["tokens"] is not None:
        yield "tokens", formats.count(facts["tokens"])
    if facts["seconds"]["whole"]:
        yield "time", _time(facts["seconds"])
    yield from _speed(facts)
    if ends := interrupted([Launch(**launch) for launch in facts["launches"]]):
        kinds = ", ".join(f"{ends.count(kind)} {kind}" for kind in dict.fromkeys(ends))
        yield "interruptions", f"{len(ends):,} ({kinds})"
    if facts["skipped"]["steps"] or facts["skipped"]["rollbacks"]:
        skipped = facts["skipped"]
        times = "once" if skipped["rollbacks"] == 1 else f"{skipped['rollbacks']:,} times"
        yield "skipped steps", f"{skipped['steps']:,}" + (f", went back {times}" if skipped["rollbacks"] else "")
    yield "checkpoints", _checkpoints(facts["checkpoints"])
    for problem in facts["problems"]:
        yield "note", formats.printable(problem)


def _steps(facts: Facts) -> str:
    done, total = facts["steps"]["done"], facts["steps"]["total"]
    text = f"{formats.count(done)} of {formats.count(total)} ({formats.percent(done / total)})" if total else str(done)
    epochs = len(facts["epochs"])
    if epochs:
        text += f" · epoch {facts['epochs'][-1]['epoch'] + 1}"
    if facts["state"] in ("running", "?") and facts["last_record_age_s"] is not None:
        text += f" · last record {formats.duration(facts['last_record_age_s'])} ago"
    return text


def _losses(losses: Facts) -> str:
    share = f" ({formats.change(-losses['reduction_share'])})" if losses["reduction_share"] is not None else ""
    return (
        f"{formats.loss(losses['initial'])} → {formats.loss(losses['final'])}, {-losses['reduction']:+.3f}{share} · "
        f"best {formats.loss(losses['best'])} at step {formats.count(losses['best_step'])}"
    )


def _time(seconds: Facts) -> str:
    parts = [f"{formats.duration(seconds['training'])} in steps"]
    if seconds["other"] is not None:
        parts.append(f"{formats.duration(seconds['other'])} beside them")
    if seconds["away"]:
        parts.append(f"{formats.duration(seconds['away'])} not running")
    return f"{formats.duration(seconds['whole'])}: {', '.join(parts)}"


def _speed(facts: Facts) -> Iterator[tuple[str, str]]:
    if speed := facts["tokens_per_sec"]:
        step_s = facts["step_time_s"]
        a_step = f" · {1000 * step_s['median']:,.1f} ms a step" if step_s else ""
        yield (
            "throughput",
            f"{formats.compact(speed['median'])} tokens/s, last {formats.compact(speed['last'])}{a_step}",
        )
    mfu, device = facts["mfu"], facts["machine"]["device"]
    if mfu:
        yield "MFU", f"{100 * mfu['median']:.1f} %"
    elif facts["tokens_per_sec"]:
        yield "MFU", f"unknown: no peak is known of {device or 'this device'}"
    if facts["data_share"] is not None:
        yield "waiting for data", f"{100 * facts['data_share']:.1f} % of a step"
    if facts["memory_gb"] is not None:
        yield "memory", f"{facts['memory_gb']:.2f} GB at most, of one device"
    processes = facts["machine"]["processes"]
    if device or processes:
        many = f"{processes} processes" if processes != 1 else "1 process"
        yield "machine", f"{device or '?'} · {many if processes else '?'}"


def _checkpoints(facts: Facts) -> str:
    if not facts["count"]:
        return "none yet"
    text = (
        f"{facts['count']} ({formats.compact(facts['bytes'])}B) · last of step {formats.count(facts['last_step'])}, "
        f"{formats.duration(facts['last_age_s'])} ago"
    )
    return text + (f" · best of step {formats.count(facts['best_step'])}" if facts["best_step"] else "")


def config_differences(runs: list[RunFolder]) -> dict[str, list[Any]]:
    """The keys whose values are not the same in all runs, but where they live: the value in each."""
    keys = sorted({key for run in runs for key in run.config})
    values = {key: [run.config.get(key) for run in runs] for key in keys if key != "run.dir"}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}
