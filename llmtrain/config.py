"""One YAML file and dotted overrides become one frozen, validated `RunConfig`.

`load_config` reads and checks what the file alone can tell; `llmtrain/resolve.py` settles what depends on the data and
the machine. A resolved config that is written to the run folder and read again gives the same run.
"""

from __future__ import annotations

import math
import re
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llmtrain.errors import UserError, nearest
from llmtrain.presets import AUTO_LR, PRESETS, auto_lr

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the config: immutable, unknown keys are errors, and `true` is not the number 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, list | tuple) else [value]
        if {int, float, ByteSize} & {*kinds} and bool not in kinds and any(isinstance(item, bool) for item in values):
            raise ValueError("should be a number, not true or false")
        return value


def _kinds(annotation: Any) -> list[Any]:
    """The plain types in an annotation, also those of alternatives and elements."""
    parts = get_args(annotation)
    return [kind for part in parts for kind in _kinds(part)] if parts else [annotation]


class RunSection(Section):
    """Where the run lives and what makes it repeatable."""

    dir: str = "checkpoints"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    name: str | None = None


class SourceSection(Section):
    """One source of a mixture."""

    path: str
    weight: (
        Rate | Annotated[dict[Annotated[int, Field(ge=0)], Rate], Field(min_length=1)]
    )  # or by steps: {0: 1, 500: 2}
    name: str | None = None  # in metrics; null: the last part of the path

    def weight_after(self, steps: int) -> float:
        """The weight that holds after `steps` optimizer steps; 0 before the first that is given."""
        if isinstance(self.weight, float):
            return self.weight
        return max(((at, weight) for at, weight in self.weight.items() if at <= steps), default=(0, 0.0))[1]


class DataSection(Section):
    """Which prepared data, and how windows are cut from it."""

    path: str | None = "data/stdlib"  # null where there are sources
    seq_len: PositiveInt = 256
    stride: PositiveInt | None = None  # tokens from one window to the next; null: seq_len, windows do not overlap
    document_mask: bool = False  # attention and positions within documents; see llmtrain/model/document_mask.py
    packing: Literal["windows", "best_fit"] = "windows"  # best_fit: documents whole, windows padded; and their mask
    workers: Annotated[int, Field(ge=0)] = 0
    sources: tuple[SourceSection, ...] | None = None  # instead of path: several, by weights

    @model_validator(mode="before")
    @classmethod
    def _let_sources_stand_for_the_path(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("sources") is None:
            return values
        if values.get("path") is not None:
            raise ValueError("path and sources contradict each other; leave one out")
        return {**values, "path": None}

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.sources is None:
            if self.path is None:
                raise ValueError("path is null, and there are no sources; give one of them")
            return self
        if not self.sources:
            raise ValueError("sources is empty; name at least one, or leave it out and set path")
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"two sources are called '{name}'; give each a name of its own")
        for at in self.stage_steps:
            if not any(source.weight_after(at) for source in self.sources):
                raise ValueError(f"all weights of sources are 0 after {at} steps; one must be above 0")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all sources."""
        return tuple(source.path for source in self.sources or ()) or (str(self.path),)

    @property
    def where(self) -> str:
        """Names them for people."""
        return ", ".join(self.paths)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all sources, as metrics call them."""
        return tuple(source.name or PurePath(source.path).name for source in self.sources or ()) or ("data",)

    @property
    def stage_steps(self) -> list[int]:
        """The numbers of steps after which weights change, and 0."""
        changing = [source.weight for source in self.sources or () if isinstance(source.weight, dict)]
        return sorted({0, *(at for weights in changing for at in weights)})


class ModelSection(Section):
    """The decoder. `preset` gives a named size; any key set beside it wins over the preset.

    A preset given as an override wins over the file: the size in the file steps back, unless overridden too.
    """

    preset: str | None = None
    dim: PositiveInt = 128
    layers: PositiveInt = 6
    heads: PositiveInt = 2
    kv_heads: PositiveInt | None = None  # null: as many as heads
    ff_dim: PositiveInt | None = None  # null: about the parameters of a GELU layer of 4 × dim
    dropout: Fraction = 0.0
    tie_embeddings: bool = True
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    qk_norm: bool = True
    vocab_size: PositiveInt | None = None  # null: the tokenizer's, padded to a multiple of
    vocab_multiple: PositiveInt = 1  # such as 128, which suits matrix units; padded ids are never written
    init_from: str | None = None  # a run or checkpoint folder whose weights (only) start this run

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"dim / heads = {self.head_dim} is odd; rope turns pairs, so make it even")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        return self


class OptimizerSection(Section):
    """Which optimizer. `muon` takes the matrices of the blocks and leaves the rest to AdamW, at the same lr."""

    name: Literal["sgd", "adam", "adamw", "muon"] = "adamw"
    lr: Rate = 1e-3  # or `auto`, see `auto_lr`
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Rate = 0.1
    momentum: Fraction = 0.95  # sgd and muon
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0


class ScheduleSection(Section):
    """Learning rate over optimizer steps; see llmtrain/optim/schedule.py for the formulas."""

    name: Literal["constant", "linear", "step", "cosine", "three_phase", "warm_restarts"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    start_lr: Rate = 0.0
    min_lr: Rate = 1e-4
    decay_start: Annotated[float, Field(ge=0, le=1)] = 0.8  # three_phase: share of the steps before the decay
    step_size: PositiveInt = 1000  # step: steps between two drops
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.5  # step: factor of each drop
    cycle_steps: PositiveInt = 1000  # warm_restarts: length of the first cycle
    cycle_mult: Annotated[float, Field(ge=1)] = 1.0  # warm_restarts: each cycle is this much longer than the last


class ProfileSection(Section):
    """Which optimizer steps are profiled; see llmtrain/observe/profile.py."""

    start: PositiveInt = 10  # the first of them; 1 is the run's first, which is slower than the others
    steps: PositiveInt = 3


class TrainingSection(Section):
    """Batch, length of the run, numerics, and what happens every so many steps.

    A length of the run (max_steps, max_tokens, epochs) given as an override wins over the other two in the file.
    """

    micro_batch_size: PositiveInt = 16
    global_batch_size: PositiveInt = 16
    max_steps: PositiveInt | None = None  # wins over epochs
    max_tokens: PositiveInt | None = None  # wins over epochs; not together with max_steps
    epochs: PositiveInt = 10
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    fp8: bool = False  # with bf16: the blocks' matrices multiply in fp8; see llmtrain/engine/fp8.py
    compile: Literal["auto"] | bool = "auto"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    eval_every: PositiveInt | None = 250
    eval_batches: PositiveInt | None = None  # null: the whole validation split
    early_stopping_patience: PositiveInt | None = None  # evaluations without a better loss
    sample_every: PositiveInt | None = None
    sample_prompts: tuple[str, ...] = ("\n",)
    sample_tokens: PositiveInt = 200
    stop_after: PositiveInt | None = None
    profile: ProfileSection | None = None

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.max_steps and self.max_tokens:
            raise ValueError("max_steps and max_tokens are both set; keep the one that shall end the run")
        return self


class CheckpointSection(Section):
    """What is saved when, and what is kept."""

    save_every: PositiveInt | None = 500
    keep_last: PositiveInt = 3
    keep_every: PositiveInt | None = None  # steps whose checkpoints are never deleted
    max_bytes: Annotated[ByteSize, Field(gt=0)] | None = None  # of all checkpoints of a run; such as 200GB or 1.5TiB
    async_save: bool = True
    remote: str | None = None  # a URL that fsspec knows, such as s3://bucket/run: every checkpoint goes there as well

    @field_validator("remote")
    @classmethod
    def _check_remote(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value:
            raise ValueError("must be a URL such as s3://bucket/run")
        return value


class LoggingSection(Section):
    """Where the numbers go."""

    every: PositiveInt = 10
    csv: bool = True
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "llmtrain"
    plots: bool = True
    sample_ledger: bool = False


class HealthSection(Section):
    """How long to be patient, and what to do when training diverges; see llmtrain/health/divergence.py."""

    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0  # of an exchange between processes
    grace_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 120.0  # from a signal to the end; null: any
    # A rank that does not move on for so long hangs; null: learned for each phase from the run. 1e9 switches it off.
    hang_after_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    # Robust standard deviations above the median at which a step is not applied; null: only what is not finite.
    spike_z: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 10.0
    spike_window: Annotated[int, Field(ge=2)] = 128  # steps that the median is of; none is a spike before they are full
    max_skips: PositiveInt = 5  # skipped steps within spike_window steps at which the run goes back
    max_rollbacks: Annotated[int, Field(ge=0)] = 2  # of the whole run; after these it ends with exit code 3

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.max_skips > self.spike_window:
            raise ValueError(f"max_skips {self.max_skips} is above spike_window {self.spike_window}, so is never met")
        return self


class RunConfig(Section):
    """The whole run."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection = TrainingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    health: HealthSection = HealthSection()

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.schedule.min_lr > self.optimizer.lr and self.schedule.name not in ("constant", "step"):
            raise ValueError(
                f"schedule.min_lr {self.schedule.min_lr} is above optimizer.lr {self.optimizer.lr}; lower min_lr"
            )
        return self

    def to_yaml(self) -> str:
        """The config as YAML that `load_config` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# What a preset decides even where it has no entry: then it means "as the other sizes say".
_SIZES = ("dim", "layers", "heads", "kv_heads", "ff_dim")
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
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
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


def make_config(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a plain nested dict; `where` names it in errors."""
    _check_keys(raw, where)
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items() if value is not None}
    _expand_preset(raw, where)
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
        raise UserError(f"{where}{place}: not valid YAML: {getattr(error, 'problem', error)}") from error


def _parse_overrides(overrides: list[str]) -> dict[str, dict[str, Any]]:
    given: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name):
            raise UserError(f"override '{override}': write it as section.key=value, such as optimizer.lr=3e-4")
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


def _describe(error: ValidationError, where: str) -> str:
    """All problems on one line; the alternatives of one key (a word or a number) count as one problem."""
    problems: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"][: 4 if "sources" in problem["loc"] else 2])
        message = problem["msg"].removeprefix("Value error, ")
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
