"""What of a config depends on the data and the machine: settled, or refused where they contradict each other."""

from __future__ import annotations

from llmtrain.config import ModelSection, RunConfig, TrainingSection, default_ff_dim
from llmtrain.errors import UserError


def resolve(config: RunConfig, *, vocab_size: int, world_size: int, bf16_native: bool, compile_auto: bool) -> RunConfig:
    """Settle what depends on the data and the machine; refuse contradictions with a reason.

    Args:
        config: as loaded.
        vocab_size: of the data's tokenizer, in ids.
        world_size: number of processes.
        bf16_native: whether this device computes bf16 natively (what `precision: auto` asks).
        compile_auto: what `compile: auto` means on this device.
    """
    model, training, seq_len = config.model, config.training, config.data.seq_len
    if model.vocab_size and model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size {model.vocab_size} is smaller than the {vocab_size} ids of the tokenizer in "
            f"{config.data.where}; leave it out or raise it"
        )
    per_step = training.micro_batch_size * world_size
    if training.global_batch_size % per_step:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not divisible by micro_batch_size "
            f"{training.micro_batch_size} × {world_size} processes = {per_step}; {_fitting_micro(training, world_size)}"
        )
    resolved_model = model.model_copy(
        update={
            "vocab_size": model.vocab_size or -(-vocab_size // model.vocab_multiple) * model.vocab_multiple,
            "kv_heads": model.kv_heads or model.heads,
            "head_dim": model.head_width,
            "ff_dim": model.ff_dim or default_ff_dim(model.dim, model.activation),
        }
    )
    precision = ("bf16" if bf16_native else "fp32") if training.precision == "auto" else training.precision
    if training.fp8:
        _check_fp8(resolved_model, precision, training.micro_batch_size * seq_len)
    compiled = compile_auto if training.compile == "auto" else training.compile
    return config.model_copy(
        update={
            "model": resolved_model,
            "data": config.data.model_copy(update={"stride": config.data.stride or seq_len}),
            "training": training.model_copy(update={"precision": precision, "compile": compiled}),
        }
    )


def _check_fp8(model: ModelSection, precision: str, tokens: int) -> None:
    if precision != "bf16":
        raise UserError(f"training.fp8 is for what is bf16 else, but training.precision is {precision}; leave one out")
    sides = {
        "model.dim": model.dim,
        "keys' width (kv_heads × head_dim)": model.key_width,
        "model.ff_dim": model.ff_dim or 0,
        "micro_batch_size × seq_len": tokens,
    }
    for name, side in sides.items():
        if side % 16:
            raise UserError(f"training.fp8 multiplies in tiles of 16, but {name} is {side}; choose a multiple of 16")


def _fitting_micro(training: TrainingSection, world_size: int) -> str:
    per_rank, rest = divmod(training.global_batch_size, world_size)
    if rest:
        return f"choose a global_batch_size that is a multiple of {world_size}"
    fits = max(m for m in range(1, min(per_rank, training.micro_batch_size) + 1) if per_rank % m == 0)
    return f"training.micro_batch_size={fits} fits"
