"""What a name or a width stands for in a config: the sizes of `model.preset`, and `optimizer.lr: auto`."""

from __future__ import annotations

from typing import Any

# dim, layers, heads, kv_heads, ff_dim; the sizes of the published models where they are named after one.
PRESETS: dict[str, dict[str, Any]] = {
    "1m": {"dim": 128, "layers": 5, "heads": 4},
    "10m": {"dim": 256, "layers": 8, "heads": 4},
    "30m": {"dim": 384, "layers": 12, "heads": 6},
    "124m": {"dim": 768, "layers": 12, "heads": 12},
    "350m": {"dim": 1024, "layers": 24, "heads": 16},
    "1.3b": {"dim": 2048, "layers": 24, "heads": 16, "tie_embeddings": False},
    "3b": {"dim": 2560, "layers": 32, "heads": 32, "kv_heads": 8, "tie_embeddings": False},
    "7b": {"dim": 4096, "layers": 32, "heads": 32, "ff_dim": 11008, "tie_embeddings": False},
    "8b": {
        "dim": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ff_dim": 14336, "rope_theta": 500_000.0,
        "tie_embeddings": False,
    },
    "13b": {"dim": 5120, "layers": 40, "heads": 40, "ff_dim": 13824, "tie_embeddings": False},
    "34b": {"dim": 8192, "layers": 48, "heads": 64, "kv_heads": 8, "ff_dim": 22016, "tie_embeddings": False},
    "70b": {
        "dim": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "ff_dim": 28672, "rope_theta": 500_000.0,
        "tie_embeddings": False,
    },
}  # fmt: skip

# The peak rate at a width, and the power of the width by which it falls. AdamW: near those of LLaMA (Touvron et al.
# 2023, table 2) and about twice those of GPT-3 (Brown et al. 2020, table 2.1). Muon: found here, between widths of 64
# and 256. docs/LOG.md has what was measured.
AUTO_LR = {"adam": (2e-3, 256, 0.7), "adamw": (2e-3, 256, 0.7), "muon": (1e-2, 128, 0.5)}


def auto_lr(optimizer: str, dim: int) -> float:
    """What `optimizer.lr: auto` means: a peak rate for the width, to three digits."""
    lr, width, power = AUTO_LR[optimizer]
    return float(f"{lr * (width / dim) ** power:.3g}")
