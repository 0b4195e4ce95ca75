"""Whether the blocks of a run are compiled: what `training.compile: auto` means for it, on all its ranks alike."""

from __future__ import annotations

import torch

from llmtrain.config import RunConfig
from llmtrain.engine import Engine
from llmtrain.errors import UserError
from llmtrain.model.cost import flops_per_token
from llmtrain.model.document_mask import flex_suits
from llmtrain.planning.budget import planned_tokens
from llmtrain.toolchain import why_not_compiled

# For each thread of each rank. Compiling takes a CPU 16 to 30 s, evaluation included, again on every new machine, and a
# step is up to a third faster then. That had paid for itself after 0.7e13 to 2.1e13 (docs/LOG.md).
COMPILED_FROM_FLOPS = 4e13


def settle_compile(config: RunConfig, engine: Engine, vocab_size: int, data_tokens: int) -> tuple[bool, list[str]]:
    """Decide for a config as it was loaded; all ranks call it.

    Returns:
        what `auto` means, and a warning where a run that would gain by it cannot be compiled on some machine.

    Raises:
        UserError: it is asked for, and cannot be.
    """
    asked, kind = config.training.compile, engine.device.type
    is_wanted = asked is True or (
        asked == "auto"
        and engine.may_compile(config.training)
        and (kind != "cpu" or _is_long(config, engine, vocab_size, data_tokens))
    )
    answers = engine.gather((asked, is_wanted, why_not_compiled(kind) if is_wanted else None))
    problem = next((reason for *_, reason in answers if reason), None)
    if problem and any(one is True for one, *_ in answers):
        error = UserError(f"training.compile: true, but it does not work here: {problem}; leave it out")
        error.is_everywhere = True
        raise error
    wanted_by_all = all(wanted for _, wanted, _ in answers)  # the number of threads may differ
    if problem and wanted_by_all:
        return False, [f"not compiled, by which this run would gain (training.compile): {problem}"]
    return wanted_by_all, []


def settle_flex(config: RunConfig, engine: Engine) -> tuple[bool, list[str]]:
    """Whether documents are kept apart by flex_attention, which has to be compiled; all ranks call it.

    Args:
        config: resolved.
        engine: of this rank.

    Returns:
        the answer, the same on all ranks, and a warning where it would be used and cannot be.
    """
    suits = flex_suits(engine.device, config.model.head_width, config.model.dropout)
    if not (config.data.document_mask and suits):
        return False, []
    problem = next(filter(None, engine.gather(why_not_compiled("cuda"))), None)
    if problem is None:
        return True, []
    return False, [f"data.document_mask without flex_attention, which takes less time and memory: {problem}"]


def _is_long(config: RunConfig, engine: Engine, vocab_size: int, data_tokens: int) -> bool:
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or vocab_size})
    tokens, _ = planned_tokens(config.model_copy(update={"model": model}), data_tokens)
    flops = flops_per_token(model, config.data.seq_len) * tokens
    return flops >= COMPILED_FROM_FLOPS * torch.get_num_threads() * engine.world_size
