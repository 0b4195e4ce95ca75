"""One YAML file and dotted overrides become one frozen, validated `RunConfig`; llmtrain/sections.py has its keys.

`load_config` reads and checks what the file alone can tell; `llmtrain/resolve.py` settles what depends on the data and
the machine. A resolved config that is written to the run folder and read again gives the same run.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llmtrain.errors import UserError, nearest
from llmtrain.hf_config import FOLDER_KEYS, folder_config, sizes_from_folder
from llmtrain.presets import AUTO_LR, PRESETS, auto_lr
from llmtrain.sections import (
    CheckpointSection,
    DataSection,
    HealthSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ProfileSection,
    RopeScalingSection,
    RunConfig,
    RunSection,
    ScheduleSection,
    Section,
    SourceSection,
    TrainingSection,
    ValidationSection,
)

# Whoever uses a config finds all of it here.
__all__ = [
    "CheckpointSection",
    "DataSection",
    "HealthSection",
    "LoggingSection",
    "ModelSection",
    "OptimizerSection",
    "ProfileSection",
    "RopeScalingSection",
    "RunConfig",
    "RunSection",
    "ScheduleSection",
    "SourceSection",
    "TrainingSection",
    "ValidationSection",
    "default_ff_dim",
    "load_config",
    "make_config",
]

# What a preset decides even where it has no entry: then it means "as the other sizes say".
_SIZES = ("dim", "layers", "heads", "kv_heads", "head_dim", "ff_dim")
_LENGTHS = ("epochs", "max_steps", "max_tokens")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number (YAML 1.2), not a string (PyYAML's 1.1), and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides.

    Raises:
        UserError: the file cannot be read, a key is unknown (the nearest known one is named), or values contradict.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: not a text file in UTF-8, so not a config") from error
    except OSError as error:
        hint = _configs_there(Path(path))
        raise UserError(f"{path}: cannot be read: {error.strerror}{hint}") from error
    raw = _parse_yaml(text, str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold sections such as 'model:', not a {type(raw).__name__}")
    _check_keys(raw, str(path))
    given = _parse_overrides(overrides or [])
    _step_back(raw, given)
    for section, values in given.items():
        raw[section] = {**(raw.get(section) or {}), **values}
    return make_config(raw, str(path))


def _configs_there(path: Path) -> str:
    """Which files may have been meant by a path that is none."""
    folder = path if path.is_dir() else path.parent
    there = sorted(str(file) for file in folder.glob("*.yaml")) or sorted(map(str, Path("configs").glob("*.yaml")))
    if not there:
        return ""
    return f"; {'there are ' + ', '.join(there[:8]) if path.is_dir() else nearest(str(path), there)}"


def make_config(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a plain nested dict; `where` names it in errors."""
    _check_keys(raw, where)
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items() if value is not None}
    _expand_preset(raw, where)
    if raw.get("model"):
        run_dir = (raw.get("run") or {}).get("dir") or RunSection().dir
        raw["model"] = sizes_from_folder(raw["model"], str(run_dir), where)
    _expand_lr(raw, where)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(_describe(error, where)) from error


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except yaml.reader.ReaderError as error:  # of all YAML errors the only one without a mark
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{where}:{line}: not valid YAML: the character U+{ord(text[error.position]):04X} is not allowed; remove it"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", error))
        hint = "; indent with blanks, not with tabs" if "'\\t'" in problem else ""
        raise UserError(f"{where}{place}: not valid YAML: {problem}{hint}") from error


def _parse_overrides(overrides: list[str]) -> dict[str, dict[str, Any]]:
    given: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name):
            raise UserError(
                f"override '{override}': write it as section.key=value without blanks, such as optimizer.lr=3e-4"
            )
        _check_keys({section: {name: None}}, f"override '{override}'")
        given.setdefault(section, {})[name] = _parse_yaml(value, f"override '{override}'")
    return given


def _step_back(raw: dict[str, Any], given: dict[str, dict[str, Any]]) -> None:
    """Take out of the file what would otherwise beat an override of another name: sizes, lengths of the run, data."""
    model, preset = raw.get("model") or {}, given.get("model", {}).get("preset")
    if preset is not None:
        # A resolved config spells its own preset out; what still equals that was not set by hand.
        old = _preset(model.get("preset"))
        spelled_out = {key for key, value in model.items() if key in old and value == old[key]}
        for key in {*_SIZES, *_preset(preset), *spelled_out}:
            model.pop(key, None)
    if folder_config(given.get("model", {}).get("init_from")):
        for key in ("preset", *FOLDER_KEYS):
            model.pop(key, None)
    for key, other in (("path", "sources"), ("sources", "path")):
        if given.get("data", {}).get(key) is not None:
            (raw.get("data") or {}).pop(other, None)
    if any(given.get("training", {}).get(key) is not None for key in _LENGTHS):
        for key in _LENGTHS:
            (raw.get("training") or {}).pop(key, None)


def _preset(name: Any) -> dict[str, Any]:
    return PRESETS.get(str(name).lower(), {})


def _check_keys(raw: dict[str, Any], where: str) -> None:
    sections = RunConfig.model_fields
    for section, values in raw.items():
        if section not in sections:
            raise UserError(f"{where}: unknown section '{section}': {nearest(str(section), list(sections))}")
        model = sections[section].annotation
        assert isinstance(model, type) and issubclass(model, Section)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise UserError(f"{where}: '{section}' must hold keys, not {values!r}")
        for key in values:
            if key not in model.model_fields:
                hint = nearest(str(key), list(model.model_fields))
                raise UserError(f"{where}: unknown key '{section}.{key}': {hint}")


def _expand_preset(raw: dict[str, Any], where: str) -> None:
    model = raw.get("model") or {}
    name = model.get("preset")
    if name is None:
        return
    if not _preset(name):
        raise UserError(f"{where}: model.preset '{name}': {nearest(str(name), list(PRESETS))}")
    explicit = {key: value for key, value in model.items() if value is not None}
    raw["model"] = {**_preset(name), **explicit}


def _expand_lr(raw: dict[str, Any], where: str) -> None:
    """Set `optimizer.lr: auto`, and with it `schedule.min_lr` to a tenth, unless that is given."""
    optimizer, model = raw.get("optimizer") or {}, raw.get("model") or {}
    if optimizer.get("lr") != "auto":
        return
    name, dim = optimizer.get("name", OptimizerSection().name), model.get("dim", ModelSection().dim)
    if not isinstance(name, str) or name not in AUTO_LR or type(dim) is not int or dim <= 0:
        raise UserError(f"{where}: optimizer.lr 'auto' needs {', '.join(AUTO_LR)} and a width; set a number")
    raw["optimizer"] = {**optimizer, "lr": auto_lr(name, dim)}
    raw["schedule"] = {"min_lr": float(f"{auto_lr(name, dim) / 10:.3g}"), **(raw.get("schedule") or {})}


_PLAIN = {
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "bool_parsing": "should be true or false",
    "string_type": "should be a text",
    "model_type": "should hold keys: {key: value, …}",
}


def _describe(error: ValidationError, where: str) -> str:
    """All problems on one line; the alternatives of one key (a word or a number) count as one problem."""
    problems: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for problem in error.errors():
        is_nested = bool({"sources", "validation", "profile", "rope_scaling"} & {*problem["loc"]})
        key = ".".join(str(part) for part in problem["loc"][: 4 if is_nested else 2])
        message = _PLAIN.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
        problems.setdefault(key, []).append(message)
        given[key] = "" if problem["type"] == "value_error" else f" (given: {problem['input']!r})"
    lines = [f"{key + ': ' if key else ''}{' or '.join(texts)}{given[key]}" for key, texts in problems.items()]
    return f"{where}: {'; '.join(lines)}"


def default_ff_dim(dim: int, activation: str) -> int:
    """Hidden width with about the parameters of the classic 4 × dim layer: SwiGLU has three matrices, so 8/3 × dim.

    Rounded up to a multiple of 64 (16 for small models), which matrix units like (Shazeer 2020, section 2; LLaMA 2023).
    """
    if activation != "swiglu":
        return 4 * dim
    multiple = 64 if dim >= 512 else 16
    return multiple * math.ceil(8 * dim / 3 / multiple)
