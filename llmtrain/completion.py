"""Print a completion script for a shell: verbs, options, files, and the keys of a config."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import get_args

from llmtrain.arguments import VerbParser
from llmtrain.cli import VERBS
from llmtrain.errors import UserError, run_main
from llmtrain.sections import RunConfig, Section

SHELLS = ("bash", "zsh", "fish")
# After `section.key=` the value follows without a blank, which shtab's own script would add.
_BASH_WITHOUT_BLANK = """
_llmtrain() {
  _shtab_llmtrain
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  return 0
}
complete -o filenames -F _llmtrain llmtrain
"""


def parser() -> VerbParser:
    """The parser of `llmtrain completion`."""
    made = VerbParser(
        "completion",
        "Print a completion script, made from the options of every verb. For one session: source <(llmtrain completion"
        " bash).",
        "llmtrain completion bash > ~/.local/share/bash-completion/completions/llmtrain",
    )
    made.add_argument("shell", choices=SHELLS, help="for which shell")
    return made


def whole_parser() -> argparse.ArgumentParser:
    """All verbs in one parser, each argument with what completes it."""
    import shtab

    whole = argparse.ArgumentParser("llmtrain", description="pretrain language models")
    verbs = whole.add_subparsers()
    for verb, summary in VERBS.items():
        own: VerbParser = importlib.import_module(f"llmtrain.{verb}").parser()
        for action in own._actions:
            if action.dest == "overrides":
                action.choices = config_keys()
            elif action.metavar in ("FILE", "DIR", "PATH", "SRC", "RUN", "DATA") or action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        verbs.add_parser(verb, parents=[own], add_help=False, help=summary)
    return whole


def config_keys() -> list[str]:
    """`section.key=` for every key, the first part of an override."""
    keys = []
    for name, field in RunConfig.model_fields.items():
        (section,) = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_section(kind)]
        keys += [f"{name}.{key}=" for key in section.model_fields]
    return keys


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def main(argv: list[str]) -> None:
    """`llmtrain completion`."""
    args = parser().read(argv)
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UserError(
            "completion needs shtab, which is not installed: pip install -c constraints.txt -e '.[completion]'"
        ) from error
    script = shtab.complete(whole_parser(), args.shell)
    print(script + (_BASH_WITHOUT_BLANK if args.shell == "bash" else ""))


if __name__ == "__main__":
    sys.exit(run_main(main))
