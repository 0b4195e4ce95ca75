"""Write the tables of memory in distributed.md: `python docs/memory_table.py`.

They come out of llmtrain/model/memory.py and peak.py; what checkpointing was measured to hold and cost, out of
benchmarks/results/recompute.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtrain.config import make_config
from llmtrain.model.memory import EngineName, Offload, rank_memory
from llmtrain.model.peak import PeakMemory, peak_memory

GUIDE = Path(__file__).with_name("distributed.md")
BEGIN, END = "<!-- memory table: python docs/memory_table.py -->\n", "<!-- end of memory table -->\n"
BEGIN_KINDS, END_KINDS = BEGIN.replace("memory", "checkpointing", 1), END.replace("memory", "checkpointing")
MEASURED = GUIDE.parents[1] / "benchmarks/results/recompute.json"
PRESETS = ("124m", "1.3b", "7b", "13b", "70b")
VOCAB_SIZE, SEQ_LEN = 50_304, 2048
ROWS: list[tuple[EngineName, Offload, tuple[int, ...]]] = [
    ("single", "none", (1,)),
    ("ddp", "none", (8,)),
    ("zero1", "none", (8, 64)),
    ("zero2", "none", (8, 64)),
    ("zero3", "none", (8, 64)),
    ("zero3", "parameters", (1, 8, 64)),
]


def table() -> str:
    """Markdown; bytes in GB (1e9), of AdamW in bf16 with accumulation."""
    lines = [
        f"| engine | GPUs | {' | '.join(preset.upper() for preset in PRESETS)} |",
        f"|---|---:|{'---:|' * len(PRESETS)}",
    ]
    for engine, offload, counts in ROWS:
        for gpus in counts:
            name = engine if offload == "none" else f"{engine}-offload"
            shown = "any" if engine == "ddp" else str(gpus)
            cells = [_cell(preset, engine, offload, gpus) for preset in PRESETS]
            lines.append(f"| `{name}` | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(preset: str, engine: EngineName, offload: Offload, gpus: int) -> str:
    model = make_config({"model": {"preset": preset, "vocab_size": VOCAB_SIZE}}).model
    memory = rank_memory(engine, model, SEQ_LEN, world_size=gpus, offload=offload)
    host = f" + {_gigabytes(memory.host)}" if memory.host else ""
    return _gigabytes(memory.device) + host


def checkpointing_table() -> str:
    """Markdown; bytes in GB (1e9) of the whole step that benchmarks/recompute.py counted, and its times."""
    lines = [
        "| `activation_checkpointing` | blocks keep | peak, GPU | saves | peak, CPU | counted there | step longer by |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    *rows, facts = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    before = _peak(facts["memory of"], "none", "cuda").bytes
    for row in rows:
        kind = row["activation_checkpointing"]
        on_gpu, on_cpu = (_peak(facts["memory of"], kind, device) for device in ("cuda", "cpu"))
        longer = "" if kind == "none" else f"{row['longer by, % median']:.0f} %"
        cells = [
            _gigabytes(on_gpu.activations.kept), _gigabytes(on_gpu.bytes),
            "" if kind == "none" else f"{100 * (1 - on_gpu.bytes / before):.0f} %",
            f"{on_cpu.bytes / 1e9:.2f}", f"{row['peak GB']:.2f}", longer,
        ]  # fmt: skip
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _peak(step: dict[str, Any], kind: str, device: str) -> PeakMemory:
    model = make_config({"model": step["model"]}).model
    return peak_memory(
        model, step["seq_len"], step["micro_batch"], precision=step["precision"], checkpointing=kind,
        accumulates=False, device=device,
    )  # fmt: skip


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.{1 if count < 99.5e9 else 0}f}"


def with_table(text: str) -> str:
    """The guide's text, its tables replaced."""
    for begin, rows, end in ((BEGIN, table, END), (BEGIN_KINDS, checkpointing_table, END_KINDS)):
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + rows() + end + after
    return text


if __name__ == "__main__":
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
