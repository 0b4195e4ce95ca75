"""The watchdog's limits and its judgement; what it does to real processes is in tests/distributed/test_hangs.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from llmtrain.config import HealthSection
from llmtrain.health.peers import Farewell, Here, Peers, PeerStatus, Phase
from llmtrain.health.watchdog import Limits, Watchdog, judge
from tests.health.test_peers import PLACES, Table

PHASES: tuple[Phase, ...] = get_args(Phase)
PATIENT: tuple[Phase, ...] = ("writing a checkpoint", "waiting for what other ranks write", "going back")
EXCHANGE_S = 600.0


def limits(fixed_s: float | None = None, **longest_s: float) -> Limits:
    return Limits(EXCHANGE_S, fixed_s, longest_s)  # type: ignore[arg-type]  # the phases that are one word


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1000.0]
    monkeypatch.setattr("llmtrain.health.peers.time.monotonic", lambda: now[0])
    yield now


@pytest.fixture
def peers() -> Peers:
    return Peers(Table(0, [None], None))  # type: ignore[arg-type]


# ---- what a run teaches ----


def test_a_rank_remembers_the_longest_it_took_in_each_phase(peers: Peers, clock: list[float]) -> None:
    peers.progress(1, "data")
    for step, took_s in enumerate((60.0, 2.0, 3.0), 1):
        peers.progress(step, "update")
        clock[0] += took_s
        peers.progress(step + 1, "data")
        clock[0] += 0.5
    assert (peers.longest_s["update"], peers.longest_s["data"]) == (60.0, 0.5)
    assert peers.idle_s == 0.5


def test_what_moves_on_within_a_phase_is_no_standstill(peers: Peers, clock: list[float]) -> None:
    def slow(count: int) -> Iterator[int]:
        for number in range(count):
            clock[0] += 5.0
            yield number

    peers.progress(1, "validation")
    for _ in peers.through(slow(100)):
        assert peers.idle_s == 0
    assert peers.longest_s["validation"] == 5.0
    place = peers.here
    peers.alive()
    assert peers.here == place  # ranks may differ in how often they do this


def test_reading_forward_and_backward_of_every_micro_batch_are_places_of_their_own(peers: Peers) -> None:
    seen: list[Here] = []

    def source() -> Iterator[int]:
        for number in range(3):
            seen.append(peers.here)
            yield number

    model = torch.nn.Linear(1, 1)
    for _ in peers.reading(source(), lambda: 7):
        seen.append(peers.here)
        peers.forwarded(model)
        seen.append(peers.here)
    assert [(here.step, here.phase) for here in seen] == 3 * [(7, "data"), (7, "forward"), (7, "backward")]
    assert [here.number for here in seen] == sorted({here.number for here in seen})


def test_an_evaluation_has_no_backward_pass(peers: Peers) -> None:
    model = torch.nn.Linear(1, 1).eval()
    for _ in peers.reading([1], lambda: 7, ("validation data", "validation")):
        peers.forwarded(model)
        assert peers.here.phase == "validation"


def test_the_first_use_of_a_micro_batch_which_may_compile_is_not_learned_from_its_reading(
    peers: Peers, clock: list[float]
) -> None:
    for number in peers.reading(range(2), lambda: 7, ("validation data", "validation")):
        assert ("validation" in peers.longest_s) == (number > 0)
        clock[0] += 90.0
    assert peers.longest_s["validation"] == 90.0


def test_forgiven_time_is_not_learned(peers: Peers, clock: list[float]) -> None:
    peers.progress(1, "data")
    clock[0] += 1e6
    peers.forgive()
    clock[0] += 2.0
    peers.progress(1, "update")
    assert peers.longest_s["data"] == 2.0


def test_before_a_phase_has_been_left_once_only_the_timeout_of_an_exchange_counts() -> None:
    for fixed_s in (None, 5.0):
        assert limits(fixed_s).ask_s("forward") == limits(fixed_s).own_s("backward") == 480
        assert limits(fixed_s).alone_s("update") == 1800


@pytest.mark.parametrize(("longest_s", "asks_s", "alone_s"), [(0.1, 180, 600), (20, 200, 600), (70, 480, 700)])
def test_a_limit_is_many_times_the_longest_and_below_the_timeout_where_others_wait(
    longest_s: float, asks_s: float, alone_s: float
) -> None:
    learned = limits(data=longest_s)
    assert (learned.ask_s("data"), learned.late_s("data"), learned.alone_s("data")) == (asks_s, 480, alone_s)


@pytest.mark.parametrize(("longest_s", "ends_s"), [(0.2, 3600), (500.0, 5000)])
@pytest.mark.parametrize("phase", PATIENT)
def test_what_takes_long_is_given_an_hour_or_ten_times_the_longest_but_lost_peers_are_looked_for_earlier(
    phase: Phase, longest_s: float, ends_s: float
) -> None:
    learned = Limits(EXCHANGE_S, None, {phase: longest_s})
    assert learned.ask_s(phase) == 480
    assert learned.own_s(phase) == learned.late_s(phase) == learned.alone_s(phase) == ends_s
    wanted = Limits(EXCHANGE_S, 30.0, {phase: longest_s})
    assert (wanted.own_s(phase), wanted.late_s(phase), wanted.alone_s(phase)) == (30, 45, 30)


def test_what_the_user_sets_wins_over_what_was_learned_and_can_switch_it_off() -> None:
    wanted = limits(30.0, data=20.0)
    assert (wanted.ask_s("data"), wanted.late_s("data"), wanted.alone_s("data")) == (30, 45, 30)
    off = limits(1e9, data=0.1)
    for phase in PHASES:
        assert min(off.ask_s(phase), off.own_s(phase), off.late_s(phase), off.alone_s(phase)) >= 1e9


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase not in PATIENT])
@pytest.mark.parametrize("longest_s", [None, 0.01, 100.0, 1e5])
def test_who_waits_for_another_ends_before_torch_would_abort_without_a_name(
    phase: Phase, longest_s: float | None
) -> None:
    learned = Limits(EXCHANGE_S, None, {} if longest_s is None else {phase: longest_s})
    assert learned.ask_s(phase) == learned.own_s(phase) <= learned.late_s(phase) < EXCHANGE_S


# ---- who is to blame ----

HERE = Here(50, 5, "update")
LEARNED = limits(update=1.0, data=1.0)  # asks after 180 s, ends for who is behind after 480 s, alone after 600 s


def peer(rank: int, number: int = 50, idle_s: float = 0.0, state: Any = "alive", said: str = "") -> PeerStatus:
    return PeerStatus(PLACES[rank], state, "", Here(number, 5, "data"), idle_s, Farewell(said) if said else None)


@pytest.mark.parametrize(("idle_s", "found", "culprits", "certain", "itself"), [
    (181, [peer(1, state="gone"), peer(2)], [1], True, False),
    (181, [peer(1, state="frozen"), peer(2)], [1], False, False),
    (181, [peer(1, state="frozen"), peer(2, state="gone")], [1, 2], True, False),
    (181, [peer(1, said="its disk is full"), peer(2)], [1], True, False),
    (181, [peer(1, number=49, idle_s=181), peer(2)], [], True, False),           # it knows its own limits
    (481, [peer(1, number=49, idle_s=481), peer(2)], [1], True, False),          # and the exchange ends soon
    (181, [peer(1, number=51, idle_s=181), peer(2, number=51)], [], True, True),
    (181, [peer(1, number=51, idle_s=3), peer(2, number=51, idle_s=3)], [], True, False),  # nobody waits yet
    (481, [peer(1, number=49), peer(2, number=51, idle_s=400)], [1], True, False),
    (599, [peer(1), peer(2)], [], True, False),                                  # all are slow alike
    (601, [peer(1), peer(2)], [], True, True),
    (599, [], [], True, False),
    (601, [], [], True, True),
])  # fmt: skip
def test_judgement(idle_s: float, found: list[PeerStatus], culprits: list[int], certain: bool, itself: bool) -> None:
    judgement = judge(0, HERE, idle_s, found, LEARNED)
    assert [status.place.rank for status in judgement.culprits] == culprits
    assert (judgement.is_certain, judgement.hangs_itself) == (certain, itself)
    assert judgement.ends == (certain and (itself or bool(culprits)))


@pytest.mark.parametrize(("phase", "number", "idle_s", "culprits", "itself"), [
    ("writing a checkpoint", 51, 3599, [], False),                # a slow disk
    ("writing a checkpoint", 51, 3600, [], True),
    ("waiting for what other ranks write", 49, 3599, [], False),
    ("waiting for what other ranks write", 49, 3600, [1], False),
])  # fmt: skip
def test_judgement_of_a_save(phase: Phase, number: int, idle_s: float, culprits: list[int], itself: bool) -> None:
    judgement = judge(0, Here(50, 5, phase), idle_s, [peer(1, number=number, idle_s=idle_s)], limits())
    assert [status.place.rank for status in judgement.culprits] == culprits
    assert (judgement.hangs_itself, judgement.ends) == (itself, itself or bool(culprits))


# ---- stacks ----


def test_stacks_that_cannot_be_written_to_the_run_folder_go_to_stderr(
    peers: Peers, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "is not there", tmp_path):
        Watchdog(peers, HealthSection(), folder, lambda _: None).dump_stacks()
        name = "test_stacks_that_cannot_be_written_to_the_run_folder_go_to_stderr"
        written = tmp_path / "stacks-rank00000.txt"
        assert name in (written.read_text() if written.exists() else capfd.readouterr().err)
    assert str(tmp_path / "stacks-rank00000.txt") in capfd.readouterr().err
