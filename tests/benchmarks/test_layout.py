"""The cluster layout in docs/data.md is what its formulas say, and the formulas are what prepared data is."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import RESULTS
from benchmarks.layout import BEGIN, DOCS, END, OUTLINE_BYTES, PAGE, Layout, in_docs
from benchmarks.synthetic import write_virtual_data
from llmtrain.data.batches import Windows
from llmtrain.data.corpus import CHUNK_BYTES, Position
from llmtrain.data.shards import MANIFEST, TokenDataset
from llmtrain.data.survey import OUTLINES, Outline, coarsened


def test_the_table_in_the_docs_is_that_of_the_formulas() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert in_docs(text, Layout().table()) == text


def test_the_formulas_are_what_prepared_data_of_that_size_is(tmp_path: Path) -> None:
    """Its shards are sparse, all else is real."""
    layout = Layout(tokens=10**12, shard_tokens=1 << 33, document_tokens=1 << 33, seq_len=4096)
    folder = write_virtual_data(tmp_path / "data", layout.tokens, layout.shard_tokens)
    assert len(list(folder.glob("train-*.bin"))) == layout.shards
    assert sum(file.stat().st_size for file in folder.glob("train-*.bin")) == layout.ids_bytes
    # Without the tokenizer and the recipe, which do not grow.
    assert (folder / MANIFEST).stat().st_size == pytest.approx(layout.manifest_bytes, rel=0.02, abs=1500)
    windows = Windows(TokenDataset(folder).split("train"), layout.seq_len, layout.seq_len)
    assert len(windows) == layout.windows
    assert windows.gather(np.array([0])).numpy().nbytes == layout.window_bytes


@pytest.mark.parametrize(("seq_len", "itemsize"), [(1024, 2), (1000, 2), (4096, 4), (300, 2)])
def test_the_pages_of_a_window_are_counted(seq_len: int, itemsize: int) -> None:
    layout = Layout(seq_len=seq_len, itemsize=itemsize)
    begins = np.arange(PAGE) * seq_len * itemsize
    pages = (begins + layout.window_bytes - 1) // PAGE - begins // PAGE + 1
    assert layout.pages == pytest.approx(pages.mean(), rel=1e-3)


def test_the_rates_are_those_that_were_measured() -> None:
    *rows, _ = json.loads((RESULTS / "dealing.json").read_text())["rows"]
    measured = {row["input"]: (row["survey, MB/s"] * 1e6, row["deal, MB/s"] * 1e6) for row in rows}
    assert {kind: pytest.approx(rates, rel=0.01) for kind, rates in measured.items()} == {
        "jsonl": (Layout.counting_rate, Layout.jsonl_rate),
        "jsonl.zst": (Layout.zst_counting_rate, Layout.zst_rate),
        "parquet": (Layout.footers_rate, Layout.parquet_rate),
    }


def test_all_workers_are_fed_by_so_many_parts_and_not_by_fewer() -> None:
    layout = Layout()
    for rate in (layout.parquet_rate, layout.jsonl_rate, layout.zst_rate, layout.worker_rate / 2):
        fed, parts = layout.fed(rate), layout.parts(rate)
        assert fed * parts >= layout.workers > fed * (parts - 1)
        assert fed == 1 or fed * layout.worker_rate <= rate < (fed + 1) * layout.worker_rate
    fed, parts = layout.fed(layout.parquet_rate), layout.parts(layout.parquet_rate)
    assert f"sbatch --array=0-{parts - 1} --cpus-per-task={fed} slurm/prepare-array.sbatch" in DOCS.read_text("utf-8")
    assert f"--part 1/{layout.parts(layout.jsonl_rate)} --workers {layout.plan_workers}" in DOCS.read_text("utf-8")


def test_an_outline_takes_the_memory_that_is_said() -> None:
    tracemalloc.start()
    begins = range(0, 100 * OUTLINES, 100)
    held = coarsened(Outline(Position(300, CHUNK_BYTES * at, at, 10**9 + at), CHUNK_BYTES + at) for at in begins)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(held) == OUTLINES and all(one.start.place < other.start.place for one, other in pairwise(held))
    assert taken / OUTLINES == pytest.approx(OUTLINE_BYTES, rel=0.1)


def test_memory_of_the_plan_is_bounded_for_files_of_any_size() -> None:
    few, many = Layout(source_file_bytes=10**15), Layout(source_file_bytes=10**12)
    assert few.source_files == 1 and few.plan_bytes == OUTLINES * OUTLINE_BYTES
    assert many.source_files == 40 and many.plan_bytes == 40 * few.plan_bytes
    assert Layout(tokens=10**15).plan_bytes == Layout(tokens=10**14).plan_bytes
