"""Of Celery: so many threads, as its calls block."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from scripts.benchmarks.orders import (
    PAUSE_SECONDS,
    PAYLOAD,
    POLL_SECONDS,
    WARM_UP_SECONDS,
    Done,
    Order,
    go,
    tell,
)
from scripts.benchmarks.peers.celery_app import CONNECTIONS_MAX, app, echo


def main(order: Order) -> None:
    obey: dict[str, Callable[[Order], None]] = {
        "submit": _submit_for,
        "fill": _fill,
        "rate": _keep_rate,
        "latency": _one_after_the_other,
    }
    obey[order.kind](order)


def _submit() -> str:
    return str(echo.apply_async((PAYLOAD,)).id)


def _submit_bulk(count: int) -> None:
    """Celery has no call for many: they share a connection."""
    with app.producer_pool.acquire(block=True) as producer:
        for _ in range(count):
            echo.apply_async((PAYLOAD,), producer=producer)


def _submit_for(order: Order) -> None:
    def all_for(seconds: float) -> list[float]:
        until = time.monotonic() + seconds
        times: list[float] = []

        def repeat(_: int) -> None:
            while (began := time.monotonic()) < until:
                if order.bulk == 1:
                    _submit()
                else:
                    _submit_bulk(order.bulk)
                times.append(time.monotonic() - began)

        list(pool.map(repeat, range(order.in_flight)))
        return times

    # The same threads for all: Celery makes its result backend anew in each, which is slow.
    pool = ThreadPoolExecutor(order.in_flight)
    done = go(len(all_for(WARM_UP_SECONDS)) * order.bulk)
    done.to_done = all_for(order.seconds)
    done.count = len(done.to_done) * order.bulk
    tell(done)


def _fill(order: Order) -> None:
    done = go()
    sizes = [order.bulk] * (order.count // order.bulk)
    if rest := order.count % order.bulk:
        sizes.append(rest)
    with ThreadPoolExecutor(order.in_flight) as pool:
        list(pool.map(_submit_bulk, sizes))
    done.count = order.count
    tell(done)


def _keep_rate(order: Order) -> None:
    """A job that is late does not delay the next: each is timed from the moment it was due."""
    pool = ThreadPoolExecutor(CONNECTIONS_MAX)
    warmed_up = list(pool.map(lambda _: _submit(), range(CONNECTIONS_MAX)))
    done = go(len(warmed_up))
    began, epoch = time.monotonic(), time.time()

    def submit(due: float) -> None:
        done.due[_submit()] = epoch + due

    with pool:
        for number in range(max(1, int(order.rate * order.seconds))):
            due = number / order.rate
            time.sleep(max(0.0, began + due - time.monotonic()))
            pool.submit(submit, due)
    done.count = len(done.due)
    tell(done)


def _one_after_the_other(order: Order) -> None:
    for _ in range(min(10, order.count)):
        _follow(Done())
    done = go()
    until = time.monotonic() + order.seconds
    while done.count < order.count and time.monotonic() < until:
        _follow(done)
        done.count += 1
        time.sleep(PAUSE_SECONDS)
    tell(done)


def _follow(done: Done) -> None:
    began = time.monotonic()
    result: Any = echo.apply_async((PAYLOAD,))
    while result.state == "PENDING":
        time.sleep(POLL_SECONDS)
    done.to_start.append(time.monotonic() - began)
    result.get(interval=POLL_SECONDS)
    done.to_done.append(time.monotonic() - began)
