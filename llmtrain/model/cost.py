"""Parameters and FLOPs as formulas: one source for MFU and for the tables in the docs; bytes are in memory.py.

A multiply-add counts as two operations; the backward pass as twice the forward (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

from llmtrain.config import ModelSection, default_ff_dim


def parameter_count(config: ModelSection, seq_len: int) -> int:
    """Parameters of the model, tied ones once; `vocab_size` must be set."""
    assert config.vocab_size is not None
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    positions = seq_len * config.dim if config.positions == "learned" else 0
    vectors = norm_parameters(config) + bias_parameters(config)
    return embeddings + positions + vectors + config.layers * block_matrix_parameters(config)


def norm_parameters(config: ModelSection) -> int:
    """Parameters of all norms."""
    norms = (2 * config.layers + 1) * config.dim
    return norms + (config.layers * 2 * config.head_width if config.qk_norm else 0)


def bias_parameters(config: ModelSection) -> int:
    """Parameters of all biases."""
    return config.layers * (config.query_width + 2 * config.key_width) if config.qkv_bias else 0


def block_matrix_parameters(config: ModelSection) -> int:
    """Parameters of one block's matrices: each takes part in one multiply-add for each token."""
    ff_dim = config.ff_dim or default_ff_dim(config.dim, config.activation)
    attention = 2 * config.dim * (config.query_width + config.key_width)
    return attention + (3 if config.activation == "swiglu" else 2) * config.dim * ff_dim


def flops_per_token(config: ModelSection, seq_len: float, *, causal: bool = True) -> float:
    """Floating-point operations to train on one token, forward and backward, of the model itself.

    Recomputation by activation checkpointing does not count (model FLOPs, Chowdhery et al. 2022, appendix B).

    Args:
        config: with `vocab_size` set.
        seq_len: tokens in a sequence, or in a document where attention stays within these.
        causal: count the average (seq_len + 1) / 2 positions that causal attention looks at; False counts seq_len,
            as PaLM's formula does, and so reads higher.
    """
    assert config.vocab_size is not None
    matrices = config.layers * block_matrix_parameters(config) + config.vocab_size * config.dim
    positions = (seq_len + 1) / 2 if causal else seq_len
    # Each layer and token: a dot product with each key, a weighted sum of each value; together
    # 2 multiply-adds for each number of the queries.
    attention = config.layers * 2 * config.query_width * positions
    return 3 * 2 * (matrices + attention)


# Dense bf16 peak in FLOP/s by the exact name that the driver reports (vendors' datasheets). Unknown names have no peak:
# an MFU against a guess would be worse than none.
BF16_PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA RTX 6000 Ada Generation": 364e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H800": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


def model_flops_utilization(flops_per_second: float, device_name: str, world_size: int) -> float | None:
    """Share of the devices' bf16 peak that is spent on model FLOPs, 0 to 1; None where the peak is not known."""
    peak = BF16_PEAK_FLOPS.get(device_name)
    return flops_per_second / (peak * world_size) if peak else None
