"""What a process asks of the machine that it is on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATE = """
import mmap
from pathlib import Path
import torch
from llmtrain.engine import make_engine

BYTES = 1 << 28

def is_mostly_in_large_pages():
    (held,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "AnonHugePages" in line)
    return int(held.split()[1]) * 1024 >= BYTES // 2

with mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as asked_for:
    asked_for.madvise(mmap.MADV_HUGEPAGE)
    for page in range(0, BYTES, mmap.PAGESIZE):
        asked_for[page] = 1
    print(is_mostly_in_large_pages())
make_engine(30.0)
kept = torch.ones(BYTES // 4)
print(is_mostly_in_large_pages())
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="large pages for nobody, or for all"
)
@pytest.mark.parametrize(("given", "is_large"), [(None, True), ("0", False)])
def test_large_tensors_lie_in_large_pages_unless_the_user_has_said_otherwise(given: str | None, is_large: bool) -> None:
    environment = without_settings()
    environment |= {"THP_MEM_ALLOC_ENABLE": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    has_any, found = done.stdout.split()
    if has_any == "False":
        pytest.skip("the machine's memory is in too many pieces for large pages")
    assert found == str(is_large)


@pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are those of another library")
@pytest.mark.parametrize(
    ("given", "turns"),
    [({}, "50000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_sleep_after_a_short_wait_unless_the_user_has_said_otherwise(given: dict[str, str], turns: str) -> None:
    """As the library says that runs torch's threads."""
    environment = without_settings() | given | {"OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, "-c", "from llmtrain.engine import make_engine"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert f"GOMP_SPINCOUNT = '{turns}'" in done.stderr


STEPS = """
import resource, sys
import torch
from llmtrain.engine import make_engine

make_engine(30.0)

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (1 << 24, 1 << 18, 1 << 22):  # 67 MB, 1 MB, 17 MB
        torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# Where the kernel put the heap decides for how many steps (up to 16 of 60 starts) freed pieces fall into place.
faults = [step() for _ in range(60)]
print(faults, file=sys.stderr)
print(max(faults[-8:]) < 50)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(("given", "is_kept"), [(None, True), ("MALLOC_ARENA_MAX", False)])
def test_freed_memory_is_kept_for_the_next_step_unless_the_user_has_set_malloc_up(
    given: str | None, is_kept: bool
) -> None:
    environment = without_settings() | ({given: "4"} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == f"{is_kept}\n", done.stderr


START = """
import os
from pathlib import Path
import torch
from llmtrain.engine import make_engine
from llmtrain.engine.device import give_back_memory

make_engine(30.0)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = resident()
only_to_start, stays = torch.ones(1 << 26), torch.ones(1 << 20)
del only_to_start
kept = resident() - before
give_back_memory()
print(kept > 1 << 28, resident() - before < 1 << 25)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_only_needed_to_start_is_given_back_when_that_is_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START], env=without_settings(), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "True True\n", done.stderr


def without_settings() -> dict[str, str]:
    """The environment of somebody who has said nothing about memory and threads."""
    own = ("THP_MEM_ALLOC_ENABLE", "MALLOC_", "GLIBC_TUNABLES", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    return {key: value for key, value in os.environ.items() if not key.startswith(own)}
