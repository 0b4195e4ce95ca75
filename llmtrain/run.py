"""One launch of a run: its fixed parts, how far it is, where it is saved and where it reports.

`llmtrain/train.py` holds the loop; what the loop names in one line is done here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from llmtrain.assemble import Assembly, describe
from llmtrain.checkpoint.claim import claim, naming_what_cannot_be_written
from llmtrain.checkpoint.folders import BEST, FINAL
from llmtrain.checkpoint.format import CheckpointReader
from llmtrain.checkpoint.lock import RunLock
from llmtrain.checkpoint.mending import mending
from llmtrain.checkpoint.mirror import make_mirror
from llmtrain.checkpoint.progress import Progress
from llmtrain.checkpoint.remote import bring
from llmtrain.checkpoint.restore import Choose, Restorer
from llmtrain.checkpoint.resume import changes, choose_checkpoint, own_step, progress_of, saved_config
from llmtrain.checkpoint.saving import Saving
from llmtrain.checkpoint.start import load_weights
from llmtrain.checkpoint.store import CheckpointStore, OpenCheckpoint, check_writable, clear_way, newest_good
from llmtrain.data.ahead import ahead
from llmtrain.data.batches import Batch, batches
from llmtrain.data.mixture import Stage
from llmtrain.data.staging import appears
from llmtrain.engine import Outcome
from llmtrain.engine.device import give_back_memory
from llmtrain.errors import DivergedError, PeerLostError, Stopped, UserError, end_within, tell
from llmtrain.health.agreement import patiently, together
from llmtrain.health.divergence import Stretch
from llmtrain.health.guard import Guard, first_skip
from llmtrain.health.peers import Peers, Phase
from llmtrain.health.signals import StopSignals
from llmtrain.health.stopping import StopAfterStep, Stopping
from llmtrain.health.watchdog import Watchdog
from llmtrain.observe.files import LAUNCHES, replacing
from llmtrain.observe.ledger import SampleLedger
from llmtrain.observe.meter import Meter
from llmtrain.observe.observer import NullObserver, Observer
from llmtrain.observe.profile import profiled
from llmtrain.observe.provenance import append_launch, ending, provenance
from llmtrain.observe.record import finite
from llmtrain.observe.samples import Samples
from llmtrain.observe.sinks import require_sinks
from llmtrain.observe.source_log import SourceLog
from llmtrain.observe.validation import Validation, judged, validate_each
from llmtrain.optim.schedule import make_schedule

_NFS_S = 40.0  # so long a host may take to see what another has made: nfs(5), acdirmin 30 s


class Run:
    """Everything the loop talks to. Making one checks and writes nothing; `opened` claims the run folder."""

    def __init__(self, parts: Assembly, resume: str, peers: Peers, signals: StopSignals, lock: RunLock | None = None):
        """`lock` is taken before anything is fetched into the run folder; None: nothing may be written there."""
        self.parts, self.config, self.engine, self.peers = parts, parts.config, parts.engine, peers
        self.stopping = Stopping(self.engine, signals, self.config.health.grace_s)
        self.dir = Path(self.config.run.dir)
        for warning in parts.warnings:
            self._early_warning(warning)
        self._is_told = signals.is_told  # on this rank, which the others may not know yet
        resume = bring(self.engine, self.config, resume, lock, self._is_told)
        self.progress = Progress()
        self._changes: list[str] = []
        self._restorer = Restorer(self.engine, self.config.health.timeout_s, self._is_told, CheckpointReader)
        self.resumed_from = self._start_or_go_on(resume, lock)
        self.guard = Guard(self.config, self.dir, self.engine.rank)
        self.guard.load_state(self.progress.guard)
        self._find_rollbacks()
        self._plan()
        self.meter = Meter(
            self.engine, (parts.flops_per_token(), parts.flops_per_token(causal=False)), self.sources.names
        )
        self.meter.load_state(self.progress.meter)
        self.mirror = together(self.engine, lambda: make_mirror(self.config, self.engine.rank))
        self.store = self._make_store(own_step(self.dir, self.resumed_from))
        self.saving = Saving(self.store, self.engine, self._now, lambda at: self.progress.not_saved(at))  # noqa: PLW0108
        together(self.engine, self._check_surroundings)
        self.observer = NullObserver()
        self.ledger: SampleLedger | None = None
        self._outcome = ""  # of a run that is done

    def _load(self, choose: Choose[CheckpointReader]) -> CheckpointReader | None:
        """Go to where a checkpoint that rank 0 chooses had come; None: it chooses none, and nothing has changed."""
        reader = together(self.engine, lambda: self._restorer.restore(choose, self._progress_of))
        if reader:
            self.engine.publish()
            self.progress = together(self.engine, lambda: self._progress_of(reader))
        return reader

    def _progress_of(self, reader: CheckpointReader) -> Progress:
        return progress_of(reader, self.config, self.parts.data, self.parts.packing)

    def _start_or_go_on(self, resume: str, lock: RunLock | None) -> CheckpointReader | None:
        """Fill the engine from a checkpoint of the run, or from the weights that it is to start with."""
        warn = self._early_warning

        def choose(open_one: OpenCheckpoint) -> CheckpointReader | None:
            mended = mending(open_one, self._restorer.meanwhile, self.config, lock, warn)
            return choose_checkpoint(self.dir, resume, warn, mended)

        reader = self._load(choose)
        if reader:
            self._changes = changes(saved_config(reader), self.config)
            if resume != "auto":
                self.progress.started_from = str(Path(resume).resolve())
        elif self.config.model.init_from:
            load_weights(self.engine, self.config, self.parts.data, self._is_told)
        return reader

    def _find_rollbacks(self) -> None:
        """A run that went back and ended before it saved goes on as if it had just gone back."""
        if own_step(self.dir, self.resumed_from) is None:
            return
        found = together(
            self.engine, lambda: self.guard.find_rollbacks(self.progress.step) if self.engine.rank == 0 else []
        )
        for begin, end in self.engine.gather(found)[0]:
            self.guard.policy.leave_out(begin, end, self.guard.policy.rollbacks + 1)

    def _plan(self) -> None:
        """What follows from how far the run is, and from the data that it leaves out."""
        left_out = tuple(self.guard.policy.left_out)
        self.parts = replace(self.parts, layout=replace(self.parts.layout, left_out=left_out))
        step, position = self.progress.step, self.progress.position
        self.progress.packing = self.parts.packing
        stages = self.parts.stages([Stage(begin, tuple(w)) for begin, w in self.progress.stages], step, position)
        self.progress.stages = [[stage.begin, list(stage.weights)] for stage in stages]
        self.order = self.parts.order(stages)
        self.sources = SourceLog(self.config.data, self.order, position)
        self.total_steps = self.parts.total_steps(step, position)
        if self.progress.judge_by(self.parts.measure(self.total_steps)):
            self._changes.append("what validation measures; the best checkpoint is chosen anew")
        self.schedule = make_schedule(self.config.schedule, self.config.optimizer.lr, self.total_steps)

    def _make_store(self, saved_step: int | None) -> CheckpointStore:
        data, config = self.parts.data, self.config
        return CheckpointStore(
            self.dir,
            config.checkpoint,
            config.to_yaml(),
            data,
            saved_step=saved_step,
            last_save_s=self.progress.save_s,
            on_saved=self.mirror.saved,
            is_needed=self.mirror.holds,
        )

    def _check_surroundings(self) -> None:
        """Whether everything else that the run needs is there and usable."""
        self.parts.data.check_tokenizer()  # or the damage would go into every checkpoint, under a right hash
        self._samples = Samples(self.parts.data.tokenizer_folder, self.config)
        require_sinks(self.config)
        check_writable(self.dir)
        self.mirror.check_writable(self._early_warning)

    def _say(self, text: str) -> None:
        self.observer.message(text)

    def _early_warning(self, text: str) -> None:
        if self.engine.rank == 0:
            tell(f"llmtrain: warning: {text}", sys.stderr)

    def _open(self, lock: RunLock) -> None:
        """Write what a launch leaves before its first step."""
        self.progress.launches += 1
        warn, is_first = self._early_warning, self.engine.rank == 0
        together(self.engine, lambda: claim(self.dir, lock, self.progress, warn) if is_first else None)
        clear_way, deaf = self.mirror.clear_way, bool  # what is renamed file by file is not to be left half done
        patiently(self.engine, lambda: clear_way(self.progress.step, warn) if is_first else None, deaf)
        self.observer = together(self.engine, self._open_folder)
        together(self.engine, self._require_shared_folder)
        self._go_on_recording()
        if begun := self.resumed_from:
            self.observer.message(f"going on from {begun.folder} after step {self.progress.step:,}")
        for line in [*self._restorer.told, *(f"changed since then: {change}" for change in self._changes)]:
            self.observer.message(line)
        if self.config.training.eval_every and not self.parts.judges:
            self.observer.warn(
                f"no validation: the val split of {self.parts.data.where} has not one window of "
                f"{self.config.data.seq_len + 1} tokens; prepare with a larger --val-split"
            )

    def _go_on_recording(self) -> None:
        self.observer.load_state(self.progress.observer)
        if self.config.logging.sample_ledger:
            self.ledger = SampleLedger(self.dir, self.engine, self.progress.step)

    def _open_folder(self) -> Observer | NullObserver:
        """On rank 0: say in the folder what is run."""
        if self.engine.rank != 0:
            return NullObserver()
        with naming_what_cannot_be_written(self.dir):
            self.guard.rewind(self.progress.step)
            with replacing(self.dir / "config.yaml", durable=True) as file:
                file.write(self.config.to_yaml().encode())
            steps = (self.progress.step, self.total_steps)
            launch = provenance(self.parts.data, self.engine.device, self.engine.world_size, *steps)
            append_launch(self.dir / LAUNCHES, launch, self._early_warning)
        return self._make_observer(describe(self.parts, self.total_steps))

    def _make_observer(self, header: dict[str, str]) -> Observer:
        return Observer(
            self.config,
            run_dir=self.dir,
            resume_step=self.progress.step - (self.progress.unfinished is not None),
            total_steps=self.total_steps,
            steps_per_epoch=self.parts.layout.steps_per_epoch(),
            header=header,
        )

    def _require_shared_folder(self) -> None:
        """Every rank writes its part of a checkpoint into what rank 0 has just opened, so it must see that."""
        if not appears(self.dir / LAUNCHES, min(_NFS_S, self.config.health.timeout_s / 4)):
            raise UserError(f"{self.dir}: not seen here, though rank 0 made it; choose a run.dir that all hosts share")

    def batches(self) -> Iterator[Batch]:
        """The batches from here to the end of time."""
        return batches(
            self.parts.train,
            self.parts.layout,
            self.order,
            position=self.progress.position,
            workers=self.config.data.workers,
            as_int64=self.engine.device.type == "cpu",
            reading=lambda found: self.peers.reading(
                self.meter.reading(ahead(found, self.engine.device)), lambda: self.progress.step + 1
            ),
        )

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps happens now; at the last step everything does."""
        return every is not None and (self.progress.step % every == 0 or self.progress.step == self.total_steps)

    def validate(self, epoch: int, grad_norm: torch.Tensor) -> Validation | None:
        """Evaluate on the validation split, and on the sets beside it; for the arguments, see `_cut_short`."""
        parts, ids = self.parts, self.parts.data.tokenizer.vocab_size
        if not parts.judges:
            return None
        measure = partial(validate_each, self.engine, layout=parts.layout, limit=self.config.training.eval_batches)
        with self._cut_short(epoch, grad_norm):
            found, sets = (measure(sets, ids=ids, reading=self._arriving) for sets in (parts.val, parts.sets))
        return judged(found, sets, parts.last_weights(self.total_steps))

    @contextmanager
    def _cut_short(self, epoch: int, grad_norm: torch.Tensor) -> Iterator[None]:
        """Around what a signal may cut short after a step, of which epoch and gradient norm are kept then.

        Raises:
            Stopped: told to stop; saved. The resumed run begins with what follows that step.
        """
        try:
            with self.meter.paused():
                yield
        except StopAfterStep:
            self.progress.unfinished = {"epoch": epoch, "grad_norm": finite(grad_norm.item())}
            raise self._stopped(str(self.stopping.reason)) from None

    def unfinished(self) -> tuple[int, float, torch.Tensor]:
        """Epoch, learning rate and gradient norm of the last step, where a signal cut short what follows it."""
        kept = self.progress.unfinished or {}
        return (
            kept["epoch"],
            self.schedule(self.progress.step),
            torch.tensor(math.nan if kept["grad_norm"] is None else kept["grad_norm"], device=self.engine.device),
        )

    def _arriving(self, windows: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        phases: tuple[Phase, Phase] = ("validation data", "validation")
        moving = self.peers.reading(ahead(windows, self.engine.device), lambda: self.progress.step, phases)
        yield from self.stopping.until_told(moving, lambda: self.store.has_failed)
        self._now("validation")

    def _written(self, tokens: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        return self.stopping.until_told(self.peers.through(tokens), lambda: self.store.has_failed)

    def ask(self) -> None:
        """Begin to ask all ranks whether one was told to stop or failed to save; `stop_if_told` takes the answer."""
        self.stopping.ask(self.store.has_failed)

    def log(self, epoch: int, lr: float, grad_norm: torch.Tensor, val: Validation | None) -> None:
        """Make the record of this step: the only place where the host waits for the device."""
        self._now("logging")
        record = self.meter.record(
            step=self.progress.step,
            epoch=epoch,
            tokens=self.progress.tokens,
            lr=lr,
            grad_norm=grad_norm,
            val=val,
        )
        record = self.sources.add(record, self.progress.position, self.meter.source_losses, val)
        for line in self.sources.news():
            self.observer.message(line)
        self.observer.log(record)
        self.store.expect_saves(self.engine)
        if record.val_loss is not None and not math.isfinite(record.val_loss):
            raise DivergedError(self.guard.diagnosis(f"validation loss {record.val_loss} at step {record.step:,}"))

    def rolled_back(self, batch: Batch, lr: float, outcome: Outcome) -> bool:
        """Judge the step as soon as that costs no wait; return whether the run went back to an earlier one for it.

        Raises:
            DivergedError: going back is not possible, or has been tried often enough.
        """
        is_known = self.guard.add(self.progress.step, batch, lr, outcome)
        if not (is_known or self.due(self.config.logging.every) or self.due(self.config.training.eval_every)):
            return False
        stretch = self.guard.judge(batch, self.observer)
        if stretch:
            self._roll_back(stretch)
        return stretch is not None

    def _roll_back(self, stretch: Stretch) -> None:
        """In place, to the newest good checkpoint from before the stretch, whose data is left out from now on."""
        if self.guard.policy.rollbacks >= self.config.health.max_rollbacks:
            tried = f"after {self.guard.policy.rollbacks} times going back (health.max_rollbacks) the run gives up"
            raise DivergedError(self.guard.diagnosis(tried))
        self._settle()
        self._report_saves()
        self._now("going back")
        left, launches, origin = self.progress.step, self.progress.launches, self.progress.started_from
        reader = self._load(lambda open_one: newest_good(self.dir, self.observer.warn, open_one, before=stretch.step))
        if reader is None:
            raise DivergedError(self.guard.diagnosis(f"there is no checkpoint from before step {stretch.step:,}"))
        self.progress.launches, self.progress.started_from = launches, origin
        self.guard.go_back(stretch, self.progress.step, self.progress.guard, left)
        self._plan()
        self.meter.load_state(self.progress.meter)
        told = (
            f"at step {left:,} going back to {reader.folder}, to leave out samples {stretch.begin:,} to {stretch.end:,}"
        )
        self.observer.warn(
            f"{told}: {self.config.health.max_skips} steps had to be skipped since step {stretch.step:,}"
        )
        self.observer.close(f"rolled back to step {self.progress.step:,}", self.config.health.timeout_s / 2)
        self.observer = together(self.engine, self._reopen_folder)
        self.mirror.rewind(self.progress.step)  # now that what it leaves is no longer in the run folder
        self._go_on_recording()
        self.store.gone_back_to(self.progress.step)

    def _reopen_folder(self) -> Observer | NullObserver:
        if self.engine.rank != 0:
            return NullObserver()
        with naming_what_cannot_be_written(self.dir):
            clear_way(self.dir, self.progress.step, self.progress.best_step, self._early_warning)
        return self._make_observer({"going on": f"after step {self.progress.step:,} of {self.total_steps:,}"})

    def sample(self, epoch: int, grad_norm: torch.Tensor) -> None:
        """Let the model write, from each of the configured prompts; for the arguments, see `_cut_short`."""
        self._now("sampling")
        with self._cut_short(epoch, grad_norm), self.engine.evaluating() as model:
            for prompt, text in self._samples.write(model, self.engine.device, self._written):
                self.observer.sample(self.progress.step, prompt, text)

    def save(self, *links: str) -> None:
        """Save now; where the state could be copied the loop goes on. A step that is saved already is only linked."""
        self._settle()
        self._begin_save(*links)
        if not self.store.is_behind:
            self._settle()

    def _begin_save(self, *links: str) -> None:
        self._now("saving")
        self.progress.meter, self.progress.observer = self.meter.state(), self.observer.state()
        self.progress.guard, self.progress.save_s = self.guard.state(), self.store.last_save_s
        links = (*links, BEST) if self.progress.regain_best() else links
        with self.meter.paused():
            self.observer.flush()
            self.store.save(self.engine, self.progress.to_dict(), links, first_skip(self.progress.guard))

    def _settle(self) -> None:
        with self.meter.paused():
            self.saving.settle(self.observer.warn)
        self.stopping.has_save_failed = False

    def _now(self, phase: Phase) -> None:
        self.peers.progress(self.progress.step, phase)

    def _report_saves(self) -> None:
        committed, warnings = self.store.news()
        for folder in committed:
            with self.meter.paused():
                self.observer.saved(folder)
        for warning in [*warnings, *self.mirror.news()]:
            self.observer.warn(warning)

    def _save_for_good(self, *links: str) -> None:
        with self.meter.paused():
            self.saving.until_saved(lambda: self._begin_save(*links), self.observer.warn)
            self.mirror.wait(lambda: self.stopping.left_s, self._go_on, is_final=FINAL in links)
        self._report_saves()

    def _go_on(self, is_done: bool, is_late: bool) -> bool:
        """Whether all ranks are done with what they wait for, or one may not wait; who asks moves on, and is alive."""
        self.peers.alive()
        done, late = zip(*self.engine.gather((is_done, is_late)), strict=True)
        return all(done) or any(late)

    def stop_if_told(self) -> None:
        """Between two steps: obey a signal or `stop_after`, and notice a failed save.

        Raises:
            Stopped: told to stop; everything is saved.
            UserError: saving failed twice.
        """
        self.peers.progress(self.progress.step + 1, "between steps")
        self._report_saves()
        self.stopping.hear(self.store.has_failed)
        self.peers.progress(self.progress.step + 1, "between steps")  # nothing is asked any more: see Profiler
        if reason := self.stopping.reason:
            raise self._stopped(reason)
        if (last := self.config.training.stop_after) and self.progress.step >= last:
            raise self._stopped(f"training.stop_after={last}")
        if self.stopping.has_save_failed:
            self._settle()

    def _stopped(self, reason: str) -> Stopped:
        """Save; return what to raise."""
        step = self.progress.step
        if not step:
            return Stopped(f"stopped by {reason} before the first step: nothing to save; the same command begins again")
        was_saving = self.store.is_under_way
        self.saving.settle(self.observer.warn, forgiven=2)
        warning = self.stopping.too_short_for(self.store.last_save_s)
        if was_saving and any(self.engine.gather(warning is not None)) and (saved := self.store.saved_step):
            # A save was just finished: better to leave with that than to be killed in the next.
            self._report_saves()
            self.engine.barrier()
            return Stopped(
                f"stopped after step {step:,} by {reason}; too little of health.grace_s is left to save again; the "
                f"same command goes on from step {saved:,}"
            )
        if warning:
            self.observer.warn(warning)
        self._save_for_good()
        # The launcher ends all ranks of a machine soon after the first one left; rank 0 must have committed by then.
        self.engine.barrier()
        return Stopped(f"stopped after step {step:,} by {reason}; saved; the same command goes on from there")

    def has_stopped_improving(self) -> bool:
        """Whether early stopping ends the run."""
        patience = self.config.training.early_stopping_patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def finish(self) -> None:
        """Save as `final`, wait until it is on disk, and say how it went."""
        self.stopping.hear(self.store.has_failed)  # a signal changes nothing any more
        self._save_for_good(FINAL)
        outcome = f"done: {self.progress.step:,} of {self.total_steps:,} steps"
        if self.has_stopped_improving():
            outcome += f", validation no better for {self.progress.evaluations_since_best} evaluations"
        if self.progress.best_val_loss is not None:
            outcome += f"; best validation loss {self.progress.best_val_loss:.4f} at step {self.progress.best_step:,}"
        self._outcome = outcome  # told when no watchdog takes a sink that waits for its network for one that hangs

    @contextmanager
    def opened(self, lock: RunLock) -> Iterator[None]:
        """Claim the run folder for a loop; however that ends, the files are finished and the curves drawn."""
        self._open(lock)
        give_back_memory()
        watchdog = Watchdog(self.peers, self.config.health, self.dir, self.store.finish_within)
        with self.engine.evaluating() as model:
            hook = model.register_forward_hook(self.peers.forwarded)
        is_interrupted = False
        try:
            with self.peers.watched(), watchdog, profiled(self.config, self.engine, self.peers, self._say):
                yield
        except PeerLostError as error:
            self.store.hurry()
            self.mirror.hurry()
            end_within(self.config.health.timeout_s, error)
            raise
        except KeyboardInterrupt:  # at once: the process ends in the middle of a save, which then does not exist
            is_interrupted = True
            self.mirror.hurry(0)
            raise
        finally:
            hook.remove()
            if not is_interrupted:
                self.store.join()  # the folder is ours until nothing writes in it
            self.mirror.wait(lambda: self.stopping.left_s)
            for warning in self.mirror.news():
                self.observer.warn(warning)
            outcome = self._outcome or f"ended after step {self.progress.step:,} of {self.total_steps:,}"
            left_s = 0.0 if is_interrupted else min(self.stopping.left_s, self.config.health.timeout_s)
            self.observer.close(outcome, left_s, ending(sys.exception()))
