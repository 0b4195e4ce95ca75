"""Check every hash of prepared data, of a checkpoint, or of all checkpoints of a run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llmtrain.arguments import VerbParser
from llmtrain.data.outside import problem_of_content
from llmtrain.data.progress_bar import progress_bar
from llmtrain.data.shards import (
    MANIFEST,
    TOKENIZER_FOLDER,
    Manifest,
    Report,
    ShardInfo,
    outside_vocabulary,
    read_manifest,
    verify_files,
)
from llmtrain.errors import CorruptError, LlmtrainError, UserError, run_main
from llmtrain.storage.remote import Remote, path_or_url

LARGE_BYTES = 64 << 20  # from here on a progress bar is worth showing
_ADVICE = {
    "data": "prepare it again",
    "index": "delete that folder, which is made again",
    "checkpoint": "use another checkpoint",
}


@dataclass(frozen=True)
class Subject:
    """One folder with a manifest."""

    path: Path
    kind: str  # "data", "index" (of packed data) or "checkpoint"
    remote: Remote | None = None  # where it lies on a store: of a checkpoint, the run's folder


@dataclass(frozen=True)
class Verdict:
    """What was found in one folder."""

    path: str
    kind: str
    files: int
    bytes: int
    problems: list[str]


def find_subjects(path: Path | str) -> list[Subject]:
    """Say what PATH holds.

    Raises:
        UserError: neither prepared data, nor a checkpoint, nor a run with checkpoints.
    """
    if isinstance(path, str):
        return _remote_subjects(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if (path / MANIFEST).is_file() and not _is_of_checkpoint(path / MANIFEST):
        return [Subject(path, "data"), *_indices(path)]
    from llmtrain.checkpoint.folders import MARKER, committed_steps, folder_of_runs, is_committed, step_folder

    if is_committed(path):
        return [Subject(path, "checkpoint")]
    if (path / MANIFEST).is_file():
        raise UserError(f"{path}: an unfinished checkpoint (no {MARKER}), which counts as none")
    steps = committed_steps(path)
    if not steps:
        if runs := folder_of_runs(path):
            raise UserError(f"{path}: {runs}; name one of them")
        raise UserError(f"{path}: neither prepared data nor a checkpoint nor a run with checkpoints")
    return [Subject(step_folder(path, step), "checkpoint") for step in steps]


def verify(subject: Subject, show_progress: bool = False) -> Verdict:
    """Check every file of a folder; problems are collected, not raised."""
    check = {"data": _verify_data, "index": _verify_index, "checkpoint": _verify_checkpoint}[subject.kind]
    try:
        if subject.remote is not None:
            return _verify_remote(subject, subject.remote)
        return check(subject.path, show_progress)
    except CorruptError as error:  # the manifest itself
        return Verdict(str(subject.path), subject.kind, 0, 0, [str(error)])


def _indices(folder: Path) -> list[Subject]:
    from llmtrain.data.packed import indices_of

    try:
        return [Subject(index, "index") for index in indices_of(read_manifest(folder))]
    except LlmtrainError:  # which `_verify_data` tells
        return []


def _remote_subjects(url: str) -> list[Subject]:
    remote = Remote(url)
    if remote.read(MANIFEST) is not None and "COMMITTED" not in remote.sizes():
        return [Subject(Path(url), "data", remote)]
    from llmtrain.checkpoint.remote import remote_steps, step_name, step_of

    parent, _, name = url.rpartition("/")
    if (step := step_of(name)) is not None:
        remote = Remote(parent)
    steps = [found for found in remote_steps(remote.sizes()) if step in (None, found)]
    if not steps:
        raise UserError(f"{url}: neither prepared data nor a checkpoint nor a run with checkpoints")
    return [Subject(Path(step_name(found)), "checkpoint", remote) for found in steps]


def _verify_remote(subject: Subject, remote: Remote) -> Verdict:
    """Read every file where it lies: what the cache holds says nothing about that."""
    if subject.kind == "data":
        from llmtrain.data.fetch import problems_of

        data, problems = problems_of(remote)
        files = data.files()
        return Verdict(remote.url, "data", len(files), sum(file.bytes for file in files), problems)
    from llmtrain.checkpoint.remote import problems_of as problems_of_step
    from llmtrain.checkpoint.remote import step_of

    manifest, problems = problems_of_step(remote, step_of(subject.path.name) or 0)
    size = sum(file.bytes for file in manifest.files)
    return Verdict(f"{remote.url}/{subject.path}", "checkpoint", len(manifest.files), size, problems)


def _verify_checkpoint(folder: Path, show_progress: bool) -> Verdict:
    from llmtrain.checkpoint.format import CheckpointReader

    reader = CheckpointReader(folder)
    files = reader.manifest.files
    size = sum(file.bytes for file in files)
    with progress_bar(folder.name, size, show_progress and size >= LARGE_BYTES) as report:
        problems = reader.verify(report)
    if not problems:
        try:
            reader.tensors()
        except CorruptError as error:
            problems.append(str(error))
    return Verdict(str(folder), "checkpoint", len(files), size, problems)


def _verify_data(folder: Path, show_progress: bool) -> Verdict:
    manifest = read_manifest(folder)
    files, outside, shards = manifest.files(), manifest.outside(), manifest.shards()
    size = sum(file.bytes for file in files) + sum(tokens.bytes for tokens in outside)
    twice = size + sum(shard.ids.bytes for shard in shards)  # ids are read for their hash, then for their values
    with progress_bar(folder.name, twice, show_progress and twice >= LARGE_BYTES) as report:
        problems = verify_files(folder, files, report)
        problems += [line for tokens in outside if (line := problem_of_content(tokens, report))]
        if not problems:  # what follows would only tell of the same damage again
            for name, split in manifest.splits.items():
                problems += [f"{folder / MANIFEST}: the {name} split {line}" for line in split.contradictions()]
            for shard in shards:
                problems += _wrong_ids(folder, shard, manifest, report)
            problems += _wrong_tokenizer(folder, manifest)
    return Verdict(str(folder), "data", len(files) + len(outside), size, problems)


def _verify_index(folder: Path, show_progress: bool) -> Verdict:
    from llmtrain.data.packed import read_index

    files = read_index(folder).files
    size = sum(file.bytes for file in files)
    with progress_bar(folder.name, size, show_progress and size >= LARGE_BYTES) as report:
        problems = verify_files(folder, files, report)
    return Verdict(str(folder), "index", len(files), size, problems)


def _wrong_ids(folder: Path, shard: ShardInfo, manifest: Manifest, report: Report) -> list[str]:
    """Find the first id of a shard outside the vocabulary, and document ends that are not in order."""
    lines = []
    vocab_size, position = manifest.tokenizer.vocab_size, 0
    for ids in shard.blocks(folder, np.dtype(manifest.dtype)):
        if int(ids.max()) >= vocab_size:
            first = int(np.argmax(ids >= vocab_size))
            place = shard.place(position + first)
            lines.append(outside_vocabulary(shard.path(folder), int(ids[first]), place, vocab_size))
            break
        position += len(ids)
        report(ids.nbytes)
    ends = np.fromfile(folder / shard.ends.path, "<i8")
    limits = np.concatenate(([0], ends, [shard.tokens]))
    if len(ends) != shard.documents or (np.diff(limits) < 0).any():
        lines.append(f"{folder / shard.ends.path}: not the rising ends of {shard.documents} documents")
    return lines


def _wrong_tokenizer(folder: Path, manifest: Manifest) -> list[str]:
    """Load the tokenizer: files can be whole and still be another's."""
    from llmtrain.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    except LlmtrainError as error:
        return [str(error)]
    if tokenizer.vocab_size == manifest.tokenizer.vocab_size:
        return []
    return [
        f"{folder / TOKENIZER_FOLDER}: has {tokenizer.vocab_size} ids where the manifest says "
        f"{manifest.tokenizer.vocab_size}"
    ]


def _is_of_checkpoint(manifest: Path) -> bool:
    """Whether a manifest, damaged perhaps, is one of a checkpoint; raise UserError if it is nobody's of ours."""
    try:
        content = json.loads(manifest.read_bytes())
    except OSError as error:
        raise UserError(f"{manifest}: cannot be read ({error.strerror})") from error
    except ValueError:
        # Not JSON any more: its neighbours say what it was.
        return any(manifest.parent.glob("rank*.json"))
    form = content.get("format") if isinstance(content, dict) else None
    if form not in ("llmtrain-tokens", "llmtrain-checkpoint"):
        raise UserError(f"{manifest}: belongs neither to prepared data nor to a checkpoint")
    return bool(form == "llmtrain-checkpoint")


def parser() -> VerbParser:
    """The parser of `llmtrain verify`."""
    made = VerbParser("verify", __doc__.splitlines()[0], "llmtrain verify data/book")
    made.add_argument("path", type=path_or_url, metavar="PATH", help="prepared data, a checkpoint, or a run folder")
    made.add_argument("--json", action="store_true", help="print what was found as JSON")
    return made


def main(argv: list[str]) -> None:
    """`llmtrain verify`."""
    args = parser().read(argv)
    verdicts = []
    for subject in find_subjects(args.path):
        verdict = verify(subject, show_progress=sys.stderr.isatty())
        verdicts.append(verdict)
        if not args.json:
            for problem in verdict.problems:
                print(f"FAIL  {problem}", flush=True)
            if not verdict.problems:
                print(f"ok    {verdict.path}: {verdict.files} files, {verdict.bytes / 1e6:,.1f} MB", flush=True)
    problems = sum(len(verdict.problems) for verdict in verdicts)
    if args.json:
        print(json.dumps({"ok": problems == 0, "checked": [asdict(verdict) for verdict in verdicts]}))
    if problems:
        kind = next(verdict.kind for verdict in verdicts if verdict.problems)
        raise CorruptError(f"{args.path}: {problems} problem{'s' if problems > 1 else ''} found; {_ADVICE[kind]}")


if __name__ == "__main__":
    sys.exit(run_main(main))
