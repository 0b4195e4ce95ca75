"""`llmtrain train` without a config: what to type, or, at a terminal, the demo at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain.errors import UserError

CONFIG = Path("configs/demo.yaml")
DATA = Path("data/stdlib")  # of that config
PREPARE = ("prepare", "--input", "stdlib", "--out", str(DATA))
_CHECKOUT = Path(__file__).parents[1]


def demo_config(overrides: Sequence[str] = ()) -> Path:
    """Ask at a terminal whether to train the demo; then its data is prepared here, unless it is there already.

    Returns:
        the config of the demo.

    Raises:
        UserError: a config was given in another way, nobody can be asked, or no was said; says what to type.
    """
    files = [text for text in overrides if "=" not in text]
    if files:
        raise UserError(f"{files[0]}: write --config {files[0]}; settings that win over it are section.key=value")
    config = next((path for path in (CONFIG, _CHECKOUT / CONFIG) if path.is_file()), None)
    if config is None:
        raise UserError("train needs a config: add --config FILE; the repository has examples in configs/")
    is_ready = (DATA / "manifest.json").is_file()
    is_asked = sys.stdin.isatty() and sys.stdout.isatty() and not overrides and "LOCAL_RANK" not in os.environ
    if not (is_asked and _says_yes()):
        steps = [*([] if is_ready else [" ".join(("llmtrain", *PREPARE))]), f"llmtrain train --config {config}"]
        raise UserError(f"train needs a config: add --config FILE; the demo is: {' && '.join(steps)}")
    if not is_ready and subprocess.run([sys.executable, "-m", "llmtrain", *PREPARE], check=False).returncode:
        raise UserError("the data of the demo could not be prepared, see above")
    return config


def _says_yes() -> bool:
    print(
        "No config was given. The demo trains a small model on the source of Python's standard library,\n"
        f"about two minutes on two cores; it writes {DATA} and checkpoints/demo in this folder."
    )
    try:
        return input("Train it now? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
