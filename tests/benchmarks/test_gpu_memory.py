"""The formulas of memory against what torch's allocator held, as it was measured."""

import json
from typing import Any

import pytest
import torch

from benchmarks.common import ROOT
from benchmarks.gpu_memory import DEFAULTS, config_of, main, rows
from llmtrain.errors import run_main
from llmtrain.model.peak import peak_of_run

RESULT = ROOT / "benchmarks/results/gpu_memory.json"
*MEASURED, FACTS = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]


def test_all_rows_were_measured() -> None:
    assert [{key: row[key] for key in DEFAULTS} for row in MEASURED] == [
        {key: {**DEFAULTS, **row}[key] for key in DEFAULTS} for row in rows(FACTS["ranks"])
    ]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "-".join(str(row[key]) for key in ("size", *DEFAULTS)))
def test_a_gpu_holds_what_the_formulas_say_within_ten_percent(row: dict[str, Any]) -> None:
    """What is said today, of what was held then."""
    ranks = row["ranks"]
    peak = peak_of_run(config_of(row, ranks), engine=row["engine"], world_size=ranks)
    assert row["peak GB"] == pytest.approx(peak.bytes / 1e9, rel=0.1)
    assert (peak.bytes / 1e9, peak.moment) == (pytest.approx(row["predicted GB"], rel=1e-6), row["at"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, []) == 2
    assert "python -m benchmarks.cuda_standin COMMAND" in capsys.readouterr().err
