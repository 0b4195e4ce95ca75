"""The parsers of the verbs that need torch, apart from them: help and a wrong flag answer before it is imported."""

from __future__ import annotations

from collections.abc import Callable

from llmtrain.arguments import (
    VerbParser,
    add_checkpoint,
    add_config,
    count,
    positive_int,
    probability,
    seed_int,
    temperature,
)
from llmtrain.storage.remote import path_or_url

QUIT = "/quit"


def train_parser() -> VerbParser:
    """The parser of `llmtrain train`."""
    made = VerbParser(
        "train",
        "Train a model from a config, or go on with an interrupted run.",
        "llmtrain train --config configs/debug.yaml data.path=data/book optimizer.lr=3e-4",
        instead="keys of the config are written section.key=value, such as optimizer.lr=3e-4",
    )
    add_config(made, "YAML file; see configs/. Without it the demo is offered")
    add = made.add_argument
    add(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: go on with the run in run.dir, if there is one (default); never: only begin a new one; PATH: branch"
        " off from that run or checkpoint, or go back to an earlier one of this run",
    )
    add("--dry-run", action="store_true", help="check everything, run one step, write nothing")
    return made


def generate_parser() -> VerbParser:
    """The parser of `llmtrain generate`."""
    made = VerbParser(
        "generate",
        "Sample text from a run or a checkpoint.",
        'llmtrain generate checkpoints --prompt "Once upon a time" --temperature 0.8 --top-p 0.95',
    )
    add = made.add_argument
    add_checkpoint(made)
    add("--prompt", default="", metavar="TEXT", help="text to go on from (default: a document begins)")
    add("--max-new-tokens", type=positive_int, default=200, metavar="N", help="length (default: %(default)s)")
    add("--temperature", type=temperature, default=0.8, metavar="F", help="0 is greedy (default: %(default)s)")
    add("--top-k", type=positive_int, metavar="N", help="choose only among the N most likely tokens")
    add("--top-p", type=probability, metavar="F", help="choose only among the likeliest that make up this probability")
    add("--greedy", action="store_true", help="always take the most likely token")
    add("--num-samples", type=positive_int, default=1, metavar="N", help="how many (default: %(default)s)")
    add("--seed", type=seed_int, metavar="N", help="the same seed gives the same text; sample i has seed N + i")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--interactive", action="store_true", help=f"read prompts, one a line, until {QUIT} or Ctrl-D")
    add("--json", action="store_true", help="print the samples as JSON")
    return made


def evaluate_parser() -> VerbParser:
    """The parser of `llmtrain evaluate`."""
    made = VerbParser(
        "evaluate",
        "Loss, perplexity, accuracy and bits per byte of a trained model on prepared data.",
        "llmtrain evaluate checkpoints --data data/book --json",
    )
    add = made.add_argument
    add_checkpoint(made)
    add(
        "--data",
        type=path_or_url,
        metavar="DIR",
        help="prepared data (default: the run's own, and its data.validation)",
    )
    add("--split", help="which part of it (default: val); each of data.validation has its own")
    add("--batches", type=positive_int, metavar="N", help="only N global batches, as training.eval_batches=N does")
    add("--stride", type=positive_int, metavar="N", help="windows begin N tokens apart; of each only the new count")
    add("--tasks", metavar="A,B", help="instead of data: tasks of lm-evaluation-harness, by name or as YAML files")
    add("--shots", type=count, metavar="N", help="examples before each question of --tasks (default: as each says)")
    add("--limit", type=positive_int, metavar="N", help="only N questions of each of --tasks")
    add("--json", action="store_true", help="print the result as JSON")
    return made


def doctor_parser() -> VerbParser:
    """The parser of `llmtrain doctor`."""
    made = VerbParser(
        "doctor",
        "Check the machine; with a config, training on one batch, too; launched in several processes, their links.",
        "llmtrain doctor --config configs/debug.yaml --overfit\n"
        "  accelerate launch --config_file launch/ddp.yaml -m llmtrain.doctor --config configs/1.3b.yaml",
    )
    add_config(made, "check training with this config, too")
    add = made.add_argument
    add("--overfit", action="store_true", help="learn one batch by heart, which takes a while")
    add("--find-lr", action="store_true", help="try 150 rising rates, a batch each; suggest optimizer.lr")
    add("--rendezvous", metavar="HOST:PORT", help="check that the processes of a launch can meet there")
    add("--json", action="store_true", help="print the findings as JSON")
    return made


EARLY: dict[str, Callable[[], VerbParser]] = {
    "train": train_parser, "generate": generate_parser, "evaluate": evaluate_parser, "doctor": doctor_parser,
}  # fmt: skip
