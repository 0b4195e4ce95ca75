"""A plan on a terminal: tables, and what they mean in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmtrain.observe.formats import compact, duration

Facts = dict[str, Any]
PLAIN_WIDTH = 150  # where the output is no terminal
MEMORY_PARTS = ("weights", "gradients", "optimizer", "casts", "activations", "logits", "buffers", "peak", "host")


def show(facts: Facts, console: Console | None = None) -> None:
    """Print what `planning.facts.plan` found."""
    if console is None:
        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = PLAIN_WIDTH
    for title, body in _sections(facts):
        console.print(Text(title, "bold"))
        console.print(Padding(body, (0, 0, 1, 2), expand=False))
    for note in facts["notes"]:
        console.print(Text(f"note: {note}"))


def _sections(facts: Facts) -> Iterator[tuple[str, Table]]:
    config, gpu, memory = facts["config"], facts["gpu"], facts["memory"]
    yield "model", _pairs(_model(facts))
    yield (
        f"memory of each GPU, GB · micro-batch {memory['micro_batch_size']} × {config['seq_len']:,} tokens · "
        f"activation_checkpointing {memory['activation_checkpointing']} · {gpu['name']} has "
        f"{gpu['memory_bytes'] / 1e9:.0f}",
        _memory(memory["engines"]),
    )
    count = f"{gpu['count']} GPU{'s' if gpu['count'] > 1 else ''}"
    yield f"this config on {count}", _pairs(_run(facts["layout"], facts["run"]) | _disk(facts["checkpoint"]))
    best = facts["fastest"]
    engine = {"engine": facts["engine_why"]}
    yield f"the fastest layout that fits {count}", _pairs(engine | (_run(best, best) if best else {}))
    yield "compute-optimal (Hoffmann et al. 2022: C = 6 N D, D = 20 N)", _pairs(_optimal(facts))
    if facts["search"]:
        yield "the fastest layout that fits, by GPUs", _layouts(facts["search"])
    batch = config["global_batch_size"]
    yield f"scaling, at the config's batch of {batch:,} sequences", _layouts(facts["scaling"])


def _pairs(pairs: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, Text(value))
    return table


def _columns(*headings: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right", no_wrap=True)
    return table


def _model(facts: Facts) -> dict[str, str]:
    config, parameters, flops = facts["config"], facts["parameters"], facts["flops_per_token"]
    return {
        "parameters": f"{parameters['total']:,}: blocks {parameters['blocks']:,}, embeddings "
        f"{parameters['embeddings']:,}, norms {parameters['norms']:,}",
        "shape": f"{config['layers']} layers × {config['dim']} wide, {config['heads']} heads, vocabulary "
        f"{config['vocab_size']:,}",
        "FLOPs per token": f"{flops['causal']:.3e} (attention as causal), {flops['palm']:.3e} (PaLM's formula), "
        f"{flops['6n']:.3e} (6 N)",
        "batch": f"{config['global_batch_size']:,} sequences = {config['batch_tokens']:,} tokens",
    }


def _memory(engines: Facts) -> Table:
    table = _columns("engine", *MEMORY_PARTS[:-2], "at once", "host", "fits", "largest micro-batch")
    for engine, row in engines.items():
        cells = [f"{row[part] / 1e9:,.2f}" for part in MEMORY_PARTS]
        largest = row["largest_micro_batch"]
        table.add_row(engine, *cells, "yes" if row["fits"] else "no", f"{largest:,}" if largest else "-")
    return table


def _run(layout: Facts, run: Facts) -> dict[str, str]:
    parts = {name: seconds / layout["step_s"] for name, seconds in layout["step_parts_s"].items()}
    told = ", ".join(f"{name} {share:.0%}" for name, share in parts.items() if share >= 0.005)
    fits = "" if layout["fits"] else ": DOES NOT FIT, so the times are of no use"
    mfu = "" if layout["mfu"] is None else f", MFU {layout['mfu']:.1%} ({layout['mfu_palm']:.1%} by PaLM's formula)"
    return {
        "layout": f"{layout['engine']}, micro-batch {layout['micro_batch']} × {layout['accumulation']} accumulated, "
        f"activation_checkpointing {layout['checkpointing']}, {layout['peak_bytes'] / 1e9:,.1f} GB{fits}",
        "speed": f"{layout['tokens_per_second']:,.0f} tokens/s, {layout['tokens_per_second_per_gpu']:,.0f} for each "
        f"GPU{mfu}",
        "step": f"{layout['step_s']:.3g} s: {told}",
        "run": f"{compact(run['tokens'])} tokens{_source(run)} in {run['steps']:,} steps, {run['flops']:.2e} FLOPs",
        "time": f"{duration(run['seconds'])}, {run['gpu_hours']:,.1f} GPU hours",
        "cost": _cost(run) or "unknown; --price-per-gpu-hour says it",
    }


def _source(run: Facts) -> str:
    return f" ({run['tokens_from']})" if run["tokens_from"] else ""


def _cost(run: Facts) -> str:
    return "" if run["cost"] is None else f"{run['cost']:,.2f} at {run['price_per_gpu_hour']:g} for a GPU hour"


def _disk(checkpoint: Facts) -> dict[str, str]:
    size, every = checkpoint["bytes"], checkpoint["save_every"]
    often = "" if every is None else f", one in {duration(checkpoint['seconds_between'])} (save_every {every:,})"
    return {
        "checkpoint": f"{_gigabytes(size)} in {_seconds(checkpoint['write_s'])} at "
        f"{checkpoint['disk_bytes_per_second'] / 1e9:g} GB/s, training waits {_seconds(checkpoint['copy_s'])}{often}; "
        f"{_gigabytes(checkpoint['kept_bytes'])} are kept",
    }


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else duration(seconds)


def _optimal(facts: Facts) -> dict[str, str]:
    optimal = facts["optimal"]
    return {
        "this run": f"{optimal['tokens_per_parameter']:.3g} tokens for each parameter; 20 would be "
        f"{compact(optimal['tokens_for_this_size'])} tokens",
        "this compute": f"is best spent on {compact(optimal['parameters_for_this_compute'])} parameters and "
        f"{compact(optimal['tokens_for_this_compute'])} tokens",
    }


def _layouts(rows: list[Facts]) -> Table:
    table = _columns(
        "GPUs", "engine", "recompute", "micro × acc.", "GB", "tokens/s", "per GPU", "MFU", "time", "GPU hours", "cost",
        left=3,
    )  # fmt: skip
    for row in rows:
        if not row["fits"]:
            table.add_row(f"{row['gpus']:,}", "nothing fits")
            continue
        table.add_row(
            f"{row['gpus']:,}", row["engine"], row["checkpointing"], f"{row['micro_batch']} × {row['accumulation']}",
            f"{row['peak_bytes'] / 1e9:.1f}", f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second_per_gpu']:,.0f}", "" if row["mfu"] is None else f"{row['mfu']:.1%}",
            duration(row["seconds"]), f"{row['gpu_hours']:,.1f}",
            "" if row["cost"] is None else f"{row['cost']:,.0f}",
        )  # fmt: skip
    return table
