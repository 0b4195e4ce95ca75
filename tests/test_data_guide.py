"""The recipe of docs/data.md for near copies and heavy filtering runs as it stands there, with the real datatrove."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from llmtrain.data.shards import TOKENIZER_FOLDER, TokenDataset
from llmtrain.data.tokenizer import load_tokenizer
from tests.conftest import Command

GUIDE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def paragraphs() -> list[str]:
    """Forty different documents that a filter takes for English prose, of words from Python's own manual."""
    words = sorted({word for text in topics.values() for word in re.findall(r"\b[a-z]{4,9}\b", text)})
    generator, texts = np.random.default_rng(0), []
    for _ in range(40):
        sentences = [
            "The {} of the {} and that {} have {} with the {} to be {}.".format(*generator.choice(words, 6))
            for _ in range(12)
        ]
        texts.append(" ".join(sentences))
    return texts


def documents_of(folder: Path) -> list[str]:
    data = TokenDataset(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    stream = data.split("train")
    ids = stream.gather(np.array([0]), len(stream))[0]
    return [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1) if len(part)]


@pytest.mark.slow
def test_near_copies_and_what_is_no_text_are_gone_and_the_rest_is_prepared(tmp_path: Path, llmtrain: Command) -> None:
    (recipe,) = re.findall(r"^```python recipe\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "near_copies.py").write_text(recipe)
    originals = paragraphs()
    near = [f"Printed on the 4th of May. {text} All rights reserved." for text in originals[::2]]
    junk = ["buy now " * 200, "}{ ;; == <> " * 50, "too short"]
    (tmp_path / "in").mkdir()
    for number, texts in enumerate([originals[:20] + junk, near + originals[20:]]):
        lines = "".join(f"{json.dumps({'text': text})}\n" for text in texts)
        (tmp_path / "in" / f"{number}.jsonl").write_text(lines)
    command = [sys.executable, "near_copies.py", "in", "cleaned", "2"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    prepared = llmtrain(
        "prepare", "--input", "cleaned/*.jsonl.gz", "--tokenizer", "byte", "--val-split", 0, "--out", "data"
    )
    assert prepared.returncode == 0, prepared.stderr
    kept = documents_of(tmp_path / "data")
    assert len(set(kept)) == len(kept) and not set(kept) & {text.strip() for text in junk}
    assert set(kept) <= {*originals, *near}
    # Of an original and its near copy one is there.
    pairs = [(text in kept) + (copy in kept) for text, copy in zip(originals[::2], near, strict=True)]
    assert pairs == [1] * 20
    assert set(originals[1::2]) <= set(kept)
