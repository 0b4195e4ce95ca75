"""Say what prepared data holds: sizes, document lengths, use of the vocabulary, tokens, copies, samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmtrain.arguments import VerbParser, count_int, positive_int, seed_int
from llmtrain.errors import UserError, run_main
from llmtrain.storage.remote import path_or_url

RUN_FILES = ("run.json", "metrics.jsonl", "COMMITTED")


def _refuse_run(path: Path | str) -> None:
    if isinstance(path, Path) and any((path / name).is_file() for name in RUN_FILES):
        raise UserError(
            f"{path}: a run or a checkpoint; so far `report` reads prepared data only (data.path in its config.yaml)."
            " The curves of a run are in training_curve.png, its numbers in metrics.jsonl"
        )


def parser() -> VerbParser:
    """The parser of `llmtrain report`."""
    made = VerbParser("report", __doc__.splitlines()[0], "llmtrain report data/book")
    add = made.add_argument
    add(
        "paths",
        type=path_or_url,
        nargs="+",
        metavar="DATA",
        help="prepared data, here or as a URL; of several, how much each holds is compared",
    )
    add("--tokens", type=count_int, default=20, metavar="N", help="how many tokens are listed (default: %(default)s)")
    add("--samples", type=count_int, default=3, metavar="N", help="windows shown of each split (default: %(default)s)")
    add("--window-tokens", type=positive_int, default=120, metavar="N", help="of each window (default: %(default)s)")
    add("--seed", type=seed_int, default=1337, metavar="N", help="of the choice of windows (default: %(default)s)")
    add("--json", action="store_true", help="print all of it as JSON")
    return made


def main(argv: list[str]) -> None:
    """`llmtrain report`."""
    args = parser().parse_args(argv)
    for path in args.paths:
        _refuse_run(path)
    from llmtrain.data.fetch import local_data
    from llmtrain.data.inspection import Shown, inspect

    shown = Shown(args.tokens, args.samples, args.window_tokens, args.seed)
    reports = [inspect(path, local_data(path), shown, sys.stderr.isatty()) for path in args.paths]
    if args.json:
        print(json.dumps({"data": reports}, allow_nan=False))
        return
    from llmtrain.observe.data_report import show

    show(reports)


if __name__ == "__main__":
    sys.exit(run_main(main))
