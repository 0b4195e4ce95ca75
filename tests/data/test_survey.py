"""What is known at once of an input of any size is bounded, and the stretches of the parts are still all of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data import parts
from llmtrain.data.corpus import Position, ReadOptions, cut_into_chunks
from llmtrain.data.files import find_files
from llmtrain.data.parts import prepare_part
from llmtrain.data.plan import PartsFolder, Stretch, cut_evenly
from llmtrain.data.survey import OUTLINES, Outline, coarsened, survey
from llmtrain.prepare import Options, prepare
from tests.data.inputs import content, every_kind_of_file, lines


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Every kind of file; of small chunks, most have dozens."""
    return every_kind_of_file(tmp_path / "texts", 400, 400)


def numbers_of(stretches: tuple[Stretch, ...]) -> list[int]:
    """Of chunks whose number is their place."""
    return [place for s in stretches for place in range(s.start.place, s.start.place + s.chunks)]


@given(
    sizes=st.lists(st.integers(0, 3) | st.integers(0, 50), max_size=200),
    most=st.integers(4, 40),
    count=st.integers(1, 12),
)
def test_coarse_outlines_are_few_and_their_stretches_all_chunks_in_order(
    sizes: list[int], most: int, count: int
) -> None:
    outlines = [Outline(Position(place=i), size) for i, size in enumerate(sizes)]
    groups = coarsened(iter(outlines), most)
    assert len(groups) <= most
    assert groups == outlines or len(outlines) > most
    begins = list(accumulate(sizes, initial=0))
    for group in groups:
        first = group.start.place
        assert group.source_bytes == begins[first + group.chunks] - begins[first]
        assert group.chunks == 1 or group.source_bytes <= 4 * sum(sizes) / most
    stretches, exact = cut_evenly(groups, sum(sizes), count), cut_evenly(outlines, sum(sizes), count)
    assert numbers_of(stretches) == numbers_of(exact) == list(range(len(sizes)))
    largest = max((group.source_bytes for group in groups), default=0)
    assert all(abs(s.source_bytes - sum(sizes) / count) <= largest for s in stretches)


def test_no_more_outlines_than_that_are_held_while_they_come() -> None:
    """Of twenty times as many."""
    alive = peak = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def outlines() -> Iterator[Outline]:
        nonlocal alive, peak
        for number in range(20 * most):
            outline = Outline(Position(place=number), 4)
            weakref.finalize(outline, gone)
            alive += 1
            peak = max(peak, alive)
            yield outline

    most = 1000
    groups = coarsened(outlines(), most)
    assert most / 4 < len(groups) <= most
    assert peak <= most + 2


@pytest.mark.parametrize("most", [4, 9, OUTLINES])
def test_a_file_of_more_chunks_is_told_of_in_groups_each_of_which_begins_at_a_chunk(
    texts: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(coarsened, "__defaults__", (most,))
    files, reading = find_files([str(texts)]), ReadOptions()
    chunks = list(cut_into_chunks(files, reading))
    outlines = list(survey(files, reading, 1))
    number = 0
    for outline in outlines:
        group = chunks[number : number + outline.chunks]
        assert (outline.start, outline.source_bytes) == (group[0].start, sum(chunk.source_bytes for chunk in group))
        number += outline.chunks
    assert number == len(chunks)
    of_each_file = [sum(outline.start.file == file for outline in outlines) for file in range(len(files))]
    assert max(of_each_file) <= most
    assert (len(outlines) < len(chunks)) == (most < OUTLINES)


@pytest.mark.parametrize("kind", ["files", "dataset", "both"])
def test_parts_of_coarse_outlines_are_together_byte_for_byte_what_one_process_makes(
    texts: Path, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    inputs = [str(texts)] if kind != "dataset" else []
    if kind != "files":
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for number in range(3):
            (folder := tmp_path / "set").mkdir(exist_ok=True)
            (folder / f"{number}.jsonl").write_bytes(lines(300, f"example of {number}"))
        inputs.append(f"hf:{tmp_path / 'set'}")
    monkeypatch.setattr(coarsened, "__defaults__", (12,))
    options = Options(tuple(inputs), tmp_path / "one", "byte", shard_tokens=5000, workers=1)
    prepare(options)
    parted = replace(options, out=tmp_path / "parts")
    prepare_part(parted, 1, 3, say=print)
    stretches = PartsFolder(tmp_path / "parts").read_plan().stretches
    number_of_chunks = sum(1 for _ in cut_into_chunks(options.find().files, ReadOptions()))
    assert sum(stretch.chunks for stretch in stretches) == number_of_chunks > 3 * 12
    mean = sum(stretch.source_bytes for stretch in stretches) / 3
    assert all(0.5 * mean < stretch.source_bytes < 1.5 * mean for stretch in stretches)
    for number in (3, 2):
        prepare_part(parted, number, 3, say=print)
    assert content(tmp_path / "parts") == content(tmp_path / "one")


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_a_plan_is_made_without_holding_the_outlines_of_all_files(
    tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Those of one file at a time are there; and where the size of the input is not known before, a few more."""
    if kind == "dataset":
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder := tmp_path / "texts").mkdir()
    for number in range(12):
        (folder / f"{number:02}.jsonl").write_bytes(lines(200, "line"))
    most, alive, peak, total = 20, 0, 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def watched(*arguments: Any) -> Iterator[Outline]:
        nonlocal alive, peak, total
        for outline in survey(*arguments):
            weakref.finalize(outline, gone)
            alive, total = alive + 1, total + 1
            peak = max(peak, alive)
            yield outline

    monkeypatch.setattr(coarsened, "__defaults__", (most,))
    monkeypatch.setattr(parts, "survey", watched)
    source = f"hf:{folder}" if kind == "dataset" else str(folder)
    prepare_part(Options((source,), tmp_path / "out", "byte", workers=1), 1, 2, say=print)
    assert total >= 4 * most
    assert peak <= (most + 2 if kind == "dataset" else 2)
