"""Say what became of runs, or what prepared data holds: of either, as tables, as JSON, of runs also as a web page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llmtrain.arguments import VerbParser, count, positive_int, seed_int
from llmtrain.errors import UserError, run_main
from llmtrain.storage.remote import Remote, path_or_url


def _is_of_a_run(path: Path | str) -> bool:
    from llmtrain.checkpoint.folders import MARKER, folder_of_runs, is_committed
    from llmtrain.data.shards import MANIFEST
    from llmtrain.observe.run_folder import is_run

    if isinstance(path, Path):
        if is_run(path) or is_committed(path):
            return True
        if path.is_dir() and not (path / MANIFEST).is_file() and (runs := folder_of_runs(path)):
            raise UserError(f"{path}: {runs}; name one of them, or several")
        return False
    from llmtrain.checkpoint.remote import remote_steps

    sizes = Remote(path).sizes()
    if MARKER in sizes or remote_steps(sizes):
        raise UserError(
            f"{path}: a run's checkpoints; of a store report reads prepared data only, for a run's records are not "
            "copied there: name its run.dir on the machine where it trained"
        )
    return False


def _report_data(args: argparse.Namespace) -> None:
    from llmtrain.data.fetch import local_data
    from llmtrain.data.inspection import Shown, inspect

    shown = Shown(args.tokens, args.samples, args.window_tokens, args.seed)
    reports = [inspect(path, local_data(path), shown, sys.stderr.isatty()) for path in args.paths]
    if args.json:
        print(json.dumps({"data": reports}, allow_nan=False))
        return
    from llmtrain.observe.data_report import show

    show(reports)


def _report_runs(args: argparse.Namespace) -> None:
    from llmtrain.observe.run_facts import curves_of, facts_of
    from llmtrain.observe.run_folder import read_run

    if args.html and not args.html.parent.is_dir():
        raise UserError(f"--html {args.html}: there is no folder {args.html.parent}; make it, or name another")
    runs = [read_run(path) for path in args.paths]
    facts = [facts_of(run) for run in runs]
    if args.html:
        from llmtrain.observe.page_report import write_page

        write_page(runs, facts, args.html)
    if args.json:
        whole = [{**of_run, "curves": curves_of(run)} for run, of_run in zip(runs, facts, strict=True)]
        print(json.dumps({"runs": whole}, allow_nan=False))
        return
    from llmtrain.observe.run_report import show_runs

    show_runs(runs, facts)
    if args.html:
        print(f"page: {args.html}")


def parser() -> VerbParser:
    """The parser of `llmtrain report`."""
    made = VerbParser("report", __doc__.splitlines()[0], "llmtrain report checkpoints/mine --html report.html")
    add = made.add_argument
    add(
        "paths",
        type=path_or_url,
        nargs="+",
        metavar="PATH",
        help="run folders on this machine, or prepared data, also as a URL; several of a kind are compared",
    )
    add("--json", action="store_true", help="print all of it as JSON")
    add("--html", type=Path, metavar="FILE", help="of runs: also write one web page, which needs no network")
    of_data = made.add_argument_group("of prepared data")
    add = of_data.add_argument
    add("--tokens", type=count, default=20, metavar="N", help="how many tokens are listed (default: %(default)s)")
    add("--samples", type=count, default=3, metavar="N", help="windows shown of each split (default: %(default)s)")
    add("--window-tokens", type=positive_int, default=120, metavar="N", help="of each window (default: %(default)s)")
    add("--seed", type=seed_int, default=1337, metavar="N", help="of the choice of windows (default: %(default)s)")
    return made


def main(argv: list[str]) -> None:
    """`llmtrain report`."""
    args = parser().read(argv)
    for path in args.paths:
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"{path}: no such folder; name a run (such as checkpoints/demo) or prepared data")
    runs = [path for path in args.paths if _is_of_a_run(path)]
    if not runs:
        if args.html:
            raise UserError(f"--html: a page of runs, but {args.paths[0]} is none; leave it out")
        _report_data(args)
    elif len(runs) == len(args.paths):
        _report_runs(args)
    else:
        other = next(path for path in args.paths if path not in runs)
        raise UserError(f"{runs[0]} is of a run, {other} is not: name runs or prepared data, not both at once")


if __name__ == "__main__":
    sys.exit(run_main(main))
