"""Write reference.md and config.schema.json from the code: `python -m docs.reference`.

Keys and their meaning come out of llmtrain/sections.py, verbs out of their parsers, the fields of a record out of
llmtrain/observe/record.py, exit codes out of llmtrain/errors.py. A test holds both files equal to what is made here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel

from llmtrain.cli import VERBS
from llmtrain.config import (
    ProfileSection,
    RopeScalingSection,
    RunConfig,
    SourceSection,
    ValidationSection,
    make_config,
)
from llmtrain.errors import DEBUG, LlmtrainError
from llmtrain.model.cost import parameter_count
from llmtrain.observe.metrics import ARRAY_SOURCES
from llmtrain.observe.record import COLUMNS, Record, SetRecord, SourceRecord
from llmtrain.observe.sinks import scalars
from llmtrain.presets import PRESETS
from llmtrain.resolve import resolve

REFERENCE = Path(__file__).with_name("reference.md")
SCHEMA = Path(__file__).with_name("config.schema.json")
VOCAB_SIZE, SEQ_LEN = 50_304, 2048
NESTED = ("sources", "validation")  # fields of a record that have fields of their own


def schema() -> dict[str, Any]:
    """The JSON schema of a config file (draft 2020-12): what an editor completes, explains and underlines."""
    made = _without_titles(RunConfig.model_json_schema())
    for name, section in made["properties"].items():
        # `model:` with nothing under it is an empty section.
        made["properties"][name] = {"anyOf": [{"$ref": section["$ref"]}, {"type": "null"}]}
    about = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmtrain config",
        "description": "Made by `python -m docs.reference`. Put a line `# yaml-language-server: $schema=…/"
        "config.schema.json` at the top of a YAML file, and editors complete and check its keys.",
    }
    return {**made, **about}


def _without_titles(node: Any) -> Any:
    """Pydantic names everything twice; and what was wrapped in the source is one line."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: _without_titles(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))
    }
    if isinstance(kept.get("description"), str):
        kept["description"] = _flat(kept["description"])
    return kept


def _flat(text: str) -> str:
    return " ".join(text.split())


def reference() -> str:
    """The text of reference.md."""
    parts = [
        "# Reference",
        "Made from the code by `python -m docs.reference`; a test holds it equal. "
        "[Config](#config) · [sizes](#sizes) · [verbs](#verbs) · [metrics](#metrics) · [exit codes](#exit-codes)",
        *_config(),
        *_sizes(),
        *_verbs(),
        *_metrics(),
        *_exit_codes(),
    ]
    return "\n\n".join(parts) + "\n"


def _config() -> Iterator[str]:
    yield "## Config"
    yield (
        "One YAML file; `section.key=value` on the command line wins over it. An unknown key is an error that names "
        "the nearest known one. [config.schema.json](config.schema.json) is the same for editors: files in `configs/` "
        "name it in their first line."
    )
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        yield from _section(f"### `{name}:`", field.annotation)
    yield from _section("### `training.profile`", ProfileSection)
    yield from _section("### `model.rope_scaling`", RopeScalingSection)
    yield from _section("### Each of `data.sources`", SourceSection)
    yield from _section("### Each of `data.validation`", ValidationSection)


def _section(heading: str, section: type[BaseModel]) -> Iterator[str]:
    yield heading
    yield _flat(section.__doc__ or "")
    rows = [
        (f"`{key}`", _default(facts), _kind(facts), _flat(facts["description"]))
        for key, facts in section.model_json_schema()["properties"].items()
    ]
    yield _table(("key", "default", "value", "meaning"), rows)


def _default(facts: dict[str, Any]) -> str:
    return f"`{_value(facts['default'])}`" if "default" in facts else "(must be given)"


def _value(value: Any) -> str:
    """As one would write it in YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return (
        f"{value:g}"
        if isinstance(value, float)
        else json.dumps(value)
        if not isinstance(value, str)
        else (value if re.fullmatch(r"[\w./-]+", value) else json.dumps(value))
    )


_WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _kind(facts: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "anyOf" in facts:
        return ", ".join(map(_kind, facts["anyOf"]))
    if choices := facts.get("enum") or [facts[name] for name in ("const",) if name in facts]:
        return ", ".join(f"`{choice}`" for choice in choices)
    if facts.get("type") == "array":
        return f"list of {_kind(facts.get('prefixItems', [facts.get('items')])[0])}"
    if facts.get("type") == "object":
        return f"or such by step: {_kind(facts['additionalProperties'])}"
    return _scalar(facts) if "type" in facts else "keys (see below)"


def _scalar(facts: dict[str, Any]) -> str:
    # A bound such as 2^63 is the file format's and not the reader's.
    bounds = [
        f"{sign} {facts[bound]:.12g}" for bound, sign in _BOUNDS.items() if bound in facts and facts[bound] < 2**60
    ]
    examples = [f"such as `{example}`" for example in facts.get("examples", [])[:1]]
    return " ".join([_WORDS[facts["type"]], *[" and ".join(bounds)][: len(bounds)], *examples])


def _sizes() -> Iterator[str]:
    yield "## Sizes"
    yield (
        f"`model.preset`, with all parameters at a vocabulary of {VOCAB_SIZE:,} (the small ones are named after what "
        "they have at a small one)."
    )
    rows = []
    for name in PRESETS:
        config = make_config({"model": {"preset": name}, "data": {"seq_len": SEQ_LEN}})
        model = resolve(config, vocab_size=VOCAB_SIZE, world_size=1, bf16_native=True, compile_auto=True).model
        tied = "yes" if model.tie_embeddings else "no"
        sizes = [model.dim, model.layers, model.heads, model.kv_heads, model.ff_dim]
        rows.append((f"`{name}`", f"{parameter_count(model, SEQ_LEN) / 1e6:,.1f}M", *map(str, sizes), tied))
    yield _table(("preset", "parameters", "`dim`", "`layers`", "`heads`", "`kv_heads`", "`ff_dim`", "tied"), rows)


def _verbs() -> Iterator[str]:
    yield "## Verbs"
    yield (
        "`llmtrain VERB …` = `python -m llmtrain VERB …` = `python -m llmtrain.VERB …`. Each has `--help`, "
        f"and `{DEBUG}`, which shows a traceback also where the input is wrong."
    )
    for verb in VERBS:
        parser = importlib.import_module(f"llmtrain.{verb}").parser()
        yield f"### `llmtrain {verb}`"
        yield parser.description
        yield f"```\n{textwrap.dedent(parser.epilog.removeprefix('example:')).strip()}\n```"
        actions = [action for action in parser._actions if not {"--help", DEBUG} & set(action.option_strings)]
        formatter = argparse.HelpFormatter(parser.prog)
        yield _table(
            ("argument", "meaning"),
            [(f"`{_invocation(action)}`", formatter._expand_help(action)) for action in actions],
        )


def _invocation(action: argparse.Action) -> str:
    """As it is typed."""
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    words = list(action.option_strings[-1:]) if action.option_strings else []
    if action.nargs != 0:
        words.append(str(value))
    return " ".join(words) + (" …" if action.nargs in ("*", "+") else "")


def _metrics() -> Iterator[str]:
    yield "## Metrics"
    yield (
        "Each line of `metrics.jsonl` is a record with these fields, and each row of `training_log.csv` all but "
        "sources and validation. A number that is not finite is null. On dashboards (TensorBoard, W&B) they have the "
        "names on the right."
    )
    meanings = {name: hint.__metadata__[0] for name, hint in _hints(Record).items()}
    meanings["perplexity"] = str(Record.perplexity.__doc__).rstrip(".")
    dashboards = _dashboard_names()
    rows = [(f"`{name}`", meanings[name], dashboards.get(name, "")) for name in (*COLUMNS, *NESTED)]
    yield _table(("field", "meaning", "on dashboards"), rows)
    for nested, kind, tag in (("sources", SourceRecord, "source"), ("validation", SetRecord, "val")):
        yield f"Of each of the `{nested}`:"
        fields = [(f"`{name}`", hint.__metadata__[0], f"`{tag}/NAME/{name}`") for name, hint in _hints(kind).items()]
        yield _table(("field", "meaning", "on dashboards"), fields)
    arrays = ", ".join(
        f"`{name}`" + (f" (`{source}`)" if name != source else "") for name, source in ARRAY_SOURCES.items()
    )
    yield f"`training_metrics.json` holds arrays of equal length of these fields: {arrays}."


def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _dashboard_names() -> dict[str, str]:
    """By field, found by telling each a number of its own."""
    names = [name for name in _hints(Record) if name not in NESTED]
    told = {name: float(place + 2) for place, name in enumerate(names)}
    shown = scalars(Record(**told))  # type: ignore[arg-type]  # numbers that tell where they came from
    found = {field: [tag for tag, value in shown.items() if value == number] for field, number in told.items()}
    found["perplexity"] = ["train/perplexity"]
    found["val_loss"].append("val/perplexity")
    assert sorted(tag for tags in found.values() for tag in tags) == sorted(shown)
    return {field: ", ".join(f"`{tag}`" for tag in tags) for field, tags in found.items()}


def _exit_codes() -> Iterator[str]:
    yield "## Exit codes"
    ours = {kind.exit_code: str(kind.__doc__) for kind in LlmtrainError.__subclasses__()}
    others = {
        0: "Done, early stopping included.",
        1: "A fault of ours, with its traceback.",
        130: "Interrupted at once.",
    }
    yield _table(("code", "meaning"), [(str(code), text) for code, text in sorted({**ours, **others}.items())])
    yield (
        "`llmtrain` and `python -m llmtrain.VERB` give them as they are; `accelerate launch` answers 1 to every end "
        "but 0. `LLMTRAIN_EXIT_CODE_FILE=PATH` has the first process of each machine write the real one there."
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
    SCHEMA.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
