"""The one thing the loop tells about the run; it passes everything on to files, console, sinks and plots."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llmtrain.config import RunConfig
from llmtrain.observe.console import open_console
from llmtrain.observe.files import LAUNCHES, SAMPLES, LineAppender, last_step, note_end, rewind
from llmtrain.observe.metrics import RECORDS, MetricsLog
from llmtrain.observe.record import Record
from llmtrain.observe.sinks import Sink, open_sinks
from llmtrain.observe.watch import Watch

_PLOTS_S = 10.0  # so much must be left of the grace to draw them
_LEAST_S = 1.0  # for sinks, also where a run is interrupted


class NullObserver:
    """The observer of every rank but the first: the same methods, and nothing happens."""

    def log(self, record: Record) -> None:
        """Ignore a record."""

    def message(self, text: str) -> None:
        """Ignore a message."""

    def warn(self, text: str) -> None:
        """Ignore a warning."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Ignore a sample."""

    def flush(self) -> None:
        """Have nothing to write."""

    def saved(self, path: Path) -> None:
        """Ignore a checkpoint."""

    def state(self) -> dict[str, Any]:
        """Have nothing to remember."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Have nothing to go on from."""

    def close(self, outcome: str, left_s: float = math.inf, end: dict[str, Any] | None = None) -> None:
        """Have nothing to close."""


class Observer(NullObserver):
    """The observer of the first rank.

    Only what a run cannot do without may stop it: its own files. A plot or a sink that fails costs a warning.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        run_dir: Path,
        resume_step: int,
        total_steps: int,
        steps_per_epoch: int,
        header: dict[str, str],
        sinks: Iterable[Sink] = (),
    ):
        """Open everything, forget what lies beyond `resume_step` (0: all), and say what is run.

        Args:
            config: resolved.
            run_dir: exists; it belongs to this run.
            resume_step: the step of the checkpoint that the run goes on from; 0 for a new run.
            total_steps: at which the run will be done.
            steps_per_epoch: optimizer steps.
            header: name → value, shown at the start: model, data, batch, device …
            sinks: more places for the records than the config names.

        Raises:
            UserError: the folder cannot be written, or a sink that is switched on cannot start.
        """
        self._records_path, self._resume_step = run_dir / RECORDS, resume_step
        self._launches_path = run_dir / LAUNCHES
        self._samples: LineAppender | None = None  # made with the first sample: most runs ask for none
        self._samples_path = run_dir / SAMPLES
        self._console = open_console(config.logging.console, total_steps, steps_per_epoch)
        # Sinks before files: what says how far they had come is kept until they have gone back.
        reached_step = max(last_step(self._records_path), last_step(self._samples_path))
        self._sinks = [*open_sinks(config, run_dir, resume_step, self.warn, reached_step), *sinks]
        self._metrics = MetricsLog(run_dir, csv=config.logging.csv, resume_step=resume_step)
        rewind(self._samples_path, resume_step)
        self._plotter = _Plotter(run_dir, config.run.name) if config.logging.plots else None
        self._watch = Watch()
        self._is_closed = False
        self._console.start(header)

    def log(self, record: Record) -> None:
        """Take in one record.

        Raises:
            UserError: the disk is full.
        """
        self._metrics.log(record)
        self._to_sinks(lambda sink: sink.log(record))
        for warning in self._watch.check(record):
            self.warn(warning)
        self._console.record(record)

    def message(self, text: str) -> None:
        """Say something."""
        self._console.message(text)

    def warn(self, text: str) -> None:
        """Say something that asks for attention."""
        self._console.warn(text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show and keep what the model wrote after `prompt` (`text` is without it).

        Raises:
            UserError: the disk is full.
        """
        if self._samples is None:
            self._samples = LineAppender(self._samples_path)
        self._samples.append(json.dumps({"step": step, "prompt": prompt, "text": text}))
        self._to_sinks(lambda sink: sink.text(step, prompt, text))
        self._console.sample(step, prompt, text)

    def flush(self) -> None:
        """Bring the files up to the last record, before a checkpoint that a resume would expect them from.

        Raises:
            UserError: the disk is full.
        """
        self._metrics.flush()

    def saved(self, path: Path) -> None:
        """A checkpoint is at `path`; redraw the plots when they are due."""
        self._console.saved(path)
        if self._plotter and self._plotter.is_due():
            self._attempt("the plots could not be drawn", self._plotter.draw)

    def state(self) -> dict[str, Any]:
        """What a resumed run must remember of the records so far; plain JSON values."""
        return {"watch": self._watch.state(), "records": self._metrics.digest()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`; warn if the records are others than then."""
        self._watch.load(state.get("watch", {}))
        expected = state.get("records")
        if expected and self._metrics.was_there and expected != self._metrics.digest():
            self.warn(
                f"{self._records_path}: not what was written up to step {self._resume_step:,}; lines were damaged, "
                "lost or edited, and the curves with them; the weights are not concerned"
            )

    def close(self, outcome: str, left_s: float = math.inf, end: dict[str, Any] | None = None) -> None:
        """Finish all files, draw the last plots where there is time, say how the run ended and where its curves are.

        `left_s` is what is left until this process is killed; sinks, which may wait for a network, get half of it.
        `end` (see `provenance.ending`) goes into run.json, where the launch ends.

        To be called however the run ends. Never raises, so that a full disk cannot hide why the run ended; a second
        call does nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._attempt("the last records could not be written", self._metrics.close)
        if end is not None:
            self._attempt("run.json does not say how the launch ended", lambda: note_end(self._launches_path, end))
        if self._samples:
            self._attempt("the last samples could not be written", self._samples.close)
        if self._plotter and left_s > _PLOTS_S:
            self._attempt("the plots could not be drawn", self._plotter.draw)
        self._close_sinks(max(left_s / 2, _LEAST_S))
        curves = "".join(f"\ncurves: {path}" for path in self._plotter.pictures) if self._plotter else ""
        with contextlib.suppress(OSError):  # nobody reads our output any more
            self._console.close(outcome + curves)

    def _close_sinks(self, within_s: float) -> None:
        if within_s == math.inf:
            self._to_sinks(lambda sink: sink.close())
            return
        names = ", ".join(type(sink).__name__ for sink in self._sinks)
        closing = threading.Thread(target=self._to_sinks, args=(lambda sink: sink.close(),), daemon=True)
        closing.start()
        closing.join(within_s)
        if closing.is_alive():
            self.warn(f"{names}: not closed within {within_s:.0f} s; the last records may be missing there")

    def _to_sinks(self, action: Callable[[Sink], None]) -> None:
        """Do `action` with every sink; one that fails is left out from now on."""
        self._sinks = [
            sink
            for sink in self._sinks
            if self._attempt(f"{type(sink).__name__} failed and gets no more records", lambda: action(sink))  # noqa: B023 -- called at once
        ]

    def _attempt(self, failure: str, action: Callable[[], object]) -> bool:
        """Do `action`; if it fails, for whatever reason, warn and return False."""
        try:
            action()
        except Exception as error:  # whatever a plotting library or a service raises is worth less than the run
            with contextlib.suppress(OSError):
                self._console.warn(f"{failure}: {type(error).__name__}: {error}")
            return False
        return True


class _Plotter:
    """Draws the plots of a run, now and then."""

    _EVERY_S = 60.0
    _SHARE = 0.02  # of the run's time
    _FIRST_GUESS_S = 2.0  # importing matplotlib and drawing two pictures, on a slow core

    def __init__(self, run_dir: Path, name: str | None, clock: Callable[[], float] = time.monotonic):
        self._run_dir, self._name, self._clock = run_dir, name, clock
        self._started = self._drawn = clock()
        self._spent_s = 0.0
        self._next_s = self._FIRST_GUESS_S
        self.pictures: list[Path] = []

    def is_due(self) -> bool:
        """Whether the plots are old enough, and one more drawing stays within its share of the time."""
        now = self._clock()
        within_share = self._spent_s + self._next_s <= self._SHARE * (now - self._started)
        return within_share and now - self._drawn >= self._EVERY_S

    def draw(self) -> None:
        """Draw them, and note what it took."""
        from llmtrain.observe.curves import plot_run  # imports matplotlib: half a second

        begun = self._clock()
        try:
            self.pictures = plot_run(self._run_dir, self._name)
        finally:
            self._drawn = self._clock()
            self._next_s = self._drawn - begun
            self._spent_s += self._next_s
