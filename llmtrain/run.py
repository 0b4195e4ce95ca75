"""One launch of a run: its fixed parts, how far it is, where it is saved and where it reports.

`llmtrain/train.py` holds the loop; what the loop names in one line is done here.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llmtrain.assemble import Assembly, describe
from llmtrain.checkpoint.progress import Progress
from llmtrain.checkpoint.resume import changes, choose_checkpoint, load_initial_weights, restore, saved_config
from llmtrain.checkpoint.store import FINAL, CheckpointStore, clear_way
from llmtrain.data.batches import Batch, batches, validation_batches
from llmtrain.data.shards import TOKENIZER_FOLDER
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import DivergedError, Stopped, UserError
from llmtrain.health.signals import StopSignals
from llmtrain.model.sampling import SamplingOptions, sample
from llmtrain.observe.ledger import SampleLedger
from llmtrain.observe.meter import Meter
from llmtrain.observe.observer import NullObserver, Observer
from llmtrain.observe.provenance import append_launch, provenance
from llmtrain.observe.validation import Validation, validate
from llmtrain.optim.schedule import make_schedule


class Run:
    """Everything the loop talks to."""

    def __init__(self, parts: Assembly, resume: str):
        self.parts, self.config, self.engine = parts, parts.config, parts.engine
        self.dir = Path(self.config.run.dir)
        reader = choose_checkpoint(self.dir, resume, self._early_warning)
        differences: list[str] = []
        if reader:
            self.progress = restore(reader, self.config, parts.data.manifest, self.engine)
            differences = changes(saved_config(reader), self.config)
        else:
            self.progress = Progress()
            if self.config.model.init_from:
                load_initial_weights(self.engine, self.config.model.init_from, self.config)
        self.total_steps = parts.total_steps(self.progress.step, self.progress.position)
        self.schedule = make_schedule(self.config.schedule, self.config.optimizer.lr, self.total_steps)
        self.meter = Meter(self.engine, self.config)
        self.meter.load_state(self.progress.meter)
        self.store = CheckpointStore(
            self.dir, self.config.checkpoint, self.config.to_yaml(), parts.data.manifest, parts.data.path
        )
        self._tokenizer = load_tokenizer(parts.data.path / TOKENIZER_FOLDER)
        prompts = self.config.training.sample_prompts if self.config.training.sample_every else ()
        self._prompts = [(prompt, self._tokenizer.encode(prompt).tolist()) for prompt in prompts]
        self.observer = self._open_folder()
        self.observer.load_state(self.progress.observer)
        self.ledger = None
        if self.config.logging.sample_ledger:
            self.engine.barrier()  # rank 0 has made the folder
            self.ledger = SampleLedger(self.dir, self.engine.rank, self.progress.step, self.config.run.seed)
        if reader:
            self.observer.message(f"going on from {reader.folder} after step {self.progress.step:,}")
            for line in differences:
                self.observer.message(f"changed since then: {line}")
        self.progress.launches += 1

    def _early_warning(self, text: str) -> None:
        if self.engine.rank == 0:
            print(f"llmtrain: warning: {text}", file=sys.stderr)

    def _open_folder(self) -> NullObserver:
        """Rank 0 claims the run folder: nothing has been written before this point."""
        if self.engine.rank:
            return NullObserver()
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            clear_way(self.dir, self.progress.step, self._early_warning)
            (self.dir / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
            append_launch(
                self.dir / "run.json",
                provenance(self.parts.data.manifest, self.parts.data.path, self.engine.device, self.engine.world_size),
            )
        except OSError as error:
            raise UserError(
                f"{self.dir}: cannot be written: {error.strerror or error}; choose another run.dir"
            ) from error
        return Observer(
            self.config,
            run_dir=self.dir,
            resume_step=self.progress.step,
            total_steps=self.total_steps,
            steps_per_epoch=self.parts.layout.steps_per_epoch(),
            header=describe(self.parts),
        )

    def batches(self) -> Iterator[Batch]:
        """The batches from here to the end of time."""
        return batches(
            self.parts.train,
            self.parts.layout,
            seed=self.config.run.seed,
            position=self.progress.position,
            workers=self.config.data.workers,
        )

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps happens now; at the last step everything does."""
        return every is not None and (self.progress.step % every == 0 or self.progress.step == self.total_steps)

    def validate(self) -> Validation | None:
        """Evaluate on the validation split."""
        if self.parts.val is None:
            return None
        layout, limit = self.parts.layout, self.config.training.eval_batches
        windows = validation_batches(self.parts.val, layout, limit and limit * layout.global_batch)
        with self.meter.paused():
            return validate(self.engine, windows, layout.micro_batch)

    def log(self, batch: Batch, lr: float, grad_norm: torch.Tensor, val: Validation | None) -> None:
        """Make the record of this step: the only place where the host waits for the device."""
        record = self.meter.record(
            step=self.progress.step,
            epoch=batch.epoch,
            tokens=self.progress.tokens,
            lr=lr,
            grad_norm=grad_norm,
            val=val,
        )
        self.observer.log(record)
        if not (math.isfinite(record.train_loss) and math.isfinite(record.grad_norm)):
            raise self._diverged(f"loss {record.train_loss}, gradient norm {record.grad_norm}")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"training diverged by step {self.progress.step:,}: {what}; lower optimizer.lr or raise "
            f"schedule.warmup_steps; the checkpoints in {self.dir} are from before"
        )

    def sample(self) -> None:
        """Let the model write, from each of the configured prompts."""
        with self.meter.paused(), self.engine.evaluating() as model:
            for prompt, ids in self._prompts:
                prompt_BS = torch.tensor([ids], device=self.engine.device)
                options = SamplingOptions(temperature=0.8, vocab_size=self._tokenizer.vocab_size)
                tokens = sample(model, prompt_BS, options, seeds=[self.config.run.seed])
                written = [int(t) for t in itertools.islice(tokens, self.config.training.sample_tokens)]
                self.observer.sample(self.progress.step, prompt, self._tokenizer.decode(written))

    def save(self, *links: str) -> None:
        """Save now; the loop goes on as soon as the state is copied. A step that is saved already is only linked."""
        if not self.meter.is_finite():
            raise self._diverged("a loss or a gradient norm since the last record is not a number")
        self.progress.meter, self.progress.observer = self.meter.state(), self.observer.state()
        with self.meter.paused():
            self.store.save(self.engine, self.progress.to_dict(), links)

    def _report_saves(self) -> None:
        for folder in self.store.news():
            with self.meter.paused():
                self.observer.saved(folder)

    def _wait_for_saves(self) -> None:
        self.store.wait()
        self._report_saves()

    def stop_if_told(self, signals: StopSignals) -> None:
        """Between two steps: obey a signal or `stop_after`, and notice a failed save.

        Raises:
            Stopped: told to stop; everything is saved.
            UserError: a save behind the loop's back failed.
        """
        self._report_saves()
        step, stop_after = self.progress.step, self.config.training.stop_after
        # Ranks must agree; asking costs a sync, so several of them ask only where they wait for each other anyway.
        asks = self.engine.world_size == 1 or step % self.config.logging.every == 0
        if asks and self.engine.any(signals.received is not None):
            reason = signals.received or "a signal on another rank"
        elif stop_after and step >= stop_after:
            reason = f"training.stop_after={stop_after}"
        else:
            return
        if step:
            self.save()
            self._wait_for_saves()
        raise Stopped(f"stopped after step {step:,} by {reason}; saved; the same command goes on from there")

    def has_stopped_improving(self) -> bool:
        """Whether early stopping ends the run."""
        patience = self.config.training.early_stopping_patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def finish(self) -> None:
        """Save as `final`, wait until it is on disk, and say how it went."""
        self.save(FINAL)
        self._wait_for_saves()
        outcome = f"done: {self.progress.step:,} of {self.total_steps:,} steps"
        if self.has_stopped_improving():
            outcome += f", validation no better for {self.progress.evaluations_since_best} evaluations"
        if self.progress.best_val_loss is not None:
            outcome += f"; best validation loss {self.progress.best_val_loss:.4f} at step {self.progress.best_step:,}"
        self.observer.close(outcome)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """However the loop ends, the files are finished and the curves drawn."""
        try:
            yield
        finally:
            self.observer.close(f"ended after step {self.progress.step:,} of {self.total_steps:,}")
