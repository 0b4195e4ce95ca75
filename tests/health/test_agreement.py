"""What fails on one rank ends all of them in the same way."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llmtrain.errors import LlmtrainError, UserError
from llmtrain.health.agreement import patiently, together
from tests.checkpoint.conftest import Rank, Ranks

Work = Callable[[], None]


def fine() -> None:
    pass


def ends(*works: Work) -> list[Exception]:
    """How each rank ends."""
    ranks = Ranks(len(works))

    def run(rank: int) -> Exception:
        engine: Any = Rank(rank, ranks)
        with pytest.raises(Exception) as raised:
            together(engine, works[rank])
        return raised.value

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, range(len(works))))


def test_storage_that_fails_on_one_rank_is_one_line_for_all() -> None:
    def no_answer() -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "/data/run")

    for works in ((no_answer, fine), (fine, no_answer)):
        first, second = ends(*works)
        assert type(first) is type(second) is UserError and str(first) == str(second)
        assert str(first).startswith("/data/run: Stale file handle; mend the storage, and run the same command again (")
        assert first.is_everywhere and second.is_everywhere  # type: ignore[attr-defined]


def test_a_bug_on_one_rank_keeps_its_traceback_and_the_others_do_not_wait_for_it() -> None:
    def bug() -> None:
        raise KeyError("forgotten")

    first, second = ends(bug, fine)
    assert isinstance(first, KeyError)
    assert type(second) is LlmtrainError and not second.is_everywhere
    assert "KeyError('forgotten') (rank 0 on" in str(second)


def test_what_takes_long_is_not_waited_for_once_it_has_failed_elsewhere() -> None:
    """Of ranks that wait for each other each would try in turn, and fail after as many hours."""
    ranks, never = Ranks(2), threading.Event()

    def full() -> None:
        raise UserError("cache: no space left")

    def run(rank: int) -> Exception:
        engine: Any = Rank(rank, ranks)
        with pytest.raises(UserError) as raised:
            patiently(engine, (full, never.wait)[rank], lambda: False)
        return raised.value

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    never.set()
    assert str(first) == str(second) and str(first).startswith("cache: no space left (rank 0 on ")
