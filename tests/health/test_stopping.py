"""What all ranks agree on after a signal, and how much of the grace is left for what."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from llmtrain.health.signals import STOP_SIGNALS, StopSignals
from llmtrain.health.stopping import Stopping


class Two:
    """The part of an engine by which two ranks agree; both stand in this process, and ask before either hears."""

    world_size = 2

    def __init__(self, asked: list[tuple[bool, ...]]):
        self._asked = asked

    def ask(self, *flags: bool) -> None:
        self._asked.append(flags)

    def hear(self) -> tuple[bool, ...]:
        return tuple(any(flags) for flags in zip(*self._asked, strict=True))


class Elsewhere:
    """The signals of a rank that gets none."""

    received: str | None = None
    received_at: float | None = None

    def is_told(self) -> bool:
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with StopSignals() as entered:
        yield entered
    for number, handler in before.items():
        signal.signal(number, handler)


def two(signals: Any, grace_s: float | None) -> tuple[Stopping, Stopping]:
    """The rank that gets the signal, and the other."""
    asked: list[tuple[bool, ...]] = []
    here, there = (Stopping(Two(asked), who, grace_s) for who in (signals, Elsewhere()))  # type: ignore[arg-type]
    return here, there


def agree(*ranks: Stopping) -> None:
    for rank in ranks:
        rank.ask(save_failed=False)
    for rank in ranks:
        rank.hear(save_failed=False)


def test_without_a_signal_there_is_all_the_time(signals: StopSignals, clock: list[float]) -> None:
    here, there = two(signals, 120.0)
    agree(here, there)
    clock[0] += 1e6
    for rank in (here, there):
        assert rank.reason is None and rank.left_s == math.inf
        assert rank.too_short_for(1e9) is None


def test_the_grace_runs_from_the_signal_and_not_from_when_it_was_heard_of(
    signals: StopSignals, clock: list[float]
) -> None:
    here, there = two(signals, 120.0)
    os.kill(os.getpid(), signal.SIGTERM)
    clock[0] += 50.0  # a long step
    assert here.reason is None and here.left_s == 70.0 and there.left_s == math.inf
    agree(here, there)
    assert (here.reason, there.reason) == ("SIGTERM", "a signal on another rank")
    assert (here.left_s, there.left_s) == (70.0, 120.0)
    clock[0] += 100.0
    assert (here.left_s, there.left_s) == (0.0, 20.0), "never negative"


@pytest.mark.parametrize(("took_s", "fits"), [(0.0, True), (30.0, True), (30.1, False)])
def test_a_save_is_compared_with_what_is_left(
    signals: StopSignals, clock: list[float], took_s: float, fits: bool
) -> None:
    here, there = two(signals, 120.0)
    os.kill(os.getpid(), signal.SIGTERM)
    clock[0] += 90.0
    agree(here, there)
    warning = here.too_short_for(took_s)
    if fits:
        assert warning is None
    else:
        assert warning == (
            "the last save took 30.1 s, and 30.0 s are left of health.grace_s=120; what sent SIGTERM may end this "
            "process before it has saved"
        )


def test_null_is_any_grace(signals: StopSignals, clock: list[float]) -> None:
    here, there = two(signals, None)
    os.kill(os.getpid(), signal.SIGTERM)
    clock[0] += 1e6
    agree(here, there)
    assert here.reason == "SIGTERM" and here.left_s == math.inf and here.too_short_for(1e9) is None
