"""`prepare` as many independent processes, each with a part of the input, that end as if they had been one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llmtrain import __version__
from llmtrain.data.corpus import cut_into_chunks, survey
from llmtrain.data.dedup import DUPLICATES
from llmtrain.data.encode import Division, Encoded, encode_to_shards
from llmtrain.data.files import Found
from llmtrain.data.join import join_parts
from llmtrain.data.plan import PART, PLAN, PartRecord, PartsFolder, Plan, cut_evenly
from llmtrain.data.progress_bar import progress_bar
from llmtrain.data.recipe import (
    Options,
    Outcome,
    default_workers,
    divide,
    find_existing,
    fit_into,
    total_bytes,
    write_manifest,
)
from llmtrain.data.shards import MANIFEST, TOKENIZER_FOLDER, describe
from llmtrain.data.split import Splitter
from llmtrain.data.staging import Say, make_once
from llmtrain.errors import UserError


@dataclass(frozen=True)
class PartOutcome:
    """What `prepare --part` did where other parts are still to come."""

    number: int
    count: int
    already_done: bool
    encoded: Encoded
    missing: list[int]


def prepare_part(
    options: Options, number: int | None, count: int | None, *, say: Say, show_progress: bool = False
) -> Outcome | PartOutcome:
    """Write part `number` (from 1) of `count` unless it is done, and join all parts if none is missing.

    The parts of one `options.out` run in any order, at once or one after another, on any machines that share the file
    system; each may be killed and run again. What they make together is what `prepare` would have made.

    Args:
        options: the same for all parts.
        number: None only joins.
        count: None is what the parts were begun with.
        say: is told one line of what is waited for or cleaned up.
        show_progress: on the terminal.

    Raises:
        UserError: as `prepare`; also options or input that differ from those of other parts, and, where it shall only
            join, missing parts (named).
    """
    found = options.find()
    request = options.request(found.files)
    work = _Parts(options, found, request, say, show_progress)
    if (existing := find_existing(options.out, request)) is None:
        try:
            if number is not None and count is not None:
                work.make_plan(count)
            plan = work.read_plan(count)
            count = len(plan.stretches)
            already_done = number is None or work.make_part(plan, number)
            if missing := work.folder.missing(count):
                if number is None:
                    raise UserError(
                        f"{work.folder.path}: parts missing of {count}: {numbers_as_ranges(missing)}; run them, with"
                        f" the same options and --part {missing[0]}/{count} and so on"
                    )
                encoded = work.folder.read_part(number, count).encoded
                return PartOutcome(number, count, already_done, encoded, missing)
            return work.join(plan)
        except UserError:
            # Another process may have joined all parts meanwhile, and removed what this one was at.
            if (existing := find_existing(options.out, request)) is None:
                raise
    work.folder.remove()
    return Outcome(existing, already_prepared=True)


class _Parts:
    """The steps of `prepare_part`; each is taken by one process, while others that need its result wait."""

    def __init__(self, options: Options, found: Found, request: dict[str, Any], say: Say, show: bool):
        self.folder = PartsFolder(options.out)
        self._options, self._files, self._left_out = options, found.files, found.left_out
        self._request, self._say, self._show = request, say, show

    def make_plan(self, count: int) -> None:
        """Decide once for all parts: the split, the tokenizer, and where each part begins."""
        options, files = self._options, self._files

        def make(folder: Path) -> None:
            division = divide(files, options, folder, self._show)
            tokenizer = fit_into(folder, files, division, options)
            to_read = total_bytes([file for file in files if file.format in ("jsonl", "dataset")])
            outlines = list(survey(files, division.reading, options.workers or default_workers(to_read)))
            is_known = all(file.dataset is None for file in files)
            size = total_bytes(files) if is_known else sum(outline.source_bytes for outline in outlines)
            plan = Plan(
                llmtrain=__version__,
                request=self._request,
                split_by=division.splitter.by,
                tokenizer=tokenizer,
                duplicates=describe(folder / DUPLICATES) if options.dedup else None,
                stretches=cut_evenly(outlines, size, count),
            )
            (folder / PLAN).write_text(plan.model_dump_json(indent=1) + "\n", encoding="utf-8")

        self._once(self.folder.plan, make, "fitting the tokenizer")

    def read_plan(self, count: int | None) -> Plan:
        """Read the plan; refuse it if it is for other input, options or (unless None) another count of parts."""
        if not self.folder.plan.is_dir():
            raise UserError(
                f"{self.folder.path}: no parts to join; make them with --part 1/N, --part 2/N, … --part N/N"
            )
        plan = self.folder.read_plan()
        if difference := plan.difference(__version__, self._request, count):
            raise UserError(
                f"{self.folder.path}: {difference}; give all parts the same input and options, or delete it to begin"
                " again"
            )
        return plan

    def make_part(self, plan: Plan, number: int) -> bool:
        """Write a part; return whether it was there already."""
        count, stretch, options = len(plan.stretches), plan.stretches[number - 1], self._options
        out, plan_sha256 = self.folder.part(number, count), self.folder.plan_hash()
        reading = options.reading(self.folder.plan / DUPLICATES if plan.duplicates else None)
        division = Division(
            reading, Splitter(options.val_split, plan.split_by, options.seed), options.augment, options.seed
        )

        def make(folder: Path) -> None:
            chunks = islice(cut_into_chunks(self._files, reading, start=stretch.start), stretch.chunks)
            with progress_bar(f"part {number}/{count}", stretch.source_bytes, self._show) as report:
                encoded = encode_to_shards(
                    chunks,
                    division,
                    self.folder.tokenizer,
                    plan.dtype,
                    folder=folder,
                    shard_tokens=options.shard_tokens,
                    workers=options.workers or default_workers(stretch.source_bytes),
                    report=report,
                )
            record = PartRecord(plan_sha256=plan_sha256, encoded=encoded)
            (folder / PART).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")

        return not self._once(out, make, f"making part {number}/{count}")

    def join(self, plan: Plan) -> Outcome:
        """Copy all parts into OUT and remove them."""
        options, count = self._options, len(plan.stretches)
        started = time.perf_counter()

        def make(folder: Path) -> None:
            (folder / TOKENIZER_FOLDER).mkdir()
            for file in plan.tokenizer.files:  # checked when the plan was read
                shutil.copyfile(self.folder.plan / file.path, folder / file.path)
            sizes = [self.folder.read_part(number, count).size() for number in range(1, count + 1)]
            with progress_bar("checking", sum(sizes), self._show) as report:
                parts = [
                    (self.folder.part(number, count), self.folder.read_part(number, count, report).encoded)
                    for number in range(1, count + 1)
                ]
            with progress_bar("joining", sum(sizes), self._show) as report:
                encoded = join_parts(
                    parts,
                    plan.dtype,
                    folder=folder,
                    shard_tokens=options.shard_tokens,
                    workers=options.workers or default_workers(sum(sizes)),
                    report=report,
                )
            write_manifest(
                folder, encoded, plan.tokenizer, plan.split_by, request=self._request, left_out=self._left_out
            )

        made = self._once(self.folder.joined, make, "joining the parts")
        self.folder.publish(options.out)
        manifest = find_existing(options.out, self._request)
        if manifest is None:
            raise UserError(f"{options.out}: was removed while it was made")
        self.folder.remove()
        return Outcome(manifest, not made, 0.0, time.perf_counter() - started)

    def _once(self, folder: Path, make: Callable[[Path], None], task: str) -> bool:
        """Make a folder, unless it is there or all is joined already; return whether this process made it."""

        def is_made() -> bool:
            return folder.is_dir() or (self._options.out / MANIFEST).is_file()

        return make_once(folder, make, is_made=is_made, say=self._say, task=task)


def numbers_as_ranges(numbers: list[int]) -> str:
    """Write rising numbers short: ``1, 3-5``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)
