"""The reference and the schema for editors are the code's; the schema says what `load_config` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from docs import reference
from llmtrain.config import load_config, make_config
from llmtrain.errors import UserError

ROOT = Path(__file__).parents[1]
SCHEMA = reference.schema()
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_reference_is_what_the_code_says() -> None:
    assert reference.REFERENCE.read_text(encoding="utf-8") == reference.reference(), "run: python -m docs.reference"


def test_the_schema_is_what_the_code_says() -> None:
    assert json.loads(reference.SCHEMA.read_text(encoding="utf-8")) == SCHEMA, "run: python -m docs.reference"
    Draft202012Validator.check_schema(SCHEMA)


def test_every_key_and_field_and_argument_has_a_meaning() -> None:
    for name, section in SCHEMA["$defs"].items():
        for key, facts in section["properties"].items():
            assert len(facts.get("description", "")) > 5, f"{name}.{key}"
    rows = [line for line in reference.reference().splitlines() if line.startswith("| ")]
    assert len(rows) > 150
    for row in rows:
        assert all(cell.strip() for cell in row.split(" | ")[:2]), row


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_find_the_schema_of_every_shipped_config_and_it_fits(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert (path.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve() == reference.SCHEMA
    Draft202012Validator(SCHEMA).validate(yaml.safe_load(load_config(path).to_yaml()))  # also as a run folder has it
    Draft202012Validator(SCHEMA).validate(_as_editors_read(path.read_text(encoding="utf-8")))


def _as_editors_read(text: str) -> Any:
    """YAML 1.2, in which 1e-3 is a number; PyYAML takes it for a text."""
    from llmtrain.config import _Loader

    return yaml.load(text, Loader=_Loader)


@pytest.mark.parametrize("raw", [
    {}, {"model": None}, {"model": {"preset": "7b", "dropout": 0.1}}, {"optimizer": {"lr": "auto"}},
    {"optimizer": {"clip_norm": None, "betas": [0.9, 0.99]}}, {"checkpoint": {"max_bytes": "1.5TiB"}},
    {"checkpoint": {"max_bytes": 10**12}}, {"training": {"compile": True, "profile": {"start": 5}}},
    {"data": {"sources": [{"path": "a", "weight": 1}, {"path": "b", "weight": {0: 1.0, 500: 2}}]}},
])  # fmt: skip
def test_what_is_a_config_is_one_for_an_editor(raw: dict[str, Any]) -> None:
    make_config(raw)
    Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(raw)))  # whose keys are texts


@pytest.mark.parametrize("raw", [
    {"modell": {}}, {"model": {"layer": 3}}, {"model": 3}, {"model": {"preset": "9b"}}, {"model": {"dim": 0}},
    {"model": {"dim": "wide"}}, {"optimizer": {"lr": "fast"}}, {"optimizer": {"lr": -1}},
    {"optimizer": {"name": "lion"}}, {"training": {"compile": "maybe"}}, {"training": {"epochs": True}},
    {"checkpoint": {"max_bytes": "much"}}, {"data": {"sources": [{"path": "a"}]}}, {"health": {"max_skips": 0.5}},
])  # fmt: skip
def test_what_is_no_config_is_underlined_by_an_editor(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        make_config(raw)
    assert not Draft202012Validator(SCHEMA).is_valid(raw)
