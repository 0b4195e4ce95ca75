"""Do the processes of a launch agree before they start? What differs is named, with the rank that differs."""

from __future__ import annotations

import hashlib
import platform
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.config import RunConfig
from llmtrain.engine import Engine, launch_settings
from llmtrain.engine.rendezvous import is_exchange_failure
from llmtrain.errors import LlmtrainError, Stopped, UserError, end_everywhere, of_storage
from llmtrain.packages import package_versions

Result = TypeVar("Result")
_ROUND_S = 1.0


def together(engine: Engine, work: Callable[[], Result]) -> Result:
    """Do something on every rank that may fail on some of them; where it does, it fails on all, with the rank named.

    Otherwise the others would wait in their next exchange for a rank that has left.

    Raises:
        LlmtrainError: of the kind that the first failing rank met.
    """
    failure: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as error:  # of whatever kind: the others must hear of it
        if is_exchange_failure(error):
            raise  # they cannot: it is them who are not heard
        failure = (of_storage(error) if isinstance(error, OSError) else None) or error
    failed_as: type[LlmtrainError] = type(failure) if isinstance(failure, LlmtrainError) else LlmtrainError
    text = str(failure) if isinstance(failure, LlmtrainError) else repr(failure)
    is_bug = failure is not None and not isinstance(failure, LlmtrainError)
    failures = engine.gather((failed_as, text, platform.node(), is_bug) if failure else None)
    if is_bug:
        raise failure  # type: ignore[misc]  # which keeps its traceback
    met = [(rank, *met) for rank, met in enumerate(failures) if met]
    if not met:
        return result  # type: ignore[return-value]  # nothing failed, so there is one
    rank, kind, message, host, _ = met[0]
    if kind is not Stopped and (any(other != message for _, _, other, *_ in met) or len(met) < engine.world_size):
        ranks = f"rank {rank} on {host}" + (f" and {len(met) - 1} more" if len(met) > 1 else "")
        message += f" ({ranks}; {engine.world_size - len(met)} of {engine.world_size} ranks are fine)"
    told = kind(message)
    told.is_everywhere = not any(bug for *_, bug in met)  # who has a bug leaves without the others
    raise told


def patiently(engine: Engine, work: Callable[[], Result], is_told: Callable[[], bool]) -> Result:
    """The same for what may take longer than an exchange between ranks may: fetching from a store, packing documents.

    Each rank works in a thread of its own, and until all are done, or one has failed, they tell each other so again
    and again.

    Args:
        engine: to talk to the others.
        work: what one can do without at any moment, for it ends with the process.
        is_told: whether this rank was told to stop.

    Raises:
        Stopped: a rank was told to stop.
        LlmtrainError: see `together`.
    """
    results: list[Result] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # of whatever kind: raised below
            failures.append(error)

    def take() -> Result | None:  # of a rank that has none yet, because another failed
        if failures:
            raise failures[0]
        return results[0] if results else None

    thread = threading.Thread(target=run, name="patient", daemon=True)
    thread.start()
    wait_s = 0.01
    while True:
        thread.join(wait_s)
        done, failed, told = zip(*engine.gather((not thread.is_alive(), bool(failures), is_told())), strict=True)
        if all(done) or any(failed):  # the others might fail at the same in turn, each after hours
            return together(engine, take)  # type: ignore[return-value]
        if any(told):
            stopped = Stopped("stopped by a signal before the first step: nothing to save; the same command goes on")
            stopped.is_at_once = True
            raise stopped
        wait_s = min(2 * wait_s, _ROUND_S)


def leave(engine: Engine, error: BaseException | None) -> None:
    """End the engine; not where this rank ends without the others, for closing is an exchange too.

    Nor where another has gone before it could be waited for, as where a machine is taken away once all is saved: what
    had to be said and left is, so the exit code stays.
    """
    if isinstance(error, LlmtrainError) and error.is_everywhere:
        try:
            end_everywhere(error, engine.rank, engine.barrier)
        except Exception as failure:
            if not is_exchange_failure(failure):
                raise
            return
    elif error is not None and engine.world_size > 1:
        return
    engine.close()


def require_agreement(engine: Engine, config: RunConfig, data_fingerprint: str) -> list[str]:
    """Check that all ranks run the same thing; return what differs without making the run wrong, as warnings.

    Raises:
        UserError: config or data differ; the rank and the difference are named.
    """
    if engine.world_size == 1:
        return []  # there is nobody to differ from
    facts = {"data": data_fingerprint, "code": code_fingerprint(), **package_versions()}
    settings = {
        f"{section}.{key}": value for section, keys in config.model_dump().items() for key, value in keys.items()
    }
    settings |= {"engine": engine.name, **launch_settings()}
    own = (platform.node(), _digest(repr(settings)), facts)
    everybody = engine.gather(own)
    if len({digest for _, digest, _ in everybody}) > 1:  # rare, so the whole is exchanged only now
        rank, key, value, expected = _first_difference(engine.gather(settings))
        raise _everywhere(
            UserError(
                f"rank {rank} on {everybody[rank][0]} has {key}={value}, rank 0 has {expected}; start all ranks with "
                "the same config"
            )
        )
    warnings = []
    reference = everybody[0][2]
    for rank, (host, _, theirs) in enumerate(everybody):
        for name in sorted({*theirs, *reference}):
            if theirs.get(name) == reference.get(name):
                continue
            difference = f"rank {rank} on {host}: {name} is {theirs.get(name)}, on rank 0 {reference.get(name)}"
            if name == "data":
                message = f"{difference}; give all hosts the same prepared data in {config.data.where}"
                raise _everywhere(UserError(message))
            warnings.append(difference)
    return warnings


def _first_difference(settings: list[dict[str, Any]]) -> tuple[int, str, Any, Any]:
    """Rank, key, its value there and on rank 0, of ranks that are known to differ."""
    reference = settings[0]
    return next(
        (rank, key, own.get(key, "(unknown)"), reference.get(key, "(unknown)"))
        for rank, own in enumerate(settings)
        for key in sorted({*reference, *own})
        if own.get(key, "(unknown)") != reference.get(key, "(unknown)")
    )


def _everywhere(error: LlmtrainError) -> LlmtrainError:
    error.is_everywhere = True
    return error


@cache
def code_fingerprint() -> str:
    """A digest of this package's source files."""
    root = Path(__file__).resolve().parents[1]
    sources = sorted(root.rglob("*.py"))
    return _digest("".join(f"{path.relative_to(root)}\0{path.read_text(encoding='utf-8')}\0" for path in sources))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
