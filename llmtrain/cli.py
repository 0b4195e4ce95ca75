"""`llmtrain VERB …`: finds the verb's module and runs it.

Nothing heavy is imported here: `llmtrain --help` must answer at once, and each verb pays only for what it uses.
"""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType

from llmtrain import __version__
from llmtrain.errors import DEBUG, UserError, nearest, run_main
from llmtrain.parsers import EARLY

VERBS = {
    "prepare": "turn text into token shards, with a tokenizer fitted on it",
    "train": "train a model from a config, or go on with an interrupted run",
    "generate": "sample text from a run or a checkpoint",
    "evaluate": "loss, perplexity, accuracy and bits per byte on prepared data",
    "export": "write a checkpoint as a Hugging Face model folder, tokenizer included",
    "report": "what became of runs: curves, diagnosis, comparison; or what prepared data holds",
    "plan": "what a run would take: memory, time, cost, the best layout on a kind of GPU",
    "tokenizer": "show a tokenizer, what it makes of a text, write it as tokenizer.json",
    "doctor": "check the machine, then the training checklist on one batch",
    "verify": "check every hash of prepared data or of a checkpoint",
    "completion": "completion of verbs, options and config keys for your shell",
}


def usage() -> str:
    """Return the text of `llmtrain --help`."""
    verbs = "\n".join(f"  {verb:<10} {summary}" for verb, summary in VERBS.items())
    return (
        f"llmtrain {__version__}: pretrain language models\n\n"
        f"usage: llmtrain VERB [options]      (llmtrain VERB --help explains one)\n\n{verbs}\n\n"
        "example:\n"
        "  llmtrain prepare --input book.txt --tokenizer char --out data/book\n"
        "  llmtrain train --config configs/char.yaml data.path=data/book\n"
        "  accelerate launch --config_file launch/single.yaml -m llmtrain.train --config configs/char.yaml"
    )


def main(argv: list[str]) -> None:
    """Run the verb named by the first argument."""
    if argv[:1] == [DEBUG]:
        argv = [*argv[1:], DEBUG]
    if not argv or argv[0] in ("-h", "--help", "help", DEBUG):
        print(usage())
    elif argv[0] in ("-V", "--version"):
        print(f"llmtrain {__version__}")
    elif argv[0] in VERBS:
        if argv[0] in EARLY:
            EARLY[argv[0]]().read(argv[1:])  # what ends here need not wait for torch
        _imported(f"llmtrain.{argv[0]}").main(argv[1:])
    else:
        raise UserError(f"unknown verb '{argv[0]}': {nearest(argv[0], list(VERBS))}")


def _imported(name: str) -> ModuleType:
    """Import a module and all that it needs, without garbage collections.

    What an import makes stays, but for one object in 25; to look for those again and again takes a fifth of the time
    that importing torch takes (docs/LOG.md).
    """
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def entry_point() -> int:
    """The `llmtrain` command: `main` with its ends turned into exit codes."""
    return run_main(main, sys.argv[1:])
