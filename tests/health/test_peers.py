"""Peers: which rank is named when an exchange fails, over real sockets."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest

from llmtrain.engine.rendezvous import brief
from llmtrain.errors import PeerLostError, Stopped, UserError
from llmtrain.health.peers import Farewell, Here, Peers, PeerStatus, blame
from llmtrain.health.status_port import Place, Silence, StatusPort, ask
from tests.conftest import is_one_clear_line

GLOO_TIMEOUT = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 10000ms for "
    "recv operation to complete"
)
GLOO_AFTER_A_TIMEOUT = "Application timeout caused pair closure"
GLOO_RESET = (
    "[/__w/pytorch/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:3475: Connection reset by peer. This is "
    "typically caused by a remote worker hanging or bugs in the application. GLHF!"
)


class Table:
    """What `Peers` needs of an engine, for ranks that are threads of this process."""

    def __init__(self, rank: int, places: list[Any], barrier: threading.Barrier):
        self.rank, self.world_size, self._places, self._barrier = rank, len(places), places, barrier

    def gather(self, value: Any) -> list[Any]:
        self._places[self.rank] = value
        self._barrier.wait()
        return self._places


def open_peers(count: int) -> list[Peers]:
    places: list[Any] = [None] * count
    tables = [Table(rank, places, threading.Barrier(1)) for rank in range(count)]
    barrier = threading.Barrier(count)
    for table in tables:
        table._barrier = barrier
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(Peers, tables))  # type: ignore[arg-type]


@pytest.fixture
def three() -> Iterator[list[Peers]]:
    with ExitStack() as at_the_end:
        yield [at_the_end.enter_context(peers) for peers in open_peers(3)]


def fail(peers: Peers, message: str = GLOO_TIMEOUT) -> str:
    with pytest.raises(PeerLostError) as error, peers.watched():
        raise RuntimeError(message)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_process_that_is_gone_is_named_and_the_others_are_counted(three: list[Peers]) -> None:
    three[0].progress(97, "backward")
    three[2].__exit__()
    message = fail(three[0], GLOO_RESET)
    assert f"rank 2 on {socket.gethostname()} (127.0.0.1): its process is gone (Connection refused)" in message
    assert "rank 0 on" in message.partition(" cannot go on at step 97")[0]
    assert "rank 1 on" not in message
    assert "1 other rank is fine" in message
    assert "what failed: Read error [10.0.0.2]:3475: Connection reset by peer; the same command" in message


def test_a_process_that_is_stopped_is_told_from_one_that_is_gone(
    three: list[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtrain.health.status_port.TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody answers
        three[0]._others[1] = replace(three[0]._others[1], port=silent.getsockname()[1])
        assert "rank 2 on" in fail(three[0])
        assert three[0].diagnose()[1].state == "frozen"


def test_a_process_that_closes_its_port_while_it_is_asked_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that end by the same error say so to each other; the answer of one may be that its port closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def connect(*where: Any, **how: Any) -> socket.socket:
            connection = connected(*where, **how)
            accepted, _ = server.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
            accepted.close()
            poll = select.poll()
            poll.register(connection, 0)
            assert poll.poll(5000)
            return connection

        connected = socket.create_connection
        monkeypatch.setattr(socket, "create_connection", connect)
        answer = ask(Place(1, "host", "127.0.0.1", server.getsockname()[1], "token"), {"rank": 0})
    assert answer == Silence("gone", "Connection reset by peer")


def test_a_host_without_a_way_to_it_is_unreachable(three: list[Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.health.status_port.TIMEOUT_S", 0.3)
    three[0]._others[0] = replace(
        three[0]._others[0], address="255.255.255.255"
    )  # no TCP goes there, whatever the network
    assert "(255.255.255.255): its host or the link to it is down (" in fail(three[0])


def test_the_rank_that_is_behind_is_named_where_all_answer(three: list[Peers]) -> None:
    for peers in three:
        peers.progress(12, "data")
    for peers in (three[0], three[2]):
        peers.progress(12, "forward")
    message = fail(three[0])
    assert "(127.0.0.1): is behind, for 0 s at step 12, data; 1 other rank is fine" in message
    assert "rank 1 on" in message


def test_where_nobody_is_behind_the_network_is_suspected(three: list[Peers]) -> None:
    message = fail(three[1])
    assert "all 2 other ranks answer and none is behind: the network loses" in message
    assert "health.timeout_s" in message


def test_where_nobody_is_behind_in_the_loop_a_rank_inside_the_phase_is_suspected_too(three: list[Peers]) -> None:
    for peers in three:
        peers.progress(12, "backward")
    assert "none is behind: one rank hangs inside this phase (run.dir/stacks-rank*.txt tell: " in fail(three[1])


def test_what_gloo_says_without_its_name_is_known_too(three: list[Peers]) -> None:
    assert f"what failed: {GLOO_AFTER_A_TIMEOUT}" in fail(three[1], GLOO_AFTER_A_TIMEOUT)


def test_who_left_because_of_another_is_not_blamed(three: list[Peers]) -> None:
    """Rank 2 dies, rank 1 leaves for it, and then rank 0 finds two ranks gone."""
    three[2].__exit__()
    assert "rank 2 on" in fail(three[1], GLOO_RESET)
    three[1].__exit__()
    message = fail(three[0], GLOO_RESET)
    assert "rank 2 on" in message
    assert "rank 1 on" not in message


def test_a_reason_of_its_own_reaches_the_others(three: list[Peers]) -> None:
    with pytest.raises(MemoryError), three[1].watched():
        raise MemoryError("out of memory in step 3")
    three[1].__exit__()
    assert "rank 1 on" in (message := fail(three[0], GLOO_RESET))
    assert "it ended: MemoryError: out of memory in step 3" in message
    with pytest.raises(UserError), three[2].watched():
        raise UserError("data/x: cannot be read")


def test_told_to_stop_is_no_loss(three: list[Peers]) -> None:
    with pytest.raises(Stopped), three[1].watched():
        raise Stopped("by SIGTERM")
    assert all(status.is_fine for status in three[0].diagnose())


def test_other_errors_stay_what_they_are(three: list[Peers]) -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"), three[0].watched():
        raise RuntimeError("shapes do not match")


def test_one_process_alone_opens_no_port_and_changes_no_error() -> None:
    with open_peers(1)[0] as peers:
        assert "status" not in {thread.name for thread in threading.enumerate()}
        assert peers.diagnose() == []
        with pytest.raises(RuntimeError, match="gloo"), peers.watched():
            raise RuntimeError(GLOO_TIMEOUT)


PLACES = [Place(rank, f"host{rank}", f"10.0.0.{rank}", 1, "t") for rank in range(5)]


def at(step: int) -> Here:
    return Here(10 * step, step, "data")


def status(rank: int, state: Any = "alive", step: int = 5, lost: tuple[int, ...] | None = None) -> PeerStatus:
    return PeerStatus(PLACES[rank], state, "", at(step), 1.0, None if lost is None else Farewell("x", lost))


@pytest.mark.parametrize(("found", "blamed"), [
    ([status(1), status(2)], []),
    ([status(1, step=4), status(2)], [1]),
    ([status(1, step=6), status(2)], []),
    ([status(1, "gone"), status(2, step=4)], [1]),
    ([status(1, "gone"), status(2, "frozen"), status(3, "unreachable"), status(4)], [1, 2, 3]),
    ([status(1, "gone", lost=(2,)), status(2, "gone")], [2]),
    ([status(1, "gone", lost=(2,)), status(2, "gone", lost=(3,)), status(3, "gone")], [2, 3]),
    ([status(1, lost=()), status(2)], [1]),                     # its own error, and its process still there
    ([status(1, lost=(0,)), status(2)], [1]),                   # it took this rank for lost
    ([status(1, lost=(2,)), status(2)], [1]),                   # the link between 1 and 2 only
])  # fmt: skip
def test_blame(found: list[PeerStatus], blamed: list[int]) -> None:
    assert [status.place.rank for status in blame(0, at(5), found)] == blamed


# ---- the port ----


@pytest.fixture
def port() -> Iterator[StatusPort]:
    with_answer = StatusPort(3, "127.0.0.1", lambda question: {"heard": question})
    yield with_answer
    with_answer.close()


def test_only_who_knows_the_token_is_answered(port: StatusPort) -> None:
    assert ask(port.place, {"a": 1}) == {"heard": {"a": 1}}
    stranger = replace(port.place, token="guess")
    assert isinstance(ask(stranger, {}), Silence)
    for junk in (b"", b"\n", b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b"\xff\xfe\n", b"{" * 100_000):
        # It may have closed without having read all of it.
        with suppress(OSError), socket.create_connection(("127.0.0.1", port.place.port)) as connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
    assert ask(port.place, {}) == {"heard": {}}


def test_a_silent_stranger_keeps_nobody_waiting(port: StatusPort) -> None:
    with socket.create_connection(("127.0.0.1", port.place.port)):
        began = time.monotonic()
        assert ask(port.place, {}) == {"heard": {}}
        assert time.monotonic() - began < 1


def test_a_data_worker_that_outlives_its_rank_does_not_hold_the_port() -> None:
    code = """
import os, time
from llmtrain.health.status_port import StatusPort
port = StatusPort(0, "127.0.0.1", lambda question: question)
child = os.fork()
if not child:
    time.sleep(60)
print(child, port.place.port, port.place.token, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child, number, token = process.stdout.readline().split()
        place = Place(0, "here", "127.0.0.1", int(number), token)
        try:
            assert ask(place, {}) == {}
            process.kill()
            process.wait()
            answer = ask(place, {})
            assert isinstance(answer, Silence)
            assert answer.state == "gone"
        finally:
            os.kill(int(child), signal.SIGKILL)


# ---- the end ----


@pytest.mark.slow
def test_a_lost_peer_is_exit_5_in_one_line_though_a_library_thread_still_waits() -> None:
    code = """
import sys, threading, time
from llmtrain.errors import PeerLostError, run_main
threading.Thread(target=time.sleep, args=(120,)).start()
def main(argv):
    print("before")
    raise PeerLostError("rank 1 on b (10.0.0.2): gone")
sys.exit(run_main(main, []))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (5, "before\n")
    assert is_one_clear_line(result.stderr)


def test_what_libraries_say_is_quoted_without_their_source_files_and_guesses() -> None:
    assert brief(RuntimeError(GLOO_TIMEOUT)) == "Timed out waiting 10000ms for recv operation to complete"
    assert brief(RuntimeError(GLOO_RESET)) == "Read error [10.0.0.2]:3475: Connection reset by peer"
    assert brief(RuntimeError()) == "RuntimeError"
