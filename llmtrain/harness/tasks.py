"""Tasks of lm-evaluation-harness, by their names or as files, on a trained model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from llmtrain.checkpoint.load import TrainedModel
from llmtrain.errors import UserError
from llmtrain.observe.record import finite

_COUNT = "sample_len"  # what some versions count samples by, among the metrics
Scores = dict[str, dict[str, float | int | None]]  # by task: each metric, its standard error, and the samples


def run_tasks(trained: TrainedModel, names: Sequence[str], shots: int | None, limit: int | None) -> Scores:
    """Run tasks; of several ranks each runs all, for a model that is cut over them answers only to all.

    Args:
        trained: the model.
        names: as lm_eval knows them (also groups and globs such as `arc_*`), or YAML files of tasks.
        shots: examples before each question; None: as the task says.
        limit: only so many questions of each; None: all.

    Raises:
        UserError: lm_eval is not installed, there is no such task, its data cannot be had, or the tokenizer lacks a
            character of it.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-evaluation-harness ({error}): pip install -c constraints.txt -e '.[eval]'"
        ) from error
    from llmtrain.harness.model import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = [name for name in names if not name.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_defaults=bool(known))  # to look through all of them takes seconds
    tasks = {name: manager.match_tasks([name]) if name in known else [name] for name in names}
    for name, meant in tasks.items():
        if not meant:
            raise UserError(f"--tasks {name}: lm-evaluation-harness has no such task; `lm-eval ls tasks` lists them")
    each = list(dict.fromkeys(chain.from_iterable(tasks.values())))
    model = HarnessModel(trained, trained.config.training.micro_batch_size)
    try:
        found: Any = simple_evaluate(
            model, tasks=each, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
        )
    except (OSError, ValueError, KeyError) as error:  # what a task that is damaged, or whose data is not there, raises
        raise UserError(f"--tasks {','.join(names)}: cannot be run: {' '.join(str(error).split())}") from error
    counts = found["n-samples"]
    return {
        name: {**_numbers(values), "samples": counts[name]["effective"]} if name in counts else _numbers(values)
        for name, values in found["results"].items()
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float | int | None]:
    """`acc,none` is called `acc`, and `acc,strict` keeps its filter's name; what is no number is left out."""
    named = {key.removesuffix(",none"): value for key, value in values.items()}
    return {key: finite(value) for key, value in named.items() if isinstance(value, int | float) and key != _COUNT}
