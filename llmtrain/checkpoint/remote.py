"""Checkpoints that lie on a store: which are there, and bringing them to this machine.

The same layout as in a run folder, with the same promise: a step without its marker does not exist. The links are small
files that hold the name of a step folder.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint import format as fmt
from llmtrain.checkpoint.folders import BEST, MARKER, committed_steps, is_committed, listed, step_folder
from llmtrain.checkpoint.lock import RunLock
from llmtrain.config import RunConfig
from llmtrain.data.lock import FileLock
from llmtrain.data.shards import check_inside, verify_files
from llmtrain.data.staging import make_folder, staged_folder
from llmtrain.engine import Engine
from llmtrain.errors import CorruptError, UserError
from llmtrain.health.agreement import patiently
from llmtrain.storage.again import again
from llmtrain.storage.cache import cache_folder, say
from llmtrain.storage.remote import Remote, RemoteError, in_parallel, is_url

_FETCHED = ".fetched"  # in the run folder, which all hosts share: checkpoints of other runs that it branches off from


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return step_folder(Path(), step).name


def step_of(name: str) -> int | None:
    """The step whose folder has this name; None for any other name."""
    number = name.removeprefix("step-")
    return int(number) if number.isdecimal() and name == step_name(int(number)) else None


def remote_steps(sizes: dict[str, int]) -> list[int]:
    """Steps with a finished checkpoint, ascending, from a listing of the remote run folder."""
    marked = [name.partition("/") for name in sizes if name.endswith(f"/{MARKER}")]
    return sorted(step for folder, _, rest in marked if rest == MARKER and (step := step_of(folder)) is not None)


def remote_link(remote: Remote, name: str, sizes: dict[str, int]) -> int | None:
    """The finished step that `best`, `latest` or `final` leads to."""
    content = remote.read(name) if name in sizes else None
    step = step_of(content.decode(errors="replace").strip()) if content else None
    return step if step in remote_steps(sizes) else None


def read_manifest(remote: Remote, step: int) -> tuple[fmt.CheckpointManifest, bytes, bytes]:
    """The manifest of a remote checkpoint, parsed and as it lies there, and its marker.

    Raises:
        CorruptError: it is not what the marker says, or names files outside the folder.
    """
    where = f"{remote.url}/{step_name(step)}/{fmt.MANIFEST}"
    text, marker = (remote.read(f"{step_name(step)}/{name}") for name in (fmt.MANIFEST, MARKER))
    if text is None or marker is None or hashlib.sha256(text).hexdigest().encode() != marker.strip():
        raise CorruptError(f"{where}: missing, or differs from the hash in {MARKER}")
    try:
        manifest = fmt.CheckpointManifest.model_validate_json(text)
    except ValueError as error:
        raise CorruptError(f"{where}: not a manifest of this version") from error
    for file in manifest.files:
        check_inside(Path("/checkpoint"), file.path, Path(where))
    return manifest, text, marker


def problems_of(remote: Remote, step: int) -> tuple[fmt.CheckpointManifest, list[str]]:
    """Read every file of a remote checkpoint; return one line for each that is wrong."""
    manifest, _, _ = read_manifest(remote, step)
    folder = step_name(step)
    files = ((f"{folder}/{file.path}", file.bytes, file.sha256) for file in manifest.files)
    return manifest, remote.problems(files, folder)


def fetch_step(remote: Remote, step: int, into: Path) -> Path:
    """Bring a checkpoint into a folder under its name there, every file hashed while it is written.

    What is there already is kept if it is the same and whole; else it gives way.

    Raises:
        CorruptError: the remote one is damaged; nothing is left of it here.
        UserError: something cannot be read, or not written here.
    """
    folder = into / step_name(step)
    manifest, text, marker = read_manifest(remote, step)
    if _is_same(folder, text, marker) and not verify_files(folder, list(manifest.files)):
        return folder
    with staged_folder(folder, say=say) as staged:
        in_parallel(
            lambda file: remote.fetch(f"{step_name(step)}/{file.path}", staged / file.path, file.sha256),
            list(manifest.files),
        )
        fmt.write_file(staged / fmt.MANIFEST, text)
        fmt.write_file(staged / MARKER, marker)
        if folder.exists():
            shutil.rmtree(folder.resolve())  # it may have been moved elsewhere, and linked
    return folder


def _is_same(folder: Path, manifest: bytes, marker: bytes) -> bool:
    try:
        return (folder / fmt.MANIFEST).read_bytes() == manifest and (folder / MARKER).read_bytes() == marker
    except OSError:  # not there, or not to be read
        return False


def fetch_newest(remote: Remote, steps: list[int], into: Path, warn: Callable[[str], None]) -> Path | None:
    """Bring the newest good checkpoint of these steps, ascending; damaged ones are passed over with a warning."""
    for step in reversed(steps):
        try:
            folder = fetch_step(remote, step, into)
        except CorruptError as error:
            warn(f"{error}; going back to an older checkpoint")
            continue
        say(f"fetched {remote.url}/{step_name(step)} to {folder}")
        return folder
    return None


def is_set_aside(remote: Remote, step: int, run_dir: Path) -> bool:
    """Whether the run went back from this remote checkpoint here, and could not say so there."""
    asides = [aside for aside in listed(run_dir, f"{step_name(step)}.aside-") if is_committed(aside)]
    marker = remote.read(f"{step_name(step)}/{MARKER}") if asides else None
    return any(again((aside / MARKER).read_bytes) == marker for aside in asides)


def require_same_run(remote: Remote, run_dir: Path, steps: list[int]) -> None:
    """Refuse a remote whose newest step of those that are here too is another checkpoint than here.

    One that the run has gone back from is its own.

    Raises:
        UserError: it holds another run.
    """
    common = [step for step in committed_steps(run_dir) if step in steps]
    if not common:
        return
    try:
        marker = read_manifest(remote, common[-1])[2]
        fmt.CheckpointReader(step_folder(run_dir, common[-1]))
    except CorruptError:
        return  # not another run's, but damaged: found and told where it is read
    is_same = marker.strip() == (step_folder(run_dir, common[-1]) / MARKER).read_bytes().strip()
    if not is_same and not is_set_aside(remote, common[-1], run_dir):
        raise UserError(
            f"{remote.url}: its {step_name(common[-1])} is another one than in {run_dir}, so it holds another run; "
            "choose another checkpoint.remote or run.dir"
        )


def can_do_without(run_dir: Path, ask: Callable[[], None], warn: Callable[[str], None]) -> bool:
    """Ask a store for something; return whether it answered. A run that has checkpoints here goes on without it.

    Raises:
        RemoteError: it did not, and there is nothing here to go on from.
    """
    try:
        ask()
    except RemoteError as error:
        if not committed_steps(run_dir):
            raise
        warn(f"{error}; going on with what is in {run_dir}; the store is tried again behind the run")
        return False
    return True


def bring(engine: Engine, config: RunConfig, resume: str, lock: RunLock | None, is_told: Callable[[], bool]) -> str:
    """Fetch what `--resume` needs from a store; return what it then means on this machine.

    Without a lock, which stands for the right to write into `run.dir`, only into the cache (a dry run).
    With `checkpoint.remote` the newest good checkpoint there comes into `run.dir`, if none here is as new.

    Raises:
        UserError: the store cannot be read, or holds another run.
        CorruptError: there are checkpoints, all of them only there, and none is good.
        Stopped: a rank was told to stop, as `is_told` says.
    """
    if config.checkpoint.remote is None and not is_url(resume):
        return resume
    found = patiently(engine, lambda: _bring(config, resume, lock) if engine.rank == 0 else None, is_told)
    return str(engine.gather(found)[0])


def _bring(config: RunConfig, resume: str, lock: RunLock | None) -> str:
    run_dir, url = Path(config.run.dir), (config.checkpoint.remote or "").rstrip("/")
    named = resume.rstrip("/")
    if url:
        _bring_newer(Remote(url), run_dir, resume, lock)
    if not is_url(named):
        return resume
    if url and named == url:
        return str(run_dir)
    if lock and url and named.rpartition("/")[0] == url:
        _claim(run_dir, lock)
        return str(_fetch_named(named, run_dir))
    if lock is None:
        return str(_fetch_named(named, cache_folder("checkpoints", _run_url(named))))
    _claim(run_dir, lock)
    folder = run_dir / _FETCHED / cache_folder("checkpoints", _run_url(named)).name
    fetched = _fetch_named(named, folder, newest=True)
    return str(fetched if step_of(named.rpartition("/")[2]) is not None else folder)


def _bring_newer(remote: Remote, run_dir: Path, resume: str, lock: RunLock | None) -> None:
    sizes: dict[str, int] = {}
    if not can_do_without(run_dir, lambda: sizes.update(remote.sizes()), _warn):
        return
    steps, newest = remote_steps(sizes), max(committed_steps(run_dir), default=-1)
    if resume == "never" and steps:
        raise UserError(f"{remote.url}: holds another run; choose another checkpoint.remote, or go on by --resume auto")
    if max(steps, default=-1) <= newest:
        can_do_without(run_dir, lambda: require_same_run(remote, run_dir, steps), _warn)
        return
    # From here on a store that fails ends the launch: to go on without newer steps that it has would set them aside.
    require_same_run(remote, run_dir, steps)
    newer = [step for step in steps if step > newest and not is_set_aside(remote, step, run_dir)]
    if newer:
        _bring_own(remote, newer, run_dir, lock)


def _bring_own(remote: Remote, steps: list[int], run_dir: Path, lock: RunLock | None) -> None:
    if lock is None:
        say(f"{remote.url} has newer checkpoints than {run_dir}; a dry run fetches none and begins without them")
        return
    _claim(run_dir, lock)
    if fetch_newest(remote, steps, run_dir, _warn) is None and not committed_steps(run_dir):
        raise CorruptError(f"{remote.url}: none of its checkpoints is good; nothing to resume from")


def _claim(run_dir: Path, lock: RunLock) -> None:
    try:
        make_folder(run_dir)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written: {error.strerror}; choose another run.dir") from error
    lock.acquire()


def local_checkpoint(path: Path | str) -> Path:
    """PATH of the verbs as a folder of this machine: of a URL, the checkpoint (of a run, its best, else its latest) is
    fetched into the cache, unless it lies there.

    Raises:
        UserError: there is no checkpoint, or it cannot be fetched.
        CorruptError: it is damaged.
    """
    if not is_url(path):
        return Path(path)
    url = str(path).rstrip("/")
    return _fetch_named(url, cache_folder("checkpoints", _run_url(url)))


def _fetch_named(url: str, into: Path, *, newest: bool = False) -> Path:
    """Bring the checkpoint that a URL names: a step, or a run, of which the newest good or the best is meant."""
    lock = FileLock(into.with_name(f"{into.name}.lock"))
    remote, step = Remote(_run_url(url)), step_of(url.rpartition("/")[2])
    sizes = remote.sizes()
    steps = remote_steps(sizes)
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{url}: no finished checkpoint there; give the URL of a run or of one of its step-* folders")
    into.mkdir(parents=True, exist_ok=True)
    with lock.held(lambda holder: say(f"waiting: {holder} is fetching {url} ({lock.path})")):
        if step is None and newest:
            if (folder := fetch_newest(remote, steps, into, _warn)) is None:
                raise CorruptError(f"{url}: none of its checkpoints is good")
            return folder
        if step is None:
            step = remote_link(remote, BEST, sizes)
        return fetch_step(remote, steps[-1] if step is None else step, into)


def _run_url(url: str) -> str:
    folder, _, name = url.rpartition("/")
    return folder if step_of(name) is not None else url


def _warn(text: str) -> None:
    say(f"warning: {text}")
