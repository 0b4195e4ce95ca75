"""The keys of a config: type, default and meaning of each, and what contradicts what within a section.

The text under a key is its meaning; docs/reference.md and docs/config.schema.json are made from it
(`python -m docs.reference`). `llmtrain/config.py` reads the file.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from llmtrain.presets import PRESETS

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# The same text from libyaml, in a quarter of the time, where PyYAML has it.
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_BYTES = {
    "anyOf": [
        {"type": "integer", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*\d*\.?\d+\s*\w*$", "examples": ["200GB", "1.5TiB"]},
    ]
}


class Section(BaseModel):
    """A part of the config: immutable, unknown keys are errors, and `true` is not the number 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

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
    """Run folder: checkpoints, metrics, curves."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """Of the first weights, the order of the samples, and dropout."""
    name: str | None = None
    """Shown on curves and dashboards; null: the name of the folder."""


class SourceSection(Section):
    """One source of a mixture."""

    path: str
    """Prepared data; also a URL."""
    weight: Rate | Annotated[dict[Annotated[int, Field(ge=0)], Rate], Field(min_length=1)]
    """Its share, relative to the other sources; or by the number of steps from which it holds: `{0: 1, 500: 2}`."""
    name: str | None = None
    """In metrics; null: the last part of the path."""

    def weight_after(self, steps: int) -> float:
        """The weight that holds after `steps` optimizer steps; 0 before the first that is given."""
        if isinstance(self.weight, float):
            return self.weight
        return max(((at, weight) for at, weight in self.weight.items() if at <= steps), default=(0, 0.0))[1]


class ValidationSection(Section):
    """Prepared data that a run is evaluated on beside its own validation split."""

    path: str
    """Prepared data; also a URL."""
    name: str | None = None
    """In metrics; null: the last part of the path."""
    split: str = "val"
    """Which part of it."""


class DataSection(Section):
    """Which prepared data, and how windows are cut from it."""

    path: str | None = "data/stdlib"
    """Prepared data; also a URL. Null where there are `sources`."""
    seq_len: PositiveInt = 256
    """Inputs of a window, and as many targets, in tokens."""
    stride: PositiveInt | None = None
    """Tokens from one window to the next; null: `seq_len`, windows do not overlap."""
    document_mask: bool = False
    """Attention within documents, and positions count from their start."""
    packing: Literal["windows", "best_fit"] = "windows"
    """`best_fit`: whole documents side by side in windows that are padded; implies `document_mask`."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read, for storage that stalls; 0: the training process reads."""
    sources: tuple[SourceSection, ...] | None = None
    """In the place of `path`: several folders by weights, `[{path: data/code, weight: 2}, …]`."""
    validation: tuple[ValidationSection, ...] = ()
    """More data to evaluate beside its own validation split, each on its own, `[{path: data/books}, …]`."""

    @model_validator(mode="before")
    @classmethod
    def _let_sources_stand_for_the_path(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("sources") is None:
            return values
        if values.get("path") is not None:
            raise ValueError("path and sources contradict each other; leave one out")
        return {**values, "path": None}

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        for name in self.set_names:
            if self.set_names.count(name) > 1:
                raise ValueError(f"two sets of validation are called '{name}'; give each a name of its own")
        return self

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
    def set_names(self) -> tuple[str, ...]:
        """Of the sets in `validation`, as metrics call them."""
        return tuple(one.name or PurePath(one.path).name for one in self.validation)

    @property
    def stage_steps(self) -> list[int]:
        """The numbers of steps after which weights change, and 0."""
        changing = [source.weight for source in self.sources or () if isinstance(source.weight, dict)]
        return sorted({0, *(at for weights in changing for at in weights)})


class RopeScalingSection(Section):
    """Rotations stretched for longer texts, as Llama 3.1 does. Those with a wavelength (in tokens) up to
    `original_max_position_embeddings / high_freq_factor` stay, those from `… / low_freq_factor` on are `factor` times
    as long; what lies between goes over from one to the other. The keys are those of Hugging Face's `config.json`.
    """

    rope_type: Literal["llama3"] = "llama3"
    """The only one there is."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """By which long wavelengths grow."""
    low_freq_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Waves that fit less often into the original length are stretched whole."""
    high_freq_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Waves that fit more often into it are not stretched."""
    original_max_position_embeddings: PositiveInt
    """The original length, in tokens: that of the training before the stretching."""

    @model_validator(mode="after")
    def _check_factors(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor:g} is not above low_freq_factor {self.low_freq_factor:g}"
            )
        return self


class ModelSection(Section):
    """The decoder. `preset` gives a named size; any key set beside it wins over the preset.

    A preset given as an override wins over the file: the size in the file steps back, unless overridden too. So it does
    for a Hugging Face folder in `init_from`, which decides the sizes: llmtrain/hf_config.py.
    """

    preset: Annotated[str, WithJsonSchema({"type": "string", "enum": list(PRESETS)})] | None = None
    """A size by name."""
    dim: PositiveInt = 128
    """Width."""
    layers: PositiveInt = 6
    """Blocks of attention and feed-forward layer."""
    heads: PositiveInt = 2
    """Attention heads; must divide `dim` where `head_dim` is null."""
    kv_heads: PositiveInt | None = None
    """Heads of keys and values, of which several queries share one; must divide `heads`. Null: as many as `heads`."""
    head_dim: PositiveInt | None = None
    """Width of one attention head; null: dim / heads."""
    ff_dim: PositiveInt | None = None
    """Hidden width of the feed-forward layer; null: so that it has about the parameters of a GELU layer of 4 × dim."""
    dropout: Fraction = 0.0
    """Share of activations set to 0 in training."""
    tie_embeddings: bool = True
    """Embedding and output head are one matrix."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before each layer."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the variance there."""
    positions: Literal["rope", "learned"] = "rope"
    """How positions are told: rotation of queries and keys, or a learned vector for each."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotations' wavelengths."""
    rope_scaling: RopeScalingSection | None = None
    """Stretches them, as Llama 3.1 does; null: they stay as they are."""
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """Of the feed-forward layer; `swiglu` has three matrices, the others two."""
    qk_norm: bool = True
    """Queries and keys are normed in each head."""
    qkv_bias: bool = False
    """Queries, keys and values have biases, as in Qwen2."""
    vocab_size: PositiveInt | None = None
    """Ids; null: the tokenizer's, padded to a multiple of `vocab_multiple`."""
    vocab_multiple: PositiveInt = 1
    """Such as 128, which suits a GPU. Ids that pad are never written, and never count as the most likely one."""
    init_from: str | None = None
    """A run, checkpoint or Hugging Face folder whose weights, and nothing else, start this run; also a URL."""

    @property
    def head_width(self) -> int:
        """`head_dim`, or what null means there."""
        return self.head_dim or self.dim // self.heads

    @property
    def query_width(self) -> int:
        """Width of all heads' queries, and so of attention's result."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """Width of all heads' keys, and of their values."""
        return (self.kv_heads or self.heads) * self.head_width

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        if not self.head_dim and self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}; change one, or set head_dim")
        if self.positions == "rope" and self.head_width % 2:
            name = "head_dim" if self.head_dim else "dim / heads"
            raise ValueError(f"{name} = {self.head_width} is odd; rope turns pairs, so make it even")
        if self.rope_scaling and self.positions != "rope":
            raise ValueError(f"rope_scaling is for positions: rope, not {self.positions}; leave one out")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        return self


class OptimizerSection(Section):
    """Which optimizer. `muon` takes the matrices of the blocks and leaves the rest to AdamW, at the same lr."""

    name: Literal["sgd", "adam", "adamw", "muon"] = "adamw"
    """Which one."""
    lr: Annotated[Rate, WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"const": "auto"}]})] = 1e-3
    """Peak learning rate; `auto`: by the width of the model, and `schedule.min_lr` a tenth of it, unless set."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Of Adam's two running means."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of Adam's second mean."""
    weight_decay: Rate = 0.1
    """Of the blocks' matrices and an untied head, times the learning rate; embeddings, norms and biases have none."""
    momentum: Fraction = 0.95
    """Of `sgd` and `muon`."""
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    """Global gradient norm above which the gradient is scaled down to it; null: never."""


class ScheduleSection(Section):
    """Learning rate over optimizer steps; see llmtrain/optim/schedule.py for the formulas."""

    name: Literal["constant", "linear", "step", "cosine", "three_phase", "warm_restarts"] = "cosine"
    """What follows the warmup."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of the linear rise from `start_lr` to the peak."""
    start_lr: Rate = 0.0
    """Learning rate at step 0."""
    min_lr: Rate = 1e-4
    """Learning rate at the end; not above the peak."""
    decay_start: Annotated[float, Field(ge=0, le=1)] = 0.8
    """`three_phase`: share of all steps before the decay."""
    step_size: PositiveInt = 1000
    """`step`: steps between two drops."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.5
    """`step`: factor of each drop."""
    cycle_steps: PositiveInt = 1000
    """`warm_restarts`: length of the first cycle, in steps."""
    cycle_mult: Annotated[float, Field(ge=1)] = 1.0
    """`warm_restarts`: each cycle is so many times as long as the last."""


class ProfileSection(Section):
    """Which optimizer steps are profiled; see llmtrain/observe/profile.py."""

    start: PositiveInt = 10
    """The first of them; 1 is the run's first, which is slower than the others."""
    steps: PositiveInt = 3
    """How many."""


class TrainingSection(Section):
    """Batch, length of the run, numerics, and what happens every so many steps.

    A length of the run (max_steps, max_tokens, epochs) given as an override wins over the other two in the file.
    """

    micro_batch_size: PositiveInt = 16
    """Sequences that one process computes at once."""
    global_batch_size: PositiveInt = 16
    """Sequences per optimizer step over all processes; a multiple of `micro_batch_size` × processes."""
    max_steps: PositiveInt | None = None
    """Optimizer steps of the run; wins over `epochs`."""
    max_tokens: PositiveInt | None = None
    """Target tokens of the run; wins over `epochs`, not together with `max_steps`."""
    epochs: PositiveInt = 10
    """How often the data is gone through."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16`: autocast over float32 weights; `auto`: bf16 where the device computes it natively, else fp32."""
    fp8: bool = False
    """With bf16: the blocks' matrices multiply in fp8 (needs torchao; one process or DDP)."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the blocks; `auto`: on CUDA, and on a CPU that can where a run has 4e13 FLOPs or more for each core."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Memory for time: what the backward pass computes again. `full`: whole blocks; `selective`: all but attention and
    products of matrices."""
    eval_every: PositiveInt | None = 250
    """Steps from one evaluation on the validation split to the next; null: never."""
    eval_batches: PositiveInt | None = None
    """Global batches of an evaluation; null: the whole split."""
    early_stopping_patience: PositiveInt | None = None
    """Evaluations without a better loss after which the run ends; null: never."""
    sample_every: PositiveInt | None = None
    """Steps from one set of written samples to the next; null: never."""
    sample_prompts: tuple[str, ...] = ("\n",)
    """What the samples go on from."""
    sample_tokens: PositiveInt = 200
    """Length of a sample."""
    stop_after: PositiveInt | None = None
    """Save and end this launch after that step, with exit code 75; the same command without it goes on."""
    profile: ProfileSection | None = None
    """`{start: 10, steps: 3}`: a table of where a step's time goes, and a trace of each rank, in `profile/`."""

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            sizes = range(min(self.micro_batch_size, self.global_batch_size), 0, -1)
            fits = next(size for size in sizes if self.global_batch_size % size == 0)
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by micro_batch_size "
                f"{self.micro_batch_size}; choose a micro_batch_size of {fits}"
            )
        if self.max_steps and self.max_tokens:
            raise ValueError("max_steps and max_tokens are both set; keep the one that shall end the run")
        return self


class CheckpointSection(Section):
    """What is saved when, and what is kept."""

    save_every: PositiveInt | None = 500
    """Steps from one checkpoint to the next; null: only the best, and at the end."""
    keep_last: PositiveInt = 3
    """The newest that are kept, beside the best and the final one."""
    keep_every: PositiveInt | None = None
    """Checkpoints of every so many steps are never deleted; null: none of them is special."""
    max_bytes: Annotated[ByteSize, Field(gt=0), WithJsonSchema(_BYTES)] | None = None
    """Budget over all checkpoints of a run, such as 200GB or 1.5TiB; null: none."""
    async_save: bool = True
    """Write behind the loop, which goes on as soon as the state is copied to host memory."""
    remote: str | None = None
    """A URL that fsspec knows, such as s3://bucket/run: every checkpoint goes there as well."""

    @field_validator("remote")
    @classmethod
    def _check_remote(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value:
            raise ValueError("must be a URL such as s3://bucket/run")
        return value


class LoggingSection(Section):
    """Where the numbers go."""

    every: PositiveInt = 10
    """Steps from one record to the next."""
    console: Literal["auto", "live", "plain", "quiet"] = "auto"
    """`live`: a few lines drawn anew; `plain`: lines for a log; `quiet`: warnings and the outcome; `auto`: live on
    a terminal that can show it, else plain."""
    csv: bool = True
    """The records as a table, too: training_log.csv."""
    tensorboard: bool = False
    """Event files in `tensorboard/` of the run folder (needs tensorboard)."""
    wandb: bool = False
    """A Weights & Biases run; WANDB_MODE says whether online, offline or off (needs wandb)."""
    wandb_project: str = "llmtrain"
    """The project it belongs to."""
    sinks: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = ()
    """Places of your own for the records, each `module:factory`; see docs/sinks.md."""
    plots: bool = True
    """Draw training_curve.png and loss_by_epoch.png."""
    sample_ledger: bool = False
    """Write which samples each rank consumed at each step: samples-rank00000.jsonl …"""


class HealthSection(Section):
    """How long to be patient, and what to do when training diverges; see llmtrain/health/divergence.py."""

    timeout_s: _Seconds = 600.0
    """Seconds that an exchange between processes may take, and how far apart their starts may be."""
    grace_s: _Seconds | None = 120.0
    """Seconds from a stop signal to the end of the process, of which a save that takes longer warns; null: any."""
    hang_after_s: _Seconds | None = None
    """Seconds without moving on after which a rank hangs, in a phase that it has left before; null: learned for each
    phase from the run; 1e9: no watchdog."""
    spike_z: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 10.0
    """A step that lies so many robust standard deviations above the median, and at least half a nat or ten times the
    norm, is a spike and not applied; null: only what is not finite is not."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Applied steps that the median is of; before there are so many, nothing is a spike."""
    max_skips: PositiveInt = 5
    """Skipped steps within `spike_window` steps at which the run goes back to a checkpoint."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """How often, in the whole run; then it ends with exit code 3. To go on after that, change what diverged and raise
    it."""

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
        values = self.model_dump(mode="json")
        return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
