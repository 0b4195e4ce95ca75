"""A sink of llmtrain that prints a line for each record, as other trainers do; the console itself prints fewer."""

from __future__ import annotations

from typing import Any


class RecordLines:
    """See docs/sinks.md."""

    def __init__(self, config: Any, run_dir: Any, resume_step: int):
        pass

    def log(self, record: Any) -> None:
        print(f"record of step {record.step}/", flush=True)

    def text(self, step: int, prompt: str, text: str) -> None:
        """Samples are not printed."""

    def close(self) -> None:
        """Nothing is open."""
