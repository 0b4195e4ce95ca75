"""The port on which a rank answers its peers: one line of JSON in, one line out, from a thread beside the loop.

The thread answers also while the loop waits in an exchange between ranks, for such waits release Python's lock. What
keeps an answer from coming is a finding too:

  gone         connection refused: the process has ended
  frozen       connected, no answer: the kernel accepts, but the process is stopped or stuck
  unreachable  no connection: the host, or the link to it, is down
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, Literal

TIMEOUT_S = 3.0
_LINE_BYTES = 1 << 14
Message = dict[str, Any]
Answer = Callable[[Message], Message]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank can be asked."""

    rank: int
    host: str
    address: str
    port: int
    token: str  # goes through the exchange between ranks only, so that nobody else is answered or believed

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.address})"


@dataclass(frozen=True, slots=True)
class Silence:
    """Why there is no answer."""

    state: Literal["gone", "frozen", "unreachable"]
    detail: str


def ask(place: Place, question: Message) -> Message | Silence:
    """Ask a rank; takes twice `TIMEOUT_S` at most."""
    try:
        connection = socket.create_connection((place.address, place.port), timeout=TIMEOUT_S)
    except ConnectionRefusedError as error:
        return Silence("gone", _detail(error))
    except OSError as error:
        return Silence("unreachable", _detail(error))
    with connection, connection.makefile("rb") as stream:  # to write, a stream would fail once more when it is closed
        try:
            connection.sendall(json.dumps({"token": place.token, **question}).encode() + b"\n")
            return dict(json.loads(stream.readline(_LINE_BYTES)))
        except TimeoutError as error:
            return Silence("frozen", _detail(error))
        except OSError as error:  # it ends just now
            return Silence("gone", _detail(error))
        except ValueError:
            return Silence("gone", "another program has its port")


def _detail(error: OSError) -> str:
    return f"no answer within {TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else (error.strerror or str(error))


class StatusPort(ThreadingTCPServer):
    """Open from the start; `place` says where."""

    daemon_threads = True
    request_queue_size = 256  # all peers ask at once

    def __init__(self, rank: int, address: str, answer: Answer):
        self.answer = answer
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), _Handler)
        self.place = Place(rank, socket.gethostname(), address, int(self.server_address[1]), secrets.token_hex(16))
        # A forked data worker that outlives this process must not keep the port open: the peers would find it frozen.
        port = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_inherited(port()))
        self._is_closing = False
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._is_closing:  # not serve_forever, which wakes up twice a second
            self.handle_request()
        self.server_close()

    def close(self) -> None:
        """Close the port; the thread ends."""
        self._is_closing = True
        with suppress(OSError):  # it wakes up to see that it shall end
            socket.create_connection((self.place.address, self.place.port), timeout=TIMEOUT_S).close()
        self._thread.join(TIMEOUT_S)


def _close_inherited(port: StatusPort | None) -> None:
    if port:
        port.socket.close()


class _Handler(StreamRequestHandler):
    """One question. Who does not know the token, such as a port scanner, gets no answer and leaves no trace."""

    timeout = TIMEOUT_S
    server: StatusPort

    def handle(self) -> None:
        with suppress(OSError, ValueError):  # who asked has left, or sent something else than JSON
            question = json.loads(self.rfile.readline(_LINE_BYTES))
            if isinstance(question, dict) and question.pop("token", None) == self.server.place.token:
                self.wfile.write(json.dumps(self.server.answer(question)).encode() + b"\n")
