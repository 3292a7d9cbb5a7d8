"""Whose turn it is to be received."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc.aio
import pytest

from jobsvc.errors import LimitReached
from jobsvc.rpc.intake import CALL_BYTES, MIB, Intake, IntakeLimits, Receipt, RequestMissing

SECONDS_MAX = 10


class Call:
    """A context whose request comes when the test says so."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._message: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def read(self) -> Any:
        self.asked.set()
        return await self._message

    def send(self, message: Any) -> None:
        self._message.set_result(message)


def begin(intake: Intake, caller: str) -> tuple[Any, asyncio.Task[tuple[bytes, Receipt]]]:
    call: Any = Call()
    return call, asyncio.create_task(intake.receive(caller, call))


async def soon(awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(SECONDS_MAX):
        return await awaitable


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def assert_empty(intake: Intake) -> None:
    assert (intake._held, intake._by_caller) == (0, {})
    assert not intake._receiving
    assert not intake._waiting
    assert not intake._queues


async def test_a_call_counts_until_it_is_released() -> None:
    intake = Intake()
    call, receiving = begin(intake, "a")
    await settle()
    assert intake._held == 4 * MIB
    call.send(b"x" * 200_000)
    data, receipt = await soon(receiving)
    assert (len(data), intake._held) == (200_000, 200_000)
    intake.release(receipt)
    intake.release(receipt)
    assert_empty(intake)


async def test_so_many_are_worked_on_as_the_limits_say() -> None:
    intake = Intake(IntakeLimits(caller_bytes_max=4 * MIB + 3 * CALL_BYTES))
    receipts = []
    for _ in range(4):
        call, receiving = begin(intake, "a")
        call.send(b"x")
        receipts.append((await soon(receiving))[1])
    last, waiting = begin(intake, "a")
    last.send(b"x")
    await settle()
    assert not last.asked.is_set()
    intake.release(receipts[0])
    await soon(waiting)


async def test_the_turn_goes_round_between_callers() -> None:
    intake = Intake(IntakeLimits(bytes_max=4 * MIB))
    first, receiving = begin(intake, "a")
    await settle()
    crowd = [begin(intake, "a") for _ in range(3)]
    await settle()
    other, served = begin(intake, "b")
    await settle()
    first.send(b"x")
    intake.release((await soon(receiving))[1])
    await soon(crowd[0][0].asked.wait())
    crowd[0][0].send(b"x")
    intake.release((await soon(crowd[0][1]))[1])
    await soon(other.asked.wait())
    assert not crowd[1][0].asked.is_set()
    for task in (served, crowd[1][1], crowd[2][1]):
        task.cancel()
    await asyncio.gather(served, *(each[1] for each in crowd), return_exceptions=True)
    assert_empty(intake)


async def test_who_has_room_does_not_wait_behind_others() -> None:
    intake = Intake(IntakeLimits(bytes_max=8 * MIB, caller_bytes_max=4 * MIB))
    held = [begin(intake, "a")[1] for _ in range(3)]
    await settle()
    other, receiving = begin(intake, "b")
    other.send(b"x")
    await soon(receiving)
    for task in held:
        task.cancel()


async def test_a_slow_request_is_given_up_where_others_wait() -> None:
    intake = Intake(IntakeLimits(bytes_max=8 * MIB, pressed_seconds_max=0.0))
    slow = [begin(intake, "a")[1], begin(intake, "a")[1]]
    await settle()
    intake.look()
    await settle()
    assert not any(task.done() for task in slow)
    other, receiving = begin(intake, "b")
    await settle()
    intake.look()
    with pytest.raises(LimitReached, match="others waited"):
        await soon(slow[0])
    other.send(b"x")
    await soon(receiving)
    assert not slow[1].done()
    slow[1].cancel()


async def test_no_request_is_waited_for_for_ever() -> None:
    intake = Intake(IntakeLimits(bytes_max=4 * MIB, seconds_max=0.0))
    tasks = [begin(intake, "a")[1] for _ in range(2)]
    await settle()
    intake.look()
    for task in tasks:
        with pytest.raises(LimitReached, match="no request came"):
            await soon(task)
    assert_empty(intake)


async def test_the_caller_that_has_most_waiting_makes_way() -> None:
    intake = Intake(IntakeLimits(bytes_max=4 * MIB, waiting_max=3))
    tasks = [begin(intake, "a")[1] for _ in range(4)]
    await settle()
    with pytest.raises(LimitReached, match="3 calls wait"):
        await soon(begin(intake, "a")[1])
    other = begin(intake, "b")[1]
    await settle()
    with pytest.raises(LimitReached, match="3 calls wait"):
        await soon(tasks[-1])
    assert not other.done()
    for task in (*tasks, other):
        task.cancel()
    await asyncio.gather(*tasks, other, return_exceptions=True)
    assert_empty(intake)


async def test_a_client_that_leaves_is_told_nothing() -> None:
    """Though its time is up at the same moment."""
    intake = Intake(IntakeLimits(seconds_max=0.0))
    _, receiving = begin(intake, "a")
    await settle()
    intake.look()
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(receiving)
    assert_empty(intake)


async def test_a_side_that_is_closed_has_no_request() -> None:
    intake = Intake()
    call, receiving = begin(intake, "a")
    call.send(grpc.aio.EOF)
    with pytest.raises(RequestMissing):
        await soon(receiving)
    assert_empty(intake)
