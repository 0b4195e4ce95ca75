"""Ends a run that hangs, and says which rank hangs where; a thread beside the loop, which wakes once a second.

`Peers` knows when this rank last moved on. Where that is longer ago than a limit, the peers are asked:

  a peer is gone, frozen or cut off   this rank waits for it in vain: name it and end
  a peer is ahead and waits           this rank is the one that hangs: say so to the peers and end
  a peer is behind                    it has a watchdog of its own, which knows its own limits; end for it only shortly
                                      before the exchange between us would time out
  nobody is ahead or behind           all do the same, slowly or in vain; write down the stacks, be very patient, and
                                      leave what is an exchange to its own timeout, which names what it can

Before a process ends so, the Python stacks of all its threads are in the run folder, and those of the peers that it
names, or of all where it can name nobody (each peer's own thread writes them, unless it is frozen).

Ending a run that would have gone on is worse than finding a hang a few minutes late. So a limit is many times what the
phase ever took, what moves on within a phase (a validation batch, a sampled token) counts, and a process that was
stopped as a whole starts anew.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from llmtrain.config import HealthSection
from llmtrain.errors import PeerLostError, end_at_once
from llmtrain.health.peers import STACKS_TELL, Farewell, Here, Peers, PeerStatus, Phase, blame

_PERIOD_S = 1.0
_STOPPED_S = 2.0  # who sleeps so much longer than asked was stopped as a whole
_DEAF_S = 10.0  # to wait in vain after a peer has said that it ends; what it said ends an exchange over gloo at once
_CONFIRMATIONS = 3  # questions in a row that a peer leaves without an answer before it is given up
_MOST_ASKED = 100  # peers that are asked for their stacks
_WRITE_S = 5.0  # for stacks and exit code: the file system may be what hangs
_EXCHANGE_SHARE = 0.8  # of health.timeout_s: end before torch's own watchdog does, which names nobody
# How long the loop waits for a write says little of how long that takes, behind its back; and going back is rare.
_PATIENT: tuple[Phase, ...] = ("writing a checkpoint", "waiting for what other ranks write", "going back")


@dataclass(frozen=True)
class Limits:
    """Seconds without moving on, in a phase, after which something is done.

    Args:
        timeout_s: of an exchange.
        fixed_s: what the user wants instead of what is learned; it holds for phases that this launch has left before,
            for the first step compiles and warms up.
        longest_s: the longest that each phase took so far.
    """

    timeout_s: float
    fixed_s: float | None
    longest_s: Mapping[Phase, float]

    _FACTOR = 10.0
    _FLOOR_SHARE = 0.3  # of timeout_s

    def ask_s(self, phase: Phase) -> float:
        """Ask the peers, and end where one of them is gone."""
        seen_s = self.longest_s.get(phase)
        if seen_s is None:
            return max(self._before_timeout_s, self.fixed_s or 0)
        if self.fixed_s is not None:
            return self.fixed_s
        if phase in _PATIENT:
            return self._before_timeout_s
        return min(max(self._FACTOR * seen_s, self._FLOOR_SHARE * self.timeout_s), self._before_timeout_s)

    def own_s(self, phase: Phase) -> float:
        """End where peers wait for this rank."""
        return self._patience_s(phase) if phase in _PATIENT else self.ask_s(phase)

    def late_s(self, phase: Phase) -> float:
        """End for a peer that is behind, though it answers and does not end by itself."""
        if self.fixed_s is not None:
            return 1.5 * self.own_s(phase)
        return self._patience_s(phase) if phase in _PATIENT else max(self.ask_s(phase), self._before_timeout_s)

    def alone_s(self, phase: Phase) -> float:
        """End though no other rank is involved."""
        seen_s = self.longest_s.get(phase)
        if phase in _PATIENT:
            return self._patience_s(phase)
        if seen_s is None:
            return max(self.ask_s(phase), 3 * self.timeout_s)
        return self.ask_s(phase) if self.fixed_s is not None else max(self.timeout_s, self._FACTOR * seen_s)

    def _patience_s(self, phase: Phase) -> float:
        seen_s = self.longest_s.get(phase)
        if self.fixed_s is not None and seen_s is not None:
            return self.fixed_s
        return max(6 * self.timeout_s, self.fixed_s or 0, self._FACTOR * (seen_s or 0))

    @property
    def _before_timeout_s(self) -> float:
        return _EXCHANGE_SHARE * self.timeout_s


@dataclass(frozen=True)
class Judgement:
    """What a rank that does not move on has found."""

    hangs_itself: bool = False
    culprits: tuple[PeerStatus, ...] = ()
    is_certain: bool = True  # False: ask again, for who does not answer may only be very busy
    is_stuck_with_all: bool = False  # nobody is to blame: at least the stacks are of interest

    @property
    def ends(self) -> bool:
        """Whether this rank ends now."""
        return self.is_certain and (self.hangs_itself or bool(self.culprits))


def judge(rank: int, here: Here, idle_s: float, found: list[PeerStatus], limits: Limits) -> Judgement:
    """Who is to blame where `rank` is `here` and has not moved on for longer than `limits.ask_s`."""
    phase = here.phase
    if any(not status.is_fine for status in found):
        culprits = tuple(blame(rank, here, found))
        silent = all(status.state in ("frozen", "unreachable") and not status.farewell for status in culprits)
        return Judgement(culprits=culprits, is_certain=not silent)
    behind = tuple(status for status in found if status.here.number < here.number)
    if behind:
        return Judgement(culprits=behind) if idle_s >= limits.late_s(phase) else Judgement()
    ahead = [status for status in found if status.here.number > here.number]
    if any(status.idle_s >= limits.own_s(phase) / 2 for status in ahead):
        return Judgement(hangs_itself=idle_s >= limits.own_s(phase))
    return Judgement(hangs_itself=not ahead and idle_s >= limits.alone_s(phase), is_stuck_with_all=not ahead)


class Watchdog:
    """Watches this rank's loop while entered.

    Args:
        peers: this rank's, and how to ask the others.
        config: the limits.
        folder: where stacks are written.
        settle_saves: waits, for so many seconds at most, for a save that is under way.
    """

    def __init__(self, peers: Peers, config: HealthSection, folder: Path, settle_saves: Callable[[float], None]):
        self._peers, self._settle_saves = peers, settle_saves
        self._limits = Limits(config.timeout_s, config.hang_after_s, peers.longest_s)
        self._stacks = folder / f"stacks-rank{peers.rank:05d}.txt"
        self._ask_at_s, self._silences = 0.0, 0
        self._dumped_at: Here | None = None
        self._is_over, self._is_ending = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._peers.dump_stacks = self._dump_once
        self._peers.forgive()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._is_ending:  # it ends the process; what else it may do, asking a peer, is not waited for
            self._thread.join()

    def _watch(self) -> None:
        asleep_since = time.monotonic()
        while not self._is_over.wait(_PERIOD_S):
            if time.monotonic() - asleep_since > _PERIOD_S + _STOPPED_S:
                self._peers.forgive()
            self._look(self._peers.here, self._peers.idle_s)
            asleep_since = time.monotonic()

    def _look(self, here: Here, idle_s: float) -> None:
        limit_s = self._limits.ask_s(here.phase)
        if self._peers.farewells:
            limit_s = min(limit_s, _DEAF_S)
        if idle_s < limit_s:
            self._ask_at_s, self._silences = 0.0, 0
        if idle_s < max(limit_s, self._ask_at_s):
            return
        found = self._peers.diagnose()
        if self._peers.here != here or self._peers.idle_s < idle_s:
            return  # it has moved on meanwhile
        judgement = judge(self._peers.rank, here, idle_s, found, self._limits)
        self._silences = 0 if judgement.is_certain else self._silences + 1
        if judgement.ends or self._silences >= _CONFIRMATIONS:
            self._end(judgement, found, here, idle_s)
        elif judgement.is_stuck_with_all and idle_s >= self._limits.late_s(here.phase):
            self._dump_once()
        self._ask_at_s = self._next_question_s(here.phase, idle_s)

    def _next_question_s(self, phase: Phase, idle_s: float) -> float:
        """When to ask next: soon where somebody did not answer; else ever more seldom, for there may be many ranks."""
        if self._silences:
            return idle_s + min(10.0, self._limits.ask_s(phase) / 4)
        milestones = (self._limits.own_s(phase), self._limits.late_s(phase), self._limits.alone_s(phase))
        return min([1.2 * idle_s, *(at_s for at_s in milestones if at_s > idle_s)])

    def _dump_once(self) -> None:
        """Also where several peers ask for it."""
        here = self._peers.here
        if self._dumped_at != here:
            self._dumped_at = here
            self.dump_stacks()

    def dump_stacks(self) -> None:
        """Write down what all threads of this process are doing; on stderr where the run folder cannot be written."""
        if _within(_WRITE_S, self._write_stacks):
            _tell(f"{self._peers.name}, {self._peers.here}: the stacks of its threads are in {self._stacks}")
        else:
            _tell(f"{self._stacks} cannot be written; the stacks of {self._peers.name}, {self._peers.here}:")
            faulthandler.dump_traceback(file=2)

    def _write_stacks(self) -> None:
        with self._stacks.open("a", encoding="utf-8") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{now}, process {os.getpid()}, {self._peers.here}, for {self._peers.idle_s:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file)
            file.write("\n")

    def _end(self, judgement: Judgement, found: list[PeerStatus], here: Here, idle_s: float) -> None:
        if self._is_over.is_set():
            return
        for_how_long = f"it has not moved on for {idle_s:.0f} s"
        if judgement.hangs_itself:
            verdict = Farewell(f"{for_how_long} {here}")
            waiting = f"; {len(found)} other rank{'s wait' if len(found) > 1 else ' waits'} for it" if found else ""
            if found and judgement.is_stuck_with_all:
                others = f"so have {len(found)} others" if len(found) > 1 else "so has the other"
                waiting = f"; {others}: one rank hangs inside this phase ({STACKS_TELL}), or all do"
                self._ask_for_stacks(found)
            said = f"{self._peers.name} hangs {here}: {for_how_long}{waiting}; its stacks are in {self._stacks}"
        else:
            verdict = self._peers.verdict(found, for_how_long)
            said = f"{verdict.reason}; stacks are in {self._stacks.with_name('stacks-rank*.txt')}"
            self._ask_for_stacks(judgement.culprits)
        self.dump_stacks()
        self._is_ending = True
        if self._is_over.is_set() or self._peers.here != here:
            self._is_ending = False
            return  # it has moved on after all
        self._peers.farewell(verdict, [status.place for status in found if status.state == "alive"])
        if not (judgement.hangs_itself and here.phase in _PATIENT):
            self._settle_saves(self._limits.timeout_s)
        end_at_once(PeerLostError(f"{said}; the same command goes on from the last checkpoint"))

    def _ask_for_stacks(self, of: Iterable[PeerStatus]) -> None:
        asked = [status.place for status in of if status.state == "alive"]
        self._peers.ask_for_stacks(asked[:_MOST_ASKED])


def _within(seconds: float, work: Callable[[], object]) -> bool:
    """Whether the work is done without an error, and in time: a thread that hangs in a file system is left behind."""
    is_done = threading.Event()

    def run() -> None:
        try:
            work()
        except OSError as error:
            _tell(f"watchdog: {error}")
        else:
            is_done.set()

    threading.Thread(target=run, name="watchdog-write", daemon=True).start()
    return is_done.wait(seconds)


def _tell(text: str) -> None:
    """Say something on stderr without Python's buffer, which the thread that hangs may hold."""
    os.write(2, f"llmtrain: {text}\n".encode(errors="replace"))
