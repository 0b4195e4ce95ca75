"""What a run costs in the end: tokens, time, money, disk; and what its compute would be best spent on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.config import RunConfig
from llmtrain.model.cost import parameter_count
from llmtrain.model.memory import optimizer_values

# Hoffmann et al. 2022 ("Training Compute-Optimal Large Language Models"), approaches 1 and 2: parameters and tokens
# grow alike with the compute C = 6 N D; table 3 has 20.0 to 22.4 tokens for each parameter from 0.4B to 175B. Their
# approach 3 disagrees; Besiroglu et al. 2024 found its fit wrong, and theirs gives about 20, too.
OPTIMAL_TOKENS_PER_PARAMETER = 20


@dataclass(frozen=True)
class Optimum:
    """The size and the tokens that make the most of some compute."""

    parameters: float
    tokens: float


def compute_optimal(flops: float) -> Optimum:
    """Split compute: C = 6 N D and D = 20 N, so N = √(C / 120)."""
    parameters = (flops / (6 * OPTIMAL_TOKENS_PER_PARAMETER)) ** 0.5
    return Optimum(parameters, OPTIMAL_TOKENS_PER_PARAMETER * parameters)


def planned_tokens(config: RunConfig, data_tokens: int | None) -> tuple[int, str]:
    """Tokens that the config trains on, and where the number comes from.

    Args:
        config: with `vocab_size` set.
        data_tokens: of the training split; None: not prepared.
    """
    training, seq_len = config.training, config.data.seq_len
    if training.max_steps:
        return training.max_steps * training.global_batch_size * seq_len, f"max_steps {training.max_steps:,}"
    if training.max_tokens:
        return training.max_tokens, "max_tokens"
    if data_tokens is not None:
        tokens = training.epochs * data_tokens * seq_len // (config.data.stride or seq_len)
        return tokens, f"{training.epochs} epochs of {data_tokens:,} tokens"
    tokens = OPTIMAL_TOKENS_PER_PARAMETER * parameter_count(config.model, seq_len)
    return tokens, f"{OPTIMAL_TOKENS_PER_PARAMETER} for each parameter, as the data is not prepared"


@dataclass(frozen=True)
class CheckpointCost:
    """Of one save."""

    bytes: float
    write_s: float  # by all ranks together, to one disk or store
    copy_s: float  # during which training waits: from each GPU to the memory of its machine


def checkpoint_cost(config: RunConfig, disk: float, host_link: float, gpus: int) -> CheckpointCost:
    """What a save writes: float32 weights and the optimizer's state, once, whatever the engine; the ranks share it.

    Args:
        config: with `vocab_size` set.
        disk: bytes/s of the disk or store, for all ranks together.
        host_link: bytes/s from a GPU to its machine.
        gpus: ranks.
    """
    seq_len = config.data.seq_len
    values = parameter_count(config.model, seq_len) + optimizer_values(config.optimizer.name, config.model, seq_len)
    size = 4.0 * values
    return CheckpointCost(size, size / disk, size / gpus / host_link)


def checkpoints_kept(config: RunConfig, steps: int) -> int:
    """How many checkpoints lie on the disk at most: the newest, the best, those for good, and the one under way.

    `checkpoint.max_bytes` may leave fewer.
    """
    saving = config.checkpoint
    for_good = steps // math.lcm(saving.save_every, saving.keep_every) if saving.save_every and saving.keep_every else 0
    return saving.keep_last + 2 + for_good
