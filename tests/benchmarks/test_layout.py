"""The cluster layout in docs/data.md is what its formulas say, and the formulas are what prepared data is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.layout import BEGIN, DOCS, END, PAGE, Layout, in_docs
from benchmarks.synthetic import write_virtual_data
from llmtrain.data.batches import Windows
from llmtrain.data.shards import MANIFEST, TokenDataset


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
