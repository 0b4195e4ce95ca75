"""Who of the other ranks is alive, and where: asked only when an exchange with them has failed, or lasts too long.

The libraries name no rank ("Timed out waiting 10000ms for recv operation to complete"). So at start every rank opens a
port at which the others can ask it (`status_port`), and the table of these is exchanged once. While all is well nothing
is sent, and `progress` takes a few microseconds. When an exchange fails, or takes longer than `health.timeout_s`,
`watched` asks all peers at once and raises `PeerLostError`, which names those that are gone, frozen or unreachable; if
none is, those that are behind in the loop; and counts those that are fine.

A rank that ends by an error says so to its peers first (`farewell`), with the ranks that it lost itself: those that
fail next, because this one has left, then name the first cause and not the chain.

This is for exchanges that fail in Python, as gloo's do. `watchdog` asks earlier, while nothing has failed yet.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, TypeVar

from torch import nn

from llmtrain.engine import Engine
from llmtrain.engine.rendezvous import brief, is_exchange_failure, own_address
from llmtrain.errors import LlmtrainError, PeerLostError, Stopped
from llmtrain.health.status_port import Message, Place, Silence, StatusPort, ask

# Where the host is; a GPU may still be busy with what the host asked of it before.
Phase = Literal[
    "start", "between steps", "data", "forward", "backward", "update", "validation data", "validation", "logging",
    "sampling", "saving", "writing a checkpoint", "waiting for what other ranks write", "going back",
]  # fmt: skip
_MOST_NAMED = 4
STACKS_TELL = "run.dir/stacks-rank*.txt tell: the others are in an exchange"
Item = TypeVar("Item")
Result = TypeVar("Result")


class Here(NamedTuple):
    """A place in the loop. All ranks come by the same places in the same order, so their numbers compare."""

    number: int
    step: int
    phase: Phase

    def __str__(self) -> str:
        return f"at step {self.step:,}, {self.phase}" if self.step else "before the first step"


_START = Here(0, 0, "start")


@dataclass(frozen=True, slots=True)
class Farewell:
    """What a rank says before it ends."""

    reason: str
    lost: tuple[int, ...] = ()  # the ranks that it ends for; empty: it has a reason of its own


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What asking a peer gave; of one that does not answer, the place in the loop is not known."""

    place: Place
    state: Literal["alive", "gone", "frozen", "unreachable"]
    detail: str = ""  # what the operating system says
    here: Here = _START
    idle_s: float = 0.0  # since it last moved on
    farewell: Farewell | None = None

    @property
    def is_fine(self) -> bool:
        """Whether it is there and means to stay."""
        return self.state == "alive" and self.farewell is None

    def __str__(self) -> str:
        found = {
            "alive": f"is behind, for {self.idle_s:.0f} s {self.here}",
            "gone": f"its process is gone ({self.detail})",
            "frozen": f"its process is stopped or stuck ({self.detail}, though its host accepts)",
            "unreachable": f"its host or the link to it is down ({self.detail})",
        }
        return f"{self.place}: {f'it ended: {self.farewell.reason}' if self.farewell else found[self.state]}"


class Peers:
    """The other ranks of this launch; there may be none. All ranks make theirs at the same time."""

    def __init__(self, engine: Engine):
        self.rank = engine.rank
        self.here, self._moved_at = _START, time.monotonic()
        self.longest_s: dict[Phase, float] = {}  # that this rank ever took to move on, for each phase it has left
        self.dump_stacks: Callable[[], object] = lambda: None
        self.listener: Callable[[int, Phase], object] | None = None  # told of each new place
        self._others: list[Place] = []
        self.farewells: dict[int, Farewell] = {}  # of ranks that have ended
        self._is_leaving = False
        if engine.world_size > 1:
            self._port = StatusPort(engine.rank, own_address(), self._answer)
            self._others = [place for place in engine.gather(self._port.place) if place.rank != self.rank]
            engine.before_gather = self._prepared

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._others:
            self._port.close()

    def progress(self, step: int, phase: Phase) -> None:
        """Note where in the loop this rank is."""
        self.alive()
        self.here = Here(self.here.number + 1, step, phase)
        if self.listener:
            self.listener(step, phase)

    def _prepared(self) -> None:
        """Before the first step, the exchanges are the places that all ranks come by."""
        if self.here.phase == _START.phase:
            self._moved_at = time.monotonic()  # how long that took is no measure for what is left to prepare
            self.here = Here(self.here.number + 1, *_START[1:])

    def alive(self) -> None:
        """Note that this rank moves on within its phase."""
        now = time.monotonic()
        took_s = now - self._moved_at
        phase = self.here.phase
        if took_s > self.longest_s.get(phase, -1.0):
            self.longest_s[phase] = took_s
        self._moved_at = now

    def through(self, items: Iterable[Item]) -> Iterator[Item]:
        """Go through items, each of which shows that this rank moves on."""
        for item in items:
            self.alive()
            yield item

    def reading(
        self, micro_batches: Iterable[Item], step: Callable[[], int], phases: tuple[Phase, Phase] = ("data", "forward")
    ) -> Iterator[Item]:
        """Go through micro-batches, of which all ranks have equally many; `phases` are their reading and their use."""
        source = iter(micro_batches)
        while True:
            self.progress(step(), phases[0])
            try:
                item = next(source)
            except StopIteration:
                return
            self.progress(step(), phases[1])
            yield item

    def forwarded(self, model: nn.Module, *_: object) -> None:
        """Forward hook of the model: in training, the backward pass follows."""
        if model.training:
            self.progress(self.here.step, "backward")

    @property
    def idle_s(self) -> float:
        """Seconds since this rank last moved on."""
        return time.monotonic() - self._moved_at

    def forgive(self) -> None:
        """Forget how long this rank has not moved: it was stopped as a whole, by a scheduler or with its machine."""
        self._moved_at = time.monotonic()

    @property
    def name(self) -> str:
        """This rank and its host."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def diagnose(self) -> list[PeerStatus]:
        """Ask all peers at once; takes a few seconds where one does not answer, else milliseconds."""
        return _at_once(self._status, self._others)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Name the peer where an exchange fails; tell the peers where this rank ends for a reason of its own.

        Raises:
            PeerLostError: an exchange failed.
        """
        try:
            yield
        except (Stopped, PeerLostError):
            raise
        except Exception as error:
            if not self._others or self._is_leaving:
                raise
            if is_exchange_failure(error):
                found = self.diagnose()
                verdict = self.verdict(found, brief(error))
                self.farewell(verdict, [status.place for status in found if status.state == "alive"])
                raise PeerLostError(f"{verdict.reason}; the same command goes on from the last checkpoint") from error
            kind = "" if isinstance(error, LlmtrainError) else f"{type(error).__name__}: "
            self.farewell(Farewell(kind + brief(error)), self._others)
            raise

    def farewell(self, farewell: Farewell, to: list[Place]) -> None:
        """Say that this rank ends, and why."""
        self._is_leaving = True
        message = {"rank": self.rank, "reason": farewell.reason[:2000], "lost": farewell.lost[:100]}
        _at_once(lambda place: ask(place, message), to)

    def verdict(self, found: list[PeerStatus], failure: str) -> Farewell:
        """Why this rank cannot go on, and the ranks to blame.

        Args:
            found: the outcome of `diagnose`.
            failure: what the library that gave up says.
        """
        culprits = blame(self.rank, self.here, found)
        fine = sum(status.is_fine for status in found if status not in culprits)
        if culprits:
            names = "; ".join(str(status) for status in culprits[:_MOST_NAMED])
            if len(culprits) > _MOST_NAMED:
                names += f"; {len(culprits) - _MOST_NAMED} more ranks are lost"
            if fine:
                names += f"; {fine} other rank{'s are' if fine > 1 else ' is'} fine"
        else:
            inside = "" if self.here.phase == "start" else f"one rank hangs inside this phase ({STACKS_TELL}), "
            names = (
                f"all {len(found)} other ranks answer and none is behind: {inside}the network loses or delays what is "
                "sent, or health.timeout_s is too short for one exchange"
            )
        lost = tuple(status.place.rank for status in culprits)
        reason = f"{self.name} cannot go on {self.here}: {names}; what failed: {failure}"
        return Farewell(reason, lost)

    def ask_for_stacks(self, places: list[Place]) -> None:
        """Let peers write down what their threads are doing."""
        _at_once(lambda place: ask(place, {"rank": self.rank, "dump": True}), places)

    def _status(self, place: Place) -> PeerStatus:
        answer = ask(place, {"rank": self.rank})
        farewell = self.farewells.get(place.rank)  # looked up last, for it is said before the process goes
        if isinstance(answer, Silence):
            return PeerStatus(place, answer.state, answer.detail, farewell=farewell)
        return PeerStatus(place, "alive", "", Here(*answer["here"]), answer["idle_s"], farewell)

    def _answer(self, question: Message) -> Message:
        if "reason" in question:
            self.farewells[question["rank"]] = Farewell(question["reason"], tuple(question["lost"]))
        if "dump" in question:
            self.dump_stacks()
        return {"here": self.here, "idle_s": self.idle_s}


def blame(rank: int, here: Here, found: list[PeerStatus]) -> list[PeerStatus]:
    """Those of its peers for whom `rank`, which is `here` in the loop, waits in vain.

    Who has left because it had lost a third rank is not to blame, but that third rank. A rank that is only behind is to
    blame where no other has left.
    """
    lost = {other for status in found if status.farewell for other in status.farewell.lost}
    victims = {status.place.rank for status in found if status.farewell and set(status.farewell.lost) - {rank}}
    left = [status for status in found if not status.is_fine]
    first = [status for status in left if status.place.rank in lost or status.place.rank not in victims]
    behind = [status for status in found if status.here.number < here.number]
    return first or left or behind


def _at_once(work: Callable[[Place], Result], places: Iterable[Place]) -> list[Result]:
    with ThreadPoolExecutor(max_workers=256) as pool:
        return list(pool.map(work, places))
