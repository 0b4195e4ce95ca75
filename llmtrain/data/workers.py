"""One function over many items in several processes, results in the order of the items.

Pipes instead of a shared queue: when the parent is killed, each worker reads the end of its pipe and ends too, and no
worker can be left behind. The processes are spawned, as on macOS, so the function must be picklable. Arrays of a result
go through the pipe as they lie in memory, without the copies that pickle makes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from llmtrain.errors import LlmtrainError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
# How far results may run ahead of the one that is waited for, per worker: bounds memory when one item takes long.
AHEAD = 4
WAITING = 2  # items that are made and wait for a thread: it takes a while over some of them
_FITS = 1 << 12  # bytes of an item, in a pipe that is empty: half of what macOS gives one
_NO_MORE = object()


def ordered_map(
    make_function: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int, *, alike: bool = False
) -> Iterator[Result]:
    """Apply a function to items and yield the results in order; with one worker in this very process.

    Args:
        make_function: makes the function, once in each worker (it may load something large).
        items: taken one by one, as workers become free.
        workers: number of processes.
        alike: whether all items take about as long. Then a worker that is busy is given its next one, which it finds
            when it is ready; else that one might wait for long, with another worker idle.

    Raises:
        LlmtrainError: what the function raised for the first item it failed on.
        UserError: a worker was killed.
    """
    if workers == 1:
        yield from map(make_function(), items)
        return
    with _started(make_function, workers) as connections:
        yield from _deal(items, connections, at_most=2 if alike else 1)


def for_each(function: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Call a function on items in order, in a thread of its own, while the next ones are made.

    Raises:
        Exception: what the function raised, which is then not called again; else what the items raised.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        calls = deque[Future[None]]()
        try:
            for item in items:
                if len(calls) > WAITING:
                    calls.popleft().result()
                calls.append(thread.submit(_call, function, item, calls[-1] if calls else None))
        finally:
            if calls:
                calls[-1].result()


def _call(function: Callable[[Item], None], item: Item, before: Future[None] | None) -> None:
    if before is not None:
        before.result()  # what has failed fails all that comes after it
    function(item)


def _deal(items: Iterable[Any], connections: list[Connection], at_most: int) -> Iterator[Any]:
    source = iter(items)
    held: Any = None  # the next item, pickled, until somebody takes it
    dealt_to: dict[Connection, deque[int]] = {connection: deque() for connection in connections}
    done = dict[int, Any]()
    dealt = yielded = 0
    while True:
        while dealt < yielded + AHEAD * len(connections):
            if held is None and (item := next(source, _NO_MORE)) is not _NO_MORE:
                held = ForkingPickler.dumps(item)
            connection = min(connections, key=lambda each: len(dealt_to[each]))
            # Were both to send at once what does not fit into the pipe, both would block: what is large is for a
            # worker that waits.
            if held is None or len(dealt_to[connection]) >= (at_most if len(held) <= _FITS else 1):
                break
            _send(connection, held)
            dealt_to[connection].append(dealt)
            dealt, held = dealt + 1, None
        if not any(dealt_to.values()):
            return
        for ready in wait([connection for connection, numbers in dealt_to.items() if numbers]):
            assert isinstance(ready, Connection)
            done[dealt_to[ready].popleft()] = _receive(ready)
        while yielded in done:
            failed, result = done.pop(yielded)
            if failed:
                raise result
            yield result
            yielded += 1


def _send(connection: Connection, item: Any) -> None:
    try:
        connection.send_bytes(item)
    except OSError as error:
        raise _worker_died() from error


def _receive(connection: Connection) -> Any:
    try:
        pickled, sizes = connection.recv()
        return pickle.loads(pickled, buffers=[_read(connection, size) for size in sizes])
    except (EOFError, OSError) as error:
        raise _worker_died() from error


def _answer(connection: Connection, answer: Any) -> None:
    arrays = list[memoryview]()
    pickled = pickle.dumps(answer, protocol=5, buffer_callback=lambda array: arrays.append(array.raw()))
    connection.send((pickled, [array.nbytes for array in arrays]))
    for left in arrays:
        _write(connection, left)


def _write(connection: Connection, left: memoryview) -> None:
    while left:
        left = left[os.write(connection.fileno(), left) :]


def _read(connection: Connection, size: int) -> npt.NDArray[np.uint8]:
    array = np.empty(size, np.uint8)
    left = array.data
    while left:
        if not (count := os.readv(connection.fileno(), [left])):
            raise EOFError
        left = left[count:]
    return array


def _worker_died() -> UserError:
    return UserError("a worker process was killed (out of memory?); try fewer --workers")


@contextmanager
def _started(make_function: Callable[[], Callable[[Any], Any]], workers: int) -> Iterator[list[Connection]]:
    """Start the workers, each at the other end of a pipe; end them all whatever happens."""
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    connections: list[Connection] = []
    try:
        with _interrupts_held():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(make_function, theirs), daemon=True)
                process.start()
                theirs.close()  # so that the end of the worker is the end of the pipe
                connections.append(ours)
                processes.append(process)
        yield connections
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C goes to the whole terminal: children started here never see it, and the parent, which does, ends them.

    One that comes while they start is not lost: it is handled once they have.
    """
    resource_tracker.ensure_running()  # started by the first child it would unblock the signal
    in_main = threading.current_thread() is threading.main_thread()  # where alone Python runs handlers
    held: list[int] = []
    # Blocked for the children, who inherit that, and noted by a handler, as another thread may take the signal.
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if in_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if in_main:
            signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _work(make_function: Callable[[], Callable[[Any], Any]], connection: Connection) -> None:
    """The life of a worker: answer each item with (failed, result) until the pipe ends."""
    try:
        function = make_function()
        while True:
            item = connection.recv()
            try:
                answer = (False, function(item))
            except LlmtrainError as error:
                answer = (True, error)
            except Exception:
                answer = (True, RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            _answer(connection, answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
