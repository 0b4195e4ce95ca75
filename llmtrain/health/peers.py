"""Who of the other ranks is alive, and where: asked only when an exchange with them has failed.

The libraries name no rank ("Timed out waiting 10000ms for recv operation to complete"). So at start every rank opens a
port at which the others can ask it (`status_port`), and the table of these is exchanged once. While all is well nothing
is sent, and `progress` costs three attribute writes. When an exchange fails, or takes longer than `health.timeout_s`,
`watched` asks all peers at once and raises `PeerLostError`, which names those that are gone, frozen or unreachable; if
none is, those that are behind in the loop; and counts those that are fine.

A rank that ends by an error says so to its peers first (`farewell`), with the ranks that it lost itself: those that
fail next, because this one has left, then name the first cause and not the chain.

This is for exchanges that fail in Python, as gloo's do. Over NCCL torch's own watchdog aborts the process instead,
after the same time, and nobody is named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

from llmtrain.engine import Engine
from llmtrain.engine.rendezvous import brief, is_exchange_failure, own_address
from llmtrain.errors import LlmtrainError, PeerLostError, Stopped
from llmtrain.health.status_port import Message, Place, Silence, StatusPort, ask

# In the order of the loop: of two ranks at the same step, the one in the earlier phase keeps the other waiting.
PHASES = ("start", "data", "forward, backward and update", "validation", "logging", "sampling", "saving")
_MOST_NAMED = 4
Result = TypeVar("Result")


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
    step: int = 0
    phase: str = PHASES[0]
    idle_s: float = 0.0  # since it came to this step and phase
    farewell: Farewell | None = None

    @property
    def is_fine(self) -> bool:
        """Whether it is there and means to stay."""
        return self.state == "alive" and self.farewell is None

    def __str__(self) -> str:
        found = {
            "alive": f"is behind, for {self.idle_s:.0f} s at step {self.step:,}, {self.phase}",
            "gone": f"its process is gone ({self.detail})",
            "frozen": f"its process is stopped or stuck ({self.detail}, though its host accepts)",
            "unreachable": f"its host or the link to it is down ({self.detail})",
        }
        return f"{self.place}: {f'it ended: {self.farewell.reason}' if self.farewell else found[self.state]}"


class Peers:
    """The other ranks of this launch; there may be none. All ranks make theirs at the same time."""

    def __init__(self, engine: Engine):
        self.rank = engine.rank
        self._step, self._phase, self._since = 0, PHASES[0], time.monotonic()
        self._others: list[Place] = []
        self._farewells: dict[int, Farewell] = {}
        self._is_leaving = False
        if engine.world_size > 1:
            self._port = StatusPort(engine.rank, own_address(), self._answer)
            self._others = [place for place in engine.gather(self._port.place) if place.rank != self.rank]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._others:
            self._port.close()

    def progress(self, step: int, phase: str) -> None:
        """Note where in the loop this rank is; `phase` is one of PHASES."""
        self._step, self._phase, self._since = step, phase, time.monotonic()

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
        culprits = blame(self.rank, (self._step, self._phase), found)
        fine = sum(status.is_fine for status in found if status not in culprits)
        if culprits:
            names = "; ".join(str(status) for status in culprits[:_MOST_NAMED])
            if len(culprits) > _MOST_NAMED:
                names += f"; {len(culprits) - _MOST_NAMED} more ranks are lost"
            if fine:
                names += f"; {fine} other rank{'s are' if fine > 1 else ' is'} fine"
        else:
            names = (
                f"all {len(found)} other ranks answer and none is behind: the network loses or delays what is sent, or "
                "health.timeout_s is too short for one exchange"
            )
        where = f"at step {self._step:,}, {self._phase}" if self._step else "before the first step"
        lost = tuple(status.place.rank for status in culprits)
        reason = f"rank {self.rank} on {self._port.place.host} cannot go on {where}: {names}; what failed: {failure}"
        return Farewell(reason, lost)

    def _status(self, place: Place) -> PeerStatus:
        answer = ask(place, {"rank": self.rank})
        farewell = self._farewells.get(place.rank)  # looked up last, for it is said before the process goes
        if isinstance(answer, Silence):
            return PeerStatus(place, answer.state, answer.detail, farewell=farewell)
        return PeerStatus(place, "alive", "", answer["step"], answer["phase"], answer["idle_s"], farewell)

    def _answer(self, question: Message) -> Message:
        if "reason" in question:
            self._farewells[question["rank"]] = Farewell(question["reason"], tuple(question["lost"]))
        return {"step": self._step, "phase": self._phase, "idle_s": time.monotonic() - self._since}


def blame(rank: int, here: tuple[int, str], found: list[PeerStatus]) -> list[PeerStatus]:
    """Those of its peers for whom `rank`, which is `here` in the loop (step and phase), waits in vain.

    Who has left because it had lost a third rank is not to blame, but that third rank. A rank that is only behind is to
    blame where no other has left.
    """
    lost = {other for status in found if status.farewell for other in status.farewell.lost}
    victims = {status.place.rank for status in found if status.farewell and set(status.farewell.lost) - {rank}}
    left = [status for status in found if not status.is_fine]
    first = [status for status in left if status.place.rank in lost or status.place.rank not in victims]
    behind = [status for status in found if _order(status.step, status.phase) < _order(*here)]
    return first or left or behind


def _order(step: int, phase: str) -> tuple[int, int]:
    return step, PHASES.index(phase)


def _at_once(work: Callable[[Place], Result], places: Iterable[Place]) -> list[Result]:
    with ThreadPoolExecutor(max_workers=256) as pool:
        return list(pool.map(work, places))
