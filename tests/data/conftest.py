"""Shared by the tests of data."""

from __future__ import annotations

import pytest

from llmtrain.data.corpus import cut_into_chunks
from llmtrain.data.survey import survey


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two kilobytes, so that a small input has as many as a large one."""
    monkeypatch.setattr(cut_into_chunks, "__defaults__", (2000,))
    monkeypatch.setattr(survey, "__defaults__", (2000,))
