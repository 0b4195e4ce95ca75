"""DeepSpeed's config: ZeRO and offload from the launch file, everything else from the run config."""

from __future__ import annotations

import copy
from typing import Any

from llmtrain.config import TrainingSection
from llmtrain.errors import UserError
from llmtrain.model.memory import REDUCE_BUCKET

# What a launch file for DeepSpeed may say.
_FROM_LAUNCH = {"zero_optimization", "aio", "comms_logger", "wall_clock_breakdown", "flops_profiler"}
# What Accelerate fills in by itself, and we after it.
_OURS = {"fp16", "bf16", "steps_per_print", "communication_data_type", "zero_allow_untested_optimizer"}


def zero_config(
    launch: dict[str, Any], training: TrainingSection, clip_norm: float | None, world_size: int
) -> dict[str, Any]:
    """Merge what Accelerate read from the launch file with the run config.

    Args:
        launch: DeepSpeed's config as Accelerate made it, `auto` where the launch file is silent.
        training: resolved.
        clip_norm: largest global gradient norm; None: not clipped.
        world_size: number of processes.

    Raises:
        UserError: the launch file decides what the run config decides, or asks for what there is not.
    """
    clip = 0.0 if clip_norm is None else clip_norm
    zero = {key: value for key, value in copy.deepcopy(launch["zero_optimization"]).items() if value != "auto"}
    # DeepSpeed does not scale by it here, but adds up gradients on the host only where it is above one.
    accumulation = training.global_batch_size // (training.micro_batch_size * world_size)
    _refuse_contradictions(launch, training, clip, accumulation)
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") == "nvme":
            raise UserError(f"the launch file sets {part} to nvme, from which no checkpoint can be made here; use cpu")
        if zero.get(part, {}).get("device", "none") == "none":
            zero.pop(part, None)
    if zero["stage"] not in (1, 2, 3):
        raise UserError(
            f"the launch file sets zero_stage to {zero['stage']}; 1, 2 and 3 are ZeRO, for 0 use launch/ddp.yaml"
        )
    if "offload_param" in zero and zero["stage"] != 3:
        raise UserError(f"the launch file offloads parameters at zero_stage {zero['stage']}; only stage 3 can")
    zero.setdefault("reduce_bucket_size", REDUCE_BUCKET)
    if zero["stage"] == 3 and training.compile is True:
        # DeepSpeed's linear layer asks each weight who it is: torch 2.11 would compile every block for itself.
        zero.setdefault("memory_efficient_linear", False)
    # Accelerate fills it in for its own way of saving.
    zero.pop("stage3_gather_16bit_weights_on_model_save", None)
    return {
        **{key: value for key, value in launch.items() if key in _FROM_LAUNCH},
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        # torch's own fused optimizers run on the CPU too, and give the numbers of every other engine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        # It would wait for the device at every micro-batch; the meter measures over logging steps.
        "timers": {"throughput": {"enabled": False}},
    }


def _refuse_contradictions(launch: dict[str, Any], training: TrainingSection, clip: float, accumulation: int) -> None:
    """Refuse each setting that differs from the run config's, with both values."""
    in_bf16 = training.precision == "bf16"
    ours = {
        "gradient_clipping": (clip, f"optimizer.clip_norm is {clip or None}"),
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, f"training has {training.micro_batch_size}"),
        "train_batch_size": (training.global_batch_size, f"training has {training.global_batch_size}"),
        "gradient_accumulation_steps": (accumulation, f"{accumulation} follows from training.global_batch_size"),
    }
    for key, (own, reason) in ours.items():
        # Accelerate's own default for the accumulation is 1, whether or not anybody asked for it.
        if launch.get(key, "auto") not in ("auto", own, 1 if key == "gradient_accumulation_steps" else own):
            raise UserError(
                f"the launch file sets {key} to {launch[key]}, but {reason}; leave it out of the launch file"
            )
    for dtype in ("bf16", "fp16"):
        enabled = launch.get(dtype, {}).get("enabled", "auto")
        if enabled not in ("auto", False) and not (dtype == "bf16" and in_bf16):
            raise UserError(
                f"the launch file enables {dtype}, but training.precision is {training.precision}; leave it out of the "
                "launch file"
            )
    foreign = sorted(set(launch) - _FROM_LAUNCH - _OURS - set(ours))
    if foreign:
        raise UserError(
            f"the launch file sets DeepSpeed's {foreign[0]}, but the run config decides such things; leave it out there"
        )
