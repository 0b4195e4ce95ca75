"""`prepare` as one process, or as many, each with a part of the input, that end as if they had been one.

    plan: the split, the tokenizer, where each part begins → shards, of all or of each part → joined → OUT

What a killed process had finished is gone on with: the plan, the parts, and the shards of a part or of the whole.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from llmtrain import __version__
from llmtrain.data.corpus import ReadOptions, cut_into_chunks
from llmtrain.data.dedup import DUPLICATES
from llmtrain.data.encode import Division, Encoded, encode_to_shards
from llmtrain.data.join import join_parts, needed
from llmtrain.data.journal import JoinJournal, Journal, chunks_done, copied
from llmtrain.data.json_text import look_at_json
from llmtrain.data.plan import PART, PLAN, READING, PartRecord, PartsFolder, Plan, Stretch, cut_evenly
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
from llmtrain.data.shards import MANIFEST, TOKENIZER_FOLDER, Manifest, describe
from llmtrain.data.split import Splitter
from llmtrain.data.staging import JOURNAL, Reached, Say, make_once
from llmtrain.data.survey import Outline, coarsened, survey
from llmtrain.errors import UserError


@dataclass(frozen=True)
class PartOutcome:
    """What `prepare --part` did where other parts are still to come."""

    number: int
    count: int
    already_done: bool
    encoded: Encoded
    missing: list[int]


def prepare_all(options: Options, *, say: Say, show_progress: bool = False) -> Outcome:
    """Write prepared data of text to `options.out`, or find that the same request was written there before.

    Where a process of this host was killed or stopped that had begun the same, it goes on behind the shards that are
    finished; what was begun with other input or options is removed if it was no more than a plan.

    Args:
        options: what to prepare and how.
        say: is told one line of what is waited for, gone on with, kept or removed.
        show_progress: on the terminal.

    Raises:
        UserError: bad input, options that do not fit it, or a folder that cannot be written.
    """
    work = _Parts(options, say, show_progress)
    if (existing := work.find_existing()) is None:
        work.drop_another()
        started = time.perf_counter()
        try:
            work.make_plan(1)
            work.read_plan(1)
            fitted = time.perf_counter()
            return replace(work.make_all(), fit_seconds=fitted - started, encode_seconds=time.perf_counter() - fitted)
        except BaseException as error:
            # Another process may have made all of it meanwhile, and removed what this one was at.
            if not isinstance(error, UserError) or (existing := work.find_existing()) is None:
                work.remove_unless_begun()
                raise
    work.folder.remove()
    return Outcome(existing, already_prepared=True)


def prepare_part(
    options: Options, number: int | None, count: int | None, *, say: Say, show_progress: bool = False
) -> Outcome | PartOutcome:
    """Write part `number` (from 1) of `count` unless it is done, and join all parts if none is missing.

    The parts of one `options.out` run in any order, at once or one after another, on any machines that share the file
    system; each may be killed and run again. What they make together is what `prepare_all` would have made, and the
    only part of one is that.

    Args:
        options: the same for all parts.
        number: None only joins.
        count: None is what the parts were begun with.
        say: is told one line of what is waited for, gone on with, kept or removed.
        show_progress: on the terminal.

    Raises:
        UserError: as `prepare_all`; also options or input that differ from those of other parts, and, where it shall
            only join, missing parts (named).
    """
    if (number, count) == (1, 1):
        return prepare_all(options, say=say, show_progress=show_progress)
    work = _Parts(options, say, show_progress)
    if (existing := work.find_existing()) is None:
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
            started = time.perf_counter()
            return replace(work.join(plan), encode_seconds=time.perf_counter() - started)
        except UserError:
            # Another process may have joined all parts meanwhile, and removed what this one was at.
            if (existing := work.find_existing()) is None:
                raise
    work.folder.remove()
    return Outcome(existing, already_prepared=True)


class _Parts:
    """The steps of a prepare; each is taken by one process, while others that need its result wait."""

    def __init__(self, options: Options, say: Say, show: bool):
        found = options.find()
        self.folder = PartsFolder(options.out)
        self._options, self._files, self._left_out = options, found.files, found.left_out
        self._request, self._say, self._show = options.request(found.files), say, show

    def find_existing(self) -> Manifest | None:
        """The manifest of data that the same request made; see there."""
        return find_existing(self._options.out, self._request)

    def drop_another(self) -> None:
        """Remove the plan that one process left that began with other input or options.

        Raises:
            UserError: there is more than that, which is for the user to give up; or the process may be alive.
        """
        if not self.folder.has_plan():
            return
        plan = self.folder.read_plan()
        difference = plan.difference(__version__, self._request, None)
        if len(plan.stretches) > 1 or difference is None:
            return
        if self.folder.has_more_than_plan():
            raise UserError(
                f"{self.folder.path}: has finished shards, and {difference}; give the same options, choose another"
                " --out, or delete it to begin again"
            )
        if not self.folder.remove_if_free():
            raise UserError(
                f"{self.folder.path}: {difference}, and another process may be at it; wait for it, choose another"
                " --out, or delete it"
            )
        self._say(f"removed {self.folder.path}, which was not finished: {difference}")

    def remove_unless_begun(self) -> None:
        """Leave nothing where there is no more than a plan, and no other process may go by it."""
        with contextlib.suppress(UserError):  # it is of another request, of many parts or damaged, and not ours
            if self.folder.has_plan():
                self.read_plan(1)
            if not self.folder.has_more_than_plan():
                self.folder.remove_if_free()

    def make_plan(self, count: int) -> None:
        """Decide once for all parts: the split, the tokenizer, and where each part begins."""
        options, files = self._options, self._files

        def make(folder: Path) -> None:
            if line := look_at_json(files, options.text_field, asked_for=bool(options.selection.patterns)):
                self._say(line)
            division = divide(files, options, folder, self._show)
            tokenizer, changed = fit_into(folder, files, division, options)
            if changed:
                self._say(
                    f"{options.tokenizer}: this tokenizer does not give the text back exactly: {changed[0]!r} comes"
                    f" back as {changed[1]!r}; if that is not meant, take another"
                )
            plan = Plan(
                reading=READING,
                llmtrain=__version__,
                request=self._request,
                split_by=division.splitter.by,
                tokenizer=tokenizer,
                duplicates=describe(folder / DUPLICATES) if options.dedup else None,
                not_given_back=changed,
                stretches=self._stretches(division.reading, count),
            )
            (folder / PLAN).write_text(plan.model_dump_json(indent=1) + "\n", encoding="utf-8")

        self._once(self.folder.plan, make, "fitting the tokenizer")

    def _stretches(self, reading: ReadOptions, count: int) -> tuple[Stretch, ...]:
        files = self._files
        if count == 1:
            return (Stretch(chunks=None, source_bytes=total_bytes(files)),)
        to_read = total_bytes([file for file in files if file.format in ("jsonl", "dataset")])
        outlines: Iterable[Outline] = survey(files, reading, self._options.workers or default_workers(to_read))
        size = total_bytes(files)
        if any(file.dataset for file in files):  # whose size is known only when they were read
            outlines = coarsened(outlines)
            size = sum(outline.source_bytes for outline in outlines)
        return cut_evenly(outlines, size, count)

    def read_plan(self, count: int | None) -> Plan:
        """Read the plan; refuse it if it is for other input, options or (unless None) another count of parts."""
        if not self.folder.has_plan():
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
        count, plan_sha256 = len(plan.stretches), self.folder.plan_hash()

        def make(folder: Path) -> None:
            encoded = self._encode(plan, plan.stretches[number - 1], folder, f"part {number}/{count}")
            record = PartRecord(plan_sha256=plan_sha256, encoded=encoded)
            (folder / PART).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")

        return not self._once(self.folder.part(number, count), make, f"making part {number}/{count}", self._reached)

    def make_all(self) -> Outcome:
        """Write all into OUT."""

        def make(folder: Path) -> None:
            self.make_plan(1)  # which one that was stopped has removed, while this one waited for it
            plan = self.read_plan(1)
            encoded = self._encode(plan, plan.stretches[0], folder, "encoding")
            self._complete(folder, plan, encoded)

        return self._publish(self._once(self.folder.joined, make, "encoding", self._reached))

    def _encode(self, plan: Plan, stretch: Stretch, folder: Path, task: str) -> Encoded:
        """Write the shards of a stretch into a folder, from where its journal ends."""
        options = self._options
        journal = Journal(folder.with_name(JOURNAL), folder, self.folder.plan_hash(), self._say)
        reading = options.reading(self.folder.plan / DUPLICATES if plan.duplicates else None)
        division = Division(
            reading, Splitter(options.val_split, plan.split_by, options.seed), options.augment, options.seed
        )
        done = journal.done.chunks
        chunks = cut_into_chunks(self._files, reading, start=journal.done.last if done else stretch.start)
        first = min(done, 1)  # the last that is done comes first again
        end = None if stretch.chunks is None else first + stretch.chunks - done
        with progress_bar(task, stretch.source_bytes, self._show) as report:
            return encode_to_shards(
                islice(chunks, first, end),
                division,
                self.folder.tokenizer,
                plan.dtype,
                folder=folder,
                journal=journal,
                shard_tokens=options.shard_tokens,
                workers=options.workers or default_workers(stretch.source_bytes, plan.tokenizer.kind),
                report=report,
            )

    def join(self, plan: Plan) -> Outcome:
        """Copy all parts into OUT and remove them."""
        options, count = self._options, len(plan.stretches)

        def make(folder: Path) -> None:
            journal = JoinJournal(folder.with_name(JOURNAL), folder, self.folder.plan_hash(), self._say)
            records = [self.folder.read_part(number, count) for number in range(1, count + 1)]
            left = needed([record.encoded for record in records], options.shard_tokens, journal.whole)
            with progress_bar("checking", sum(records[index].size() for index in left), self._show) as report:
                for index in left:
                    self.folder.read_part(index + 1, count, report)
            sizes = [record.size() for record in records]
            with progress_bar("joining", sum(sizes), self._show) as report:
                encoded = join_parts(
                    [(self.folder.part(index + 1, count), record.encoded) for index, record in enumerate(records)],
                    plan.dtype,
                    folder=folder,
                    journal=journal,
                    shard_tokens=options.shard_tokens,
                    workers=options.workers or default_workers(sum(sizes)),
                    report=report,
                )
            self._complete(folder, plan, encoded)

        plan_sha256 = self.folder.plan_hash()
        return self._publish(
            self._once(self.folder.joined, make, "joining the parts", lambda path: len(copied(path, plan_sha256)))
        )

    def _complete(self, folder: Path, plan: Plan, encoded: Encoded) -> None:
        """Put the tokenizer and the manifest beside all shards."""
        (folder / TOKENIZER_FOLDER).mkdir(exist_ok=True)
        for file in plan.tokenizer.files:  # checked when the plan was read
            shutil.copyfile(self.folder.plan / file.path, folder / file.path)
        write_manifest(
            folder, encoded, plan.tokenizer, plan.split_by,
            request=self._request, left_out=self._left_out, not_given_back=plan.not_given_back,
        )  # fmt: skip

    def _publish(self, made: bool) -> Outcome:
        """Make what is joined OUT, and remove all else."""
        self.folder.publish(self._options.out)
        manifest = self.find_existing()
        if manifest is None:
            raise UserError(f"{self._options.out}: was removed while it was made")
        self.folder.remove()
        return Outcome(manifest, not made)

    def _reached(self, journal: Path) -> int:
        return chunks_done(journal, self.folder.plan_hash()) if self.folder.has_plan() else 0

    def _once(self, folder: Path, make: Callable[[Path], None], task: str, reached: Reached | None = None) -> bool:
        """Make a folder, unless it is there or all is joined already; return whether this process made it."""

        def is_made() -> bool:
            return folder.is_dir() or (self._options.out / MANIFEST).is_file()

        return make_once(folder, make, is_made=is_made, say=self._say, task=task, reached=reached)


def numbers_as_ranges(numbers: list[int]) -> str:
    """Write rising numbers short: ``1, 3-5``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)
