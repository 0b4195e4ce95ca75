"""Other places where records can go: TensorBoard and W&B by a switch each, others by `logging.sinks`."""

from __future__ import annotations

import contextlib
import html
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from llmtrain.config import RunConfig
from llmtrain.errors import UserError
from llmtrain.observe.files import replacing
from llmtrain.observe.record import Record, finite, perplexity
from llmtrain.packages import installed_version

if TYPE_CHECKING:
    import wandb

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID = "wandb_id"
_NOT_IN_AN_ID = ":;,#?/'"  # refused by wandb (Settings.validate_run_id), as is nothing at all


class Sink(Protocol):
    """What a place for records must be able to do. One that raises is reported and left out; training goes on."""

    def log(self, record: Record) -> None:
        """Take in one record."""

    def text(self, step: int, prompt: str, text: str) -> None:
        """Take in what the model wrote after `prompt`."""

    def close(self) -> None:
        """Write out what is still held back."""


def open_sinks(
    config: RunConfig, run_dir: Path, resume_step: int, warn: Callable[[str], None], reached_step: int = 0
) -> list[Sink]:
    """Open the sinks that the config switches on.

    Args:
        config: resolved.
        run_dir: exists.
        resume_step: the records up to it stay.
        warn: tells the user.
        reached_step: of the last record that an earlier launch may have logged.

    Raises:
        UserError: a package is missing, W&B cannot start a new run, or a sink of the user's own fails.
    """
    sinks: list[Sink] = []
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(run_dir, resume_step))
    if config.logging.wandb:
        sinks.append(WandbSink(config, run_dir, resume_step, warn, reached_step))
    for name in config.logging.sinks:
        try:
            sinks.append(_factory(name)(config, run_dir, resume_step))
        except Exception as error:  # of whatever kind: it is not our code
            raise UserError(f"logging.sinks '{name}' cannot start: {type(error).__name__}: {error}") from error
    return sinks


def _factory(name: str) -> Callable[[RunConfig, Path, int], Sink]:
    """What `module:factory` names; the module may lie in the folder that the run is started in.

    Raises:
        UserError: it cannot be imported, or there is no such function in it.
    """
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that it hides nothing
    try:
        factory = getattr(importlib.import_module(module), function)
    except Exception as error:  # of whatever kind: it is not our code
        raise UserError(
            f"logging.sinks '{name}' cannot be imported: {type(error).__name__}: {error}; it must be module:factory, of"
            " an installed package or a file of this folder"
        ) from error
    if not callable(factory):
        raise UserError(f"logging.sinks '{name}': {function} is a {type(factory).__name__}, not a function or class")
    made: Callable[[RunConfig, Path, int], Sink] = factory
    return made


def require_sinks(config: RunConfig) -> None:
    """Check, before anything is written, that the sinks that are switched on can be imported.

    Raises:
        UserError: one cannot.
    """
    for package in ("tensorboard", "wandb"):
        if getattr(config.logging, package) and installed_version(package) is None:
            raise _missing(package)
    for name in config.logging.sinks:
        _factory(name)


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record under the names they have on dashboards, without those that are not known."""
    groups: dict[str, dict[str, float | None]] = {
        "train": {
            "loss": record.train_loss,
            "perplexity": record.perplexity,
            "lr": record.learning_rate,
            "grad_norm": record.grad_norm,
            "param_norm": record.param_norm,
            "epoch": record.epoch,
            "tokens": record.tokens,
            "tokens_per_sec": record.tokens_per_sec,
            "step_time_s": record.step_time_s,
            "step_time_spread_s": record.step_time_spread_s,
            "slowest_rank": record.slowest_rank,
            "mfu": record.mfu,
            "mfu_palm": record.mfu_palm,
            "memory_gb": record.memory_gb,
        },
        "val": {
            "loss": record.val_loss,
            "perplexity": None if record.val_loss is None else perplexity(record.val_loss),
            "accuracy": record.val_accuracy,
        },
    }
    for name, source in (record.sources or {}).items():
        groups[f"source/{name}"] = source.row()
    for name, one in (record.validation or {}).items():
        groups[f"val/{name}"] = {"loss": one.loss, "perplexity": one.perplexity, "accuracy": one.accuracy}
    named = {f"{group}/{name}": finite(value) for group, values in groups.items() for name, value in values.items()}
    return {name: value for name, value in named.items() if value is not None}


class TensorBoardSink:
    """Event files under `run_dir/tensorboard`."""

    _FLUSH_S = 30  # how far the page may be behind, and what a kill may cost

    def __init__(self, run_dir: Path, resume_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        # What an earlier launch logged beyond the checkpoint is hidden: those steps come again.
        self._writer: SummaryWriter = SummaryWriter(
            str(run_dir / TENSORBOARD_FOLDER), purge_step=resume_step + 1, flush_secs=self._FLUSH_S
        )

    def log(self, record: Record) -> None:
        """Write the numbers under their tags."""
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record.step, walltime=record.time)

    def text(self, step: int, prompt: str, text: str) -> None:
        """Write a sample; indented, since TensorBoard renders Markdown."""
        indented = "".join(f"    {line}\n" for line in f"{prompt}{text}".splitlines())
        self._writer.add_text("samples", indented, step)

    def close(self) -> None:
        """Write out the last events."""
        self._writer.close()


class WandbSink:
    """A W&B run that a resumed launch goes on with. Online, offline or off as WANDB_MODE says; the key is wandb's.

    Where an earlier launch has logged steps that come again, the run is rewound (`resume_from` of `wandb.init`): the
    server forgets them, at once or when what was written offline is synced.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        resume_step: int,
        warn: Callable[[str], None],
        reached_step: int = 0,
    ):
        """Where a run that it knows cannot be gone on with there, records are kept in `run_dir/wandb` with a warning:
        a requeued job does not end for its dashboard."""
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        id_path = run_dir / WANDB_ID
        goes_on = resume_step > 0 and id_path.exists()  # from the start again is another run
        known_id = _known_id(id_path, warn) if goes_on else None
        rewinds = known_id is not None and reached_step > resume_step

        def start(*, rewinds: bool, mode: Literal["offline"] | None = None) -> wandb.Run:
            return wandb.init(
                project=config.logging.wandb_project,
                name=config.run.name or run_dir.resolve().name,
                config=config.model_dump(mode="json"),
                dir=run_dir,
                id=known_id,
                resume="allow" if known_id and not rewinds else None,
                resume_from=f"{known_id}?_step={resume_step}" if rewinds else None,
                mode=mode,
                settings=wandb.Settings(console="off"),  # it would record each drawing of the progress line
            )

        def start_or_tell(*, rewinds: bool) -> wandb.Run | str:
            try:
                return start(rewinds=rewinds)
            except wandb.Error as error:
                return f"logging.wandb is on but W&B cannot start: {' '.join(str(error).split())}"

        run = start_or_tell(rewinds=rewinds)
        if isinstance(run, str) and rewinds and not isinstance(other := start_or_tell(rewinds=False), str):
            warn(
                f"W&B cannot go back to step {resume_step:,} ({run}); what it has of steps up to {reached_step:,} "
                "stays, and it ignores those that come again"
            )
            run = other
        if isinstance(run, str):
            if not goes_on:
                raise UserError(f"{run}; run `wandb login`, or set WANDB_MODE=offline, or set logging.wandb=false")
            warn(f"{run}; going on offline; `wandb sync` of the folder in {run_dir / 'wandb'} brings it there later")
            run = start(rewinds=rewinds, mode="offline")
        self._run = run
        self._html: Callable[[str], object] = wandb.Html
        with replacing(id_path, durable=True) as file:
            file.write(f"{self._run.id}\n".encode())

    def log(self, record: Record) -> None:
        """Log the numbers at the optimizer step."""
        self._run.log(scalars(record), step=record.step)

    def text(self, step: int, prompt: str, text: str) -> None:
        """Log a sample at the optimizer step."""
        page = f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>"
        self._run.log({"samples": self._html(page)}, step=step)

    def close(self) -> None:
        """Finish the upload (online) or the file (offline)."""
        self._run.finish()


def _known_id(path: Path, warn: Callable[[str], None]) -> str | None:
    """The id of the W&B run that earlier launches logged to; None, with a warning: the file does not tell it."""
    content = path.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        found = content.decode().strip()
        if found and found.isprintable() and not set(found) & set(_NOT_IN_AN_ID):
            return found
    warn(
        f"{path}: {content[:80]!r} is no id of a W&B run; records go to a new one from here on, and W&B keeps the run "
        "before as it is"
    )
    return None


def _missing(package: str) -> UserError:
    return UserError(
        f"logging.{package} is on but {package} is not installed: "
        f"pip install -c constraints.txt -e '.[{package}]', or set logging.{package}=false"
    )
