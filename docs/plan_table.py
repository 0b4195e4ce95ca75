"""Write the tables of plan.md: `python docs/plan_table.py`.

What others published of their trainers, and what the formulas of llmtrain/planning say of the same settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from llmtrain.config import ModelSection, make_config
from llmtrain.model.cost import flops_per_token, parameter_count
from llmtrain.planning.communication import links_between
from llmtrain.planning.compute import Work, clock_at, compute_seconds
from llmtrain.planning.hardware import GPUS, Gpu
from llmtrain.planning.step_time import NCCL_MULTIPROCESSORS, SPREAD, Exchange, Step, slowest_of, step_seconds

GUIDE = Path(__file__).with_name("plan.md")
BEGIN, END = "<!-- published: python docs/plan_table.py -->\n", "<!-- end of published -->\n"
# FSDP: a block is gathered in one go, in bf16; gradients are reduced in float32; after the forward pass weights go.
FSDP = Exchange(weight_bytes=2, gradient_bytes=4, reuses=0)
# torchtitan turns queries and keys as complex numbers in float32: 6 bytes of each number to cast it, 8 to multiply, 6
# to cast it back. This model's own way takes more (llmtrain/planning/compute.py); LLM Foundry's turns nothing.
TITAN_ROPE_BYTES = 20


@dataclass(frozen=True)
class Published:
    """One row that others measured; `tokens` per second and GPU."""

    name: str
    gpu: Gpu
    gpus: int
    model: ModelSection
    seq_len: int
    micro_batch: int
    tokens: float
    accumulation: int = 1
    checkpointing: str = "none"
    compiled: bool = False
    fused_norm: bool = True
    remade_products: float = 0.0
    clock: float = 1.0

    def step(self) -> Step:
        """What the formulas say."""
        work = Work(
            self.model, self.seq_len, self.micro_batch, checkpointing=self.checkpointing, compiled=self.compiled,
            stream_bytes=2, fused_norm=self.fused_norm, rope_bytes=TITAN_ROPE_BYTES,
            remade_products=self.remade_products,
        )  # fmt: skip
        return step_seconds(
            self.gpu, links_between(self.gpu, self.gpus, 8), "zero3", work, accumulation=self.accumulation,
            exchange=FSDP, clock=self.clock,
        )  # fmt: skip

    @property
    def predicted(self) -> float:
        """Tokens per second and GPU."""
        return self.accumulation * self.micro_batch * self.seq_len / self.step().total

    @property
    def error(self) -> float:
        """As a share of what was measured; positive: predicted too fast."""
        return self.predicted / self.tokens - 1

    def mfu(self, tokens: float) -> float:
        """By PaLM's formula, as LLM Foundry counts."""
        return tokens * flops_per_token(self.model, self.seq_len, causal=False) / self.gpu.bf16_flops


def _model(**values: Any) -> ModelSection:
    return make_config({"model": {"qk_norm": False, **values}}).model


LLAMA_8B = _model(preset="8b", vocab_size=128_256)
# 96 GB of HBM2e at 2.4 TB/s, and a limit of 500 W in the place of 700.
TITAN_H100 = replace(GPUS["h100"], memory_bandwidth=2.4e12)
# Of seven products in a block every second is made again: keys, attention's output, the second of feed-forward's.
TITAN_REMADE = (1024 * 4096 + 4096 * 4096 + 14336 * 4096) / (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)


def _titan(gpus: int, compiled: bool, tokens: float) -> Published:
    return Published(
        f"torchtitan 8B{', compiled' if compiled else ''}", TITAN_H100, gpus, LLAMA_8B, 8192, 2, tokens,
        checkpointing="selective", compiled=compiled, fused_norm=False, remade_products=TITAN_REMADE,
        clock=clock_at(500, 700),
    )  # fmt: skip


MPT_SIZES = {
    "1b": (2048, 24, 16), "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56),
    "70b": (8192, 80, 64),
}  # fmt: skip


def _mpt(size: str, gpu: str, gpus: int, *, batch: tuple[int, int], tokens: float, accumulation: int = 1) -> Published:
    """`batch`: tokens in a sequence, sequences in a micro-batch."""
    dim, layers, heads = MPT_SIZES[size]
    model = _model(
        dim=dim, layers=layers, heads=heads, ff_dim=4 * dim, activation="gelu", norm="layernorm", positions="learned",
        vocab_size=50_368,
    )  # fmt: skip
    return Published(f"LLM Foundry {size.upper()}", GPUS[gpu], gpus, model, *batch, tokens, accumulation)


def _mpt_full(size: str, gpu: str, gpus: int, **values: Any) -> Published:
    """With all activations made again."""
    return replace(_mpt(size, gpu, gpus, **values), checkpointing="full")


CALIBRATION = _mpt("7b", "a100", 8, batch=(2048, 6), tokens=4641, accumulation=2)
ASKED = [
    _titan(8, False, 5762),
    _titan(128, False, 5605),
    _titan(8, True, 6667),
    _titan(128, True, 6514),
    _mpt("7b", "h100", 8, batch=(2048, 6), tokens=10643),
    _mpt("7b", "h100", 512, batch=(2048, 6), tokens=9670),
]
# Of LLM Foundry's tables: every size on eight (or the fewest) and on the most GPUs, and longer sequences.
OTHERS = [
    _mpt("7b", "h100", 128, batch=(2048, 6), tokens=10475),
    _mpt("7b", "h100", 256, batch=(2048, 6), tokens=10119),
    _mpt_full("7b", "h100", 8, batch=(4096, 16), tokens=8611, accumulation=2),
    _mpt_full("7b", "h100", 8, batch=(8192, 8), tokens=6935, accumulation=2),
    _mpt_full("7b", "h100", 8, batch=(32768, 2), tokens=3318, accumulation=2),
    _mpt("13b", "h100", 8, batch=(2048, 2), tokens=4792),
    _mpt("13b", "h100", 64, batch=(2048, 2), tokens=4800),
    _mpt_full("13b", "h100", 128, batch=(2048, 16), tokens=5080),
    _mpt_full("13b", "h100", 512, batch=(2048, 16), tokens=4952),
    _mpt_full("30b", "h100", 8, batch=(2048, 3), tokens=2002, accumulation=21),
    _mpt_full("30b", "h100", 128, batch=(2048, 8), tokens=2199),
    _mpt_full("30b", "h100", 512, batch=(2048, 8), tokens=2115),
    _mpt_full("70b", "h100", 64, batch=(2048, 8), tokens=1039, accumulation=4),
    _mpt_full("70b", "h100", 128, batch=(2048, 8), tokens=1058),
    _mpt_full("70b", "h100", 512, batch=(2048, 8), tokens=1007),
    _mpt_full("7b", "a100", 8, batch=(8192, 8), tokens=3206, accumulation=2),
    _mpt("13b", "a100", 8, batch=(2048, 2), tokens=2262, accumulation=3),
    _mpt_full("30b", "a100", 8, batch=(2048, 3), tokens=916, accumulation=21),
    _mpt_full("70b", "a100", 64, batch=(2048, 8), tokens=410, accumulation=4),
    _mpt_full("7b", "a100-40gb", 128, batch=(2048, 18), tokens=3623),
    _mpt_full("30b", "a100-40gb", 128, batch=(2048, 6), tokens=865),
    _mpt_full("70b", "a100-40gb", 128, batch=(2048, 4), tokens=376),
]

# Megatron-LM's README: GPT-3 with a vocabulary of 131,072 and 1,152 sequences a step, MFU 47 % on 96 H100 and 42 % on
# 4,608. How it was cut is not said: all counts in its figure are multiples of 48, so a copy of the model is taken to
# lie on 48, as 8 (tensors) × 6 (stages) with a virtual stage of two blocks, and sequences of 2,048 as in GPT-3.
MEGATRON = _model(
    dim=12_288, layers=96, heads=96, ff_dim=4 * 12_288, activation="gelu", norm="layernorm", positions="learned",
    vocab_size=131_072,
)  # fmt: skip
TENSOR, STAGES, VIRTUAL, MEGATRON_BATCH, MEGATRON_SEQ = 8, 6, 8, 1152, 2048


def megatron_mfu(gpus: int) -> float:
    """MFU by the same times of products, attention and exchanges; not a layout that this trainer has."""
    gpu, copies = GPUS["h100"], gpus // (TENSOR * STAGES)
    micro_batches = MEGATRON_BATCH // copies
    work = Work(MEGATRON, MEGATRON_SEQ, 1, compiled=True, stream_bytes=2)
    computed = micro_batches * compute_seconds(gpu, work).total / (TENSOR * STAGES)
    # Four times in a block, forward and backward, the stream is gathered and reduced by the eight of a machine.
    inside = 8 * links_between(gpu, TENSOR, 8).gather_s(2 * MEGATRON_SEQ * MEGATRON.dim)
    # Copies of a part lie on different machines, and each has a link of its own: gradients in float32, weights in bf16.
    part = parameter_count(MEGATRON, MEGATRON_SEQ) / (TENSOR * STAGES)
    between = links_between(gpu, copies, 1).gather_s(6 * part)
    hidden = micro_batches * MEGATRON.layers / STAGES * inside + between
    slowed = hidden * NCCL_MULTIPROCESSORS / gpu.multiprocessors
    idle = (STAGES - 1) / (micro_batches * VIRTUAL)  # of pipelines (Narayanan et al. 2021, section 2.2)
    seconds = (computed + slowed) * (1 + idle) * (1 + SPREAD * slowest_of(gpus))
    flops = MEGATRON_BATCH * MEGATRON_SEQ * flops_per_token(MEGATRON, MEGATRON_SEQ, causal=False)
    return flops / seconds / gpus / gpu.bf16_flops


def _row(row: Published) -> str:
    kind = row.gpu.name.removeprefix("NVIDIA ").split("-")[0].split()[0]
    if row.gpu is GPUS["a100-40gb"]:
        kind += " 40GB"
    recomputed = {"none": "", "selective": "partly", "full": "all"}[row.checkpointing]
    cells = [
        row.name, f"{row.gpus} × {kind}", f"{row.seq_len:,}", f"{row.micro_batch} × {row.accumulation}", recomputed,
        f"{row.tokens:,.0f}", f"{row.predicted:,.0f}", _percent(row.mfu(row.tokens)), _percent(row.mfu(row.predicted)),
        f"{100 * row.error:+.1f} %",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table() -> str:
    """Markdown: what was published and what is predicted, with the error of each."""
    lines = [
        "| | GPUs | sequence | micro × acc. | made again | tokens/s/GPU | predicted | MFU, % | predicted | error |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|",
        *map(_row, [*ASKED, *OTHERS]),
        f"| (SUSTAINED is from) {_row(CALIBRATION)[2:]}",
    ]
    for gpus, published in ((96, 0.47), (4608, 0.42)):
        mfu, micro = megatron_mfu(gpus), MEGATRON_BATCH * TENSOR * STAGES // gpus
        cells = [
            "Megatron-LM 175B (layout assumed)", f"{gpus:,} × H100", f"{MEGATRON_SEQ:,}", f"1 × {micro}", "", "", "",
            f"{100 * published:.0f}", _percent(mfu), f"{100 * (mfu / published - 1):+.1f} %",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary() -> str:
    """Markdown: the errors together."""
    asked, others = ([abs(row.error) for row in rows] for rows in (ASKED, OTHERS))
    within = sum(error <= 0.15 for error in [*asked, *others])
    return (
        f"Of the {len(asked)} + {len(others)} rows above the calibration's, {within} are within 15 %; mean error "
        f"{100 * mean(asked):.0f} % of the first {len(asked)}, {100 * mean(others):.0f} % of the others, worst "
        f"{100 * max(*asked, *others):.0f} %.\n"
    )


def with_tables(text: str) -> str:
    """The guide's text, its tables replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + "\n" + summary() + END + after


if __name__ == "__main__":
    GUIDE.write_text(with_tables(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
