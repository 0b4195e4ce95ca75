"""What the system allows a process: open files, locked and shared memory; and how fast a disk takes a checkpoint."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from llmtrain.checkpoint.direct_io import PIECE_BYTES, DirectFile, aligned_piece
from llmtrain.health.finding import Finding, ok, warn
from llmtrain.observe.formats import compact

SHARED = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
# NCCL and data workers exchange through shared memory; a container has 64 MiB of it unless told otherwise.
LITTLE_SHARED_BYTES = 1 << 30
FEW_FILES = 1024  # up to 256 shards of each source are open, and each worker and connection takes some
PROBE = ".llmtrain-doctor-"  # begins the name of what is written to try, and is gone at once
_PROBE_BYTES = 16 * PIECE_BYTES
_PROBE_S = 2.0
SLOW_DISK = 50e6  # bytes a second: a checkpoint of 124M parameters takes half a minute


def limit_findings(has_gpu: bool) -> Iterator[Finding]:
    """Look at the limits of this process."""
    yield from _shared_memory(has_gpu)
    yield _open_files()
    yield _locked_memory()


def _shared_memory(has_gpu: bool) -> Iterator[Finding]:
    if not SHARED.is_dir():
        return  # macOS has none
    usage = shutil.disk_usage(SHARED)
    detail = f"{SHARED}: {usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB free"
    if usage.free >= LITTLE_SHARED_BYTES:
        yield ok("shared memory", detail)
        return
    matters = "NCCL and data.workers" if has_gpu else "data.workers"
    yield warn("shared memory", f"{detail}; {matters} may fail: free some, or start the container with --shm-size=8g")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"up to {_amount(soft)} in a process"
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        return ok("open files", detail)
    return warn("open files", f"{detail}, which many shards or ranks may exceed; ulimit -n {_amount(hard)}")


def _locked_memory() -> Finding:
    """InfiniBand's adapters read and write memory that is locked for them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_infiniband = INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
    detail = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 1e6:.1f} MB"
    if not has_infiniband:
        return ok("locked memory", f"{detail}; no InfiniBand here that would need it")
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", detail)
    return warn(
        "locked memory",
        f"{detail}, too little for InfiniBand; ulimit -l unlimited (limits.conf; --ulimit memlock=-1 for a container)",
    )


def _amount(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def write_speed(folder: Path) -> float:
    """Bytes a second that a file in `folder` takes, written as checkpoints are; it is gone afterwards.

    Raises:
        OSError: it cannot be written there, or there is no room.
    """
    piece = aligned_piece()
    piece[:] = 171  # a file system may leave out what is zero
    with tempfile.TemporaryDirectory(dir=folder, prefix=PROBE) as scratch:
        written, began = 0, time.perf_counter()
        with DirectFile(Path(scratch) / "probe", os.O_WRONLY | os.O_CREAT) as file:
            while written < _PROBE_BYTES and time.perf_counter() - began < _PROBE_S:
                file.write(piece.data)
                written += piece.nbytes
            os.fsync(file.descriptor)
        return written / (time.perf_counter() - began)


def disk_finding(folder: Path, checkpoint_bytes: float | None = None, grace_s: float | None = None) -> Finding:
    """Whether checkpoints can be written fast enough there.

    Args:
        folder: exists.
        checkpoint_bytes: of one checkpoint; None: not known.
        grace_s: seconds that a run has to save when it is told to stop; None: any.
    """
    try:
        speed = write_speed(folder)
    except OSError as error:
        return warn("disk speed", f"{folder}: not measured: {error.strerror or error}")
    detail = f"{folder}: {speed / 1e6:,.0f} MB/s written past the page cache"
    if checkpoint_bytes is None:
        return ok("disk speed", detail) if speed >= SLOW_DISK else warn("disk speed", f"{detail}; choose a faster one")
    seconds = checkpoint_bytes / speed
    detail += f"; a checkpoint of {compact(checkpoint_bytes)}B takes one process about {seconds:,.1f} s"
    if grace_s is None or seconds <= grace_s:
        return ok("disk speed", detail)
    return warn(
        "disk speed",
        f"{detail}, and health.grace_s is {grace_s:g}: a run that is told to stop may not save in time; raise it as far"
        " as your cluster waits, or choose a faster disk",
    )
