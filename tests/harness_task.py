"""Tasks of lm-evaluation-harness that lie in a folder of the test: their data beside them, and no hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

QUESTIONS: list[dict[str, Any]] = [
    {"question": "The cat sat on", "choices": [" a mat.", " ffff.", " mm."], "answer": 0},
    {"question": "Who had come", "choices": [" mrrd", " home with"], "answer": 1},
    {"question": "then it", "choices": [" ran to", " rrr"], "answer": 0},
]


def write_tasks(folder: Path) -> dict[str, Path]:
    """A task of each kind of request: multiple choice, a text's perplexity, and writing on."""
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
    }  # fmt: skip
    tasks = {
        "cats": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "perplexity": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question * 8}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "writing": {
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    paths = {}
    for name, task in tasks.items():
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump({"task": f"own_{name}", **common, **task}))
    return paths
