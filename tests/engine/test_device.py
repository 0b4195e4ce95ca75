"""What a process asks of the machine that it is on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATE = """
import os, sys
from pathlib import Path
import torch
from llmtrain.engine import make_engine

make_engine(30.0)
kept = torch.ones(1 << 26)
(held,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "AnonHugePages" in line)
print(int(held.split()[1]) * 1024 >= kept.nbytes // 2)
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="large pages for nobody, or for all"
)
@pytest.mark.parametrize(("given", "is_large"), [(None, True), ("0", False)])
def test_large_tensors_lie_in_large_pages_unless_the_user_has_said_otherwise(given: str | None, is_large: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == f"{is_large}\n", done.stderr
