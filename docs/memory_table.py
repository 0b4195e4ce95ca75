"""Write the table of memory per GPU in distributed.md, out of llmtrain/model/cost.py: `python docs/memory_table.py`."""

from __future__ import annotations

from pathlib import Path

from llmtrain.config import make_config
from llmtrain.model.cost import EngineName, Offload, rank_memory

GUIDE = Path(__file__).with_name("distributed.md")
BEGIN, END = "<!-- memory table: python docs/memory_table.py -->\n", "<!-- end of memory table -->\n"
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


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.{1 if count < 99.5e9 else 0}f}"


def with_table(text: str) -> str:
    """The guide's text, its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
