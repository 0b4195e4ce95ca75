"""The progress bar of verbs that go through a known number of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Report(Protocol):
    """Takes the number of bytes that were just dealt with, and a note that stands beside the bar from then on."""

    def __call__(self, done: int, note: str = "") -> None:
        """Move the bar."""
        ...


@contextmanager
def progress_bar(description: str, total_bytes: int, show: bool) -> Iterator[Report]:
    """Give a function that moves a bar on the terminal (standard error), or, if it is not to be shown, does nothing."""
    if not show:
        yield _ignore
        return
    # Here, because rich takes longer to import than small data to prepare.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total_bytes, note="")

        def report(done: int, note: str = "") -> None:
            bar.update(task, advance=done, note=note)

        yield report


def _ignore(done: int, note: str = "") -> None:
    pass
