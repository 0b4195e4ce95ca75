"""The console on a terminal: a few live lines with a bar and curves, and everything else scrolling by above them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmtrain.errors import silence
from llmtrain.observe import formats
from llmtrain.observe.pace import Pace
from llmtrain.observe.record import Record
from llmtrain.observe.sparkline import Sparkline


class LiveConsole:
    """Shows the run on a terminal with rich."""

    _REFRESH_S = 0.1  # drawing takes a millisecond or two, and a small model makes hundreds of records a second

    def __init__(self, pace: Pace, is_forced: bool = False):
        """`is_forced`: draw also where rich would not take the output for a terminal."""
        self._pace = pace
        self._panel = _Panel()
        self._console = Console(
            file=cast(IO[str], _Terminal(sys.stdout)),
            highlight=False,
            markup=False,
            emoji=False,
            force_terminal=is_forced or None,
        )
        # Drawn with the records and not by a thread of its own: training has the interpreter to itself in between.
        self._live = Live(self._panel, console=self._console, auto_refresh=False)
        self._drawn_at = 0.0

    def start(self, header: dict[str, str]) -> None:
        """Print what is run, as a table, and start the live lines."""
        table = Table.grid(padding=(0, 2))
        for name, value in header.items():
            table.add_row(Text(name, "dim"), Text(value))
        self._console.print(table)
        self._live.start(refresh=True)

    def message(self, text: str) -> None:
        """Print one message above the live lines."""
        self._console.print(Text(text))

    def warn(self, text: str) -> None:
        """Print one warning above the live lines, which go on showing the last."""
        self._console.print(Text.assemble(("warning: ", "bold yellow"), (text, "yellow")))
        self._panel.warned(text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Print what the model wrote after `prompt`, above the live lines."""
        self._console.rule(Text(f"sample at step {formats.count(step)}", "dim"), style="dim", align="left")
        self._console.print(Text.assemble((formats.printable(prompt), "dim"), formats.printable(text.rstrip())))
        self._console.rule(style="dim")

    def saved(self, path: Path) -> None:
        """Show which checkpoint is the last."""
        self._panel.saved(path.name)

    def record(self, record: Record) -> None:
        """Bring the live lines up to date."""
        self._pace.take(record)
        self._panel.take(record, self._pace.pieces(), self._pace.share(record))
        if time.monotonic() - self._drawn_at >= self._REFRESH_S:
            self._live.refresh()
            self._drawn_at = time.monotonic()

    def close(self, outcome: str) -> None:
        """Leave the last lines on the screen and print how the run ended."""
        self._live.stop()  # draws the lines a last time and gives the cursor back
        self._console.print(Text(outcome))


class _Terminal:
    """The output as long as there is one: a terminal that was closed does not end the run."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """As that of the stream."""
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        """As that of the stream."""
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Panel:
    """Rows of pieces; in a narrow terminal, of each row those that tell most; in a low one, the first two rows."""

    _STYLES = {  # noqa: RUF012 -- a constant
        "loss": "bold blue", "loss curve": "blue", "val": "bold red", "val curve": "red", "lr": "green", "eta": "bold",
        "warnings": "yellow",
    }  # fmt: skip
    _ROWS = (
        ("step", "percent", "epoch", "eta"),
        ("loss", "loss curve", "val", "val curve", "best", "lr"),
        ("speed", "mfu", "memory", "slowest", "skipped", "saved"),
        ("sources", "sets"),
        ("warnings",),
    )
    _FIRST_TO_GO = (
        "sets", "best", "val curve", "loss curve", "memory", "slowest", "mfu", "lr", "epoch", "skipped", "percent",
        "saved", "eta", "val", "sources",
    )  # fmt: skip
    _LOW = 8  # rows of a terminal in which two are enough for us
    _GAP = 2
    _BAR = range(8, 41)  # in columns

    def __init__(self) -> None:
        self._pieces = {"step": "waiting for the first record"}
        self._share = 0.0
        self._curves = {"loss": Sparkline(), "val": Sparkline(16)}
        self._best: tuple[float, int] | None = None
        self._skipped = 0
        self._saved: tuple[str, float] | None = None
        self._warnings, self._last_warning = 0, ""

    def take(self, record: Record, pieces: Mapping[str, str], share: float) -> None:
        """Show these from now on; the last validation losses stay until there are newer ones."""
        kept = {name: text for name, text in self._pieces.items() if name in ("val", "sets")}
        self._pieces, self._share = {**kept, **pieces}, share
        self._curves["loss"].add(record.train_loss)
        self._skipped += record.skipped
        if record.val_loss is not None:
            self._curves["val"].add(record.val_loss)
            if self._best is None or record.val_loss < self._best[0]:
                self._best = record.val_loss, record.step

    def warned(self, text: str) -> None:
        """Another warning."""
        self._warnings, self._last_warning = self._warnings + 1, text

    def saved(self, name: str) -> None:
        """Another checkpoint."""
        self._saved = name, time.monotonic()

    def _all_pieces(self) -> dict[str, str]:
        pieces = {**self._pieces, **{f"{name} curve": str(curve) for name, curve in self._curves.items()}}
        if self._best:
            pieces["best"] = f"best {formats.loss(self._best[0])} at {formats.count(self._best[1])}"
        if self._skipped:
            pieces["skipped"] = f"{formats.count(self._skipped)} skipped"
        if self._saved:
            pieces["saved"] = f"saved {self._saved[0]}, {formats.age(time.monotonic() - self._saved[1])} ago"
        if self._warnings:
            plural = "s, the last" if self._warnings > 1 else ""
            pieces["warnings"] = f"{self._warnings} warning{plural}: {self._last_warning}"
        return {name: text for name, text in pieces.items() if text}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pieces, width = self._all_pieces(), options.max_width
        rows = [{name: pieces[name] for name in names if name in pieces} for names in self._ROWS]
        for number, row in enumerate(row for row in rows if row):
            if number < 2 or console.height > self._LOW:
                yield self._line(row, width, has_bar=number == 0)

    def _line(self, row: dict[str, str], width: int, has_bar: bool) -> Table:
        for name in self._FIRST_TO_GO:
            if self._width(row) <= width:
                break
            row.pop(name, None)
        line = Table.grid(padding=(0, self._GAP, 0, 0), pad_edge=False)
        cells: list[Text | ProgressBar] = [
            Text(text, self._STYLES.get(name, ""), overflow="ellipsis", no_wrap=True) for name, text in row.items()
        ]
        room = width - self._width(row) - self._GAP
        if has_bar and room >= self._BAR.start:
            cells.insert(1, ProgressBar(total=1.0, completed=self._share, width=min(room, self._BAR.stop - 1)))
        line.add_row(*cells)
        return line

    def _width(self, pieces: dict[str, str]) -> int:
        return sum(len(text) + self._GAP for text in pieces.values()) - self._GAP
