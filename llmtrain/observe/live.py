"""The console on a terminal: one live line with a bar, and everything else scrolling by above it."""

from __future__ import annotations

import time
from dataclasses import replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmtrain.observe import formats
from llmtrain.observe.pace import Pace
from llmtrain.observe.record import Record


class LiveConsole:
    """Shows the run on a terminal with rich."""

    _REFRESH_S = 0.1  # drawing takes a millisecond, and a small model makes hundreds of records a second

    def __init__(self, pace: Pace):
        self._pace = pace
        self._line = _Line()
        self._console = Console(highlight=False, markup=False, emoji=False)
        # Drawn with the records and not by a thread of its own: training has the interpreter to itself in between.
        self._live = Live(self._line, console=self._console, auto_refresh=False)
        self._drawn_at = 0.0
        self._val_loss: float | None = None

    def start(self, header: dict[str, str]) -> None:
        """Print what is run, as a table, and start the live line."""
        table = Table.grid(padding=(0, 2))
        for name, value in header.items():
            table.add_row(Text(name, "dim"), Text(value))
        self._console.print(table)
        self._live.start(refresh=True)

    def message(self, text: str) -> None:
        """Print one message above the live line."""
        self._console.print(Text(text))

    def warn(self, text: str) -> None:
        """Print one warning above the live line."""
        self._console.print(Text.assemble(("warning: ", "bold yellow"), (text, "yellow")))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Print what the model wrote after `prompt`, above the live line."""
        self._console.rule(Text(f"sample at step {formats.count(step)}", "dim"), style="dim", align="left")
        self._console.print(Text.assemble((formats.printable(prompt), "dim"), formats.printable(text.rstrip())))
        self._console.rule(style="dim")

    def record(self, record: Record) -> None:
        """Bring the live line up to date."""
        if record.val_loss is not None:
            self._val_loss = record.val_loss
        # The last validation loss stays on the line until there is a newer one.
        self._line.pieces = self._pace.pieces(replace(record, val_loss=self._val_loss))
        self._line.share = self._pace.share(record)
        if time.monotonic() - self._drawn_at >= self._REFRESH_S:
            self._live.refresh()
            self._drawn_at = time.monotonic()

    def close(self, outcome: str) -> None:
        """Leave the last line on the screen and print how the run ended."""
        self._live.stop()  # draws the line a last time and gives the cursor back
        self._console.print(Text(outcome))


class _Line:
    """The pieces of progress and a bar in one line; in a narrow terminal, those that tell most."""

    _STYLES = {"loss": "bold blue", "val": "bold red", "lr": "green", "eta": "bold"}  # noqa: RUF012 -- a constant
    _FIRST_TO_GO = ("mfu", "lr", "epoch", "speed", "percent", "val", "eta")
    _GAP = 2
    _BAR = range(8, 41)  # in columns

    def __init__(self) -> None:
        self.pieces = {"step": "waiting for the first record"}
        self.share = 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pieces = dict(self.pieces)
        for name in self._FIRST_TO_GO:
            if self._width(pieces) <= options.max_width:
                break
            pieces.pop(name, None)
        line = Table.grid(padding=(0, self._GAP, 0, 0), pad_edge=False)
        cells: list[Text | ProgressBar] = [Text(text, self._STYLES.get(name, "")) for name, text in pieces.items()]
        room = options.max_width - self._width(pieces) - self._GAP
        if room >= self._BAR.start:
            cells.append(ProgressBar(total=1.0, completed=self.share, width=min(room, self._BAR.stop - 1)))
        line.add_row(*cells)
        yield line

    def _width(self, pieces: dict[str, str]) -> int:
        return sum(len(text) + self._GAP for text in pieces.values()) - self._GAP
