"""The threads in which an event loop's database work runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import NoReturn
from unittest.mock import Mock

import pytest
from prometheus_client import REGISTRY

from jobsvc.services.threads import AsyncDatabase
from jobsvc.store.database import Database

WAIT_SECONDS_MAX = 10


@pytest.fixture
def threads(database: Database) -> Iterator[AsyncDatabase]:
    made = AsyncDatabase(database, 2)
    yield made
    made.close()


class Gate:
    """Holds whoever comes, in a thread, until it is opened."""

    def __init__(self) -> None:
        self.came = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, number: int) -> int:
        self.came.release()
        assert self.open.wait(WAIT_SECONDS_MAX)
        return number

    async def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert await asyncio.to_thread(self.came.acquire, timeout=WAIT_SECONDS_MAX)


def failing(error: BaseException) -> NoReturn:
    raise error


async def test_what_a_call_answers_or_raises_comes_back(threads: AsyncDatabase) -> None:
    assert await threads.run(divmod, 7, 2) == (3, 1)
    error = ValueError("no")
    with pytest.raises(ValueError, match="no") as caught:
        await threads.run(failing, error)
    assert caught.value is error
    # A future cannot raise this one; neither may it take the answers of others with it.
    with pytest.raises(RuntimeError):
        await threads.run(failing, StopIteration())
    assert await threads.run(int, "1") == 1


async def test_no_more_run_at_once_than_there_are_threads(threads: AsyncDatabase) -> None:
    gate = Gate()
    calls = [asyncio.create_task(threads.run(gate, number)) for number in range(5)]
    await gate.wait_for(2)
    assert not gate.came.acquire(blocking=False)
    assert REGISTRY.get_sample_value("jobsvc_database_calls_waiting") == 3
    gate.open.set()
    assert await asyncio.gather(*calls) == [0, 1, 2, 3, 4]
    assert REGISTRY.get_sample_value("jobsvc_database_calls_waiting") == 0


async def test_what_ends_while_the_loop_is_busy_wakes_it_once(
    threads: AsyncDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    wake = Mock(wraps=loop.call_soon_threadsafe)
    monkeypatch.setattr(loop, "call_soon_threadsafe", wake)
    for times in (1, 2):
        futures = [loop.create_future() for _ in range(3)]
        for number, future in enumerate(futures):
            threads._end(future, (number, None))
        assert await asyncio.gather(*futures) == [(0, None), (1, None), (2, None)]
        assert wake.call_count == times


async def test_a_call_that_nobody_waits_for_any_more_is_not_begun(threads: AsyncDatabase) -> None:
    gate = Gate()
    begun: list[int] = []
    held = [asyncio.create_task(threads.run(gate, number)) for number in range(2)]
    await gate.wait_for(2)
    waiting = asyncio.create_task(threads.run(begun.append, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    held[0].cancel()  # runs already: it is only not answered
    await asyncio.wait([waiting, held[0]])
    gate.open.set()
    assert await held[1] == 1
    await threads.run(int)
    assert begun == []


async def test_closing_waits_for_what_runs_and_cancels_what_waits(database: Database) -> None:
    threads = AsyncDatabase(database, 1)
    gate = Gate()
    running = asyncio.create_task(threads.run(gate, 7))
    await gate.wait_for(1)
    waiting = asyncio.create_task(threads.run(int))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(threads.close))
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not closing.done()
    gate.open.set()
    await closing
    assert await running == 7
