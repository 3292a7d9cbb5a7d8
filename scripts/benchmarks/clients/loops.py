"""What clients on an event loop have in common, whatever they call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from scripts.benchmarks.orders import (
    PAUSE_SECONDS,
    POLL_SECONDS,
    WARM_UP_SECONDS,
    Done,
    Order,
    go,
    tell,
)


class Client(Protocol):
    """Of a side that runs jobs."""

    async def submit(self) -> str:
        """One job; answers its id."""

    async def submit_bulk(self, count: int) -> Any:
        """So many jobs in one call."""

    async def follow(self, done: Done) -> None:
        """Submits a job, and notes how long it took until it was seen to start and to end."""


async def obey(order: Order, client: Client) -> None:
    """Does what may be ordered of any side that runs jobs."""
    match order.kind:
        case "submit" if order.bulk == 1:
            await submit_for(order, client.submit)
        case "submit":
            await submit_for(order, lambda: client.submit_bulk(order.bulk))
        case "fill":
            await _fill(order, client)
        case "rate":
            await _keep_rate(order, client)
        case "latency":
            await _one_after_the_other(order, client)
        case kind:
            raise ValueError(f"no client does {kind}")


async def submit_for(order: Order, call: Callable[[], Awaitable[Any]]) -> None:
    async def repeat(until: float, times: list[float]) -> None:
        while (began := time.monotonic()) < until:
            await call()
            times.append(time.monotonic() - began)

    async def all_for(seconds: float) -> list[float]:
        until = time.monotonic() + seconds
        times: list[float] = []
        await asyncio.gather(*(repeat(until, times) for _ in range(order.in_flight)))
        return times

    done = go(len(await all_for(WARM_UP_SECONDS)) * order.bulk)
    done.to_done = await all_for(order.seconds)
    done.count = len(done.to_done) * order.bulk
    tell(done)


async def _fill(order: Order, client: Client) -> None:
    done = go()
    left = order.count

    async def repeat() -> None:
        nonlocal left
        while left > 0:
            count = min(left, order.bulk)
            left -= count
            await client.submit_bulk(count)

    await asyncio.gather(*(repeat() for _ in range(order.in_flight)))
    done.count = order.count
    tell(done)


async def _keep_rate(order: Order, client: Client) -> None:
    """A job that is late does not delay the next: each is timed from the moment it was due."""
    await client.submit()
    done = go(warmed_up=1)
    began, epoch = time.monotonic(), time.time()

    async def submit(due: float) -> None:
        done.due[await client.submit()] = epoch + due

    async with asyncio.TaskGroup() as tasks:
        for number in range(max(1, int(order.rate * order.seconds))):
            due = number / order.rate
            await asyncio.sleep(began + due - time.monotonic())
            tasks.create_task(submit(due))
    done.count = len(done.due)
    tell(done)


async def _one_after_the_other(order: Order, client: Client) -> None:
    for _ in range(min(10, order.count)):
        await client.follow(Done())
    done = go()
    until = time.monotonic() + order.seconds
    while done.count < order.count and time.monotonic() < until:
        await client.follow(done)
        done.count += 1
        await asyncio.sleep(PAUSE_SECONDS)
    tell(done)


async def follow_polled(
    submit: Callable[[], Awaitable[str]], ended: Callable[[str], Awaitable[bool]], done: Done
) -> None:
    """Of a side that tells nobody when a job ends."""
    began = time.monotonic()
    job_id = await submit()
    while not await ended(job_id):  # noqa: ASYNC110 - no event tells it
        await asyncio.sleep(POLL_SECONDS)
    done.to_done.append(time.monotonic() - began)
