"""What the services tell `/metrics`."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from datetime import timedelta

import pytest
from prometheus_client import REGISTRY

from jobsvc.core.attempts import Log
from jobsvc.services import upkeep, watch
from jobsvc.services.threads import AsyncDatabase
from jobsvc.services.watch import WatchHub
from jobsvc.store.database import Connection, Database
from jobsvc.store.tables import job_events
from tests.store.house import House, worker

SECONDS_MAX = 10.0
LINE = Log("INFO", "line")


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_the_backlog_is_measured(house: House, database: Database) -> None:
    house.announce(worker(queues=("measured",)))
    job_id = house.submit(queue="measured")
    house.change(job_id, queued_time=house.now() - timedelta(seconds=100))
    assert upkeep.measure_once(database, 0)[0] == 0
    assert value("jobsvc_workers", queue="measured") == 1
    assert 100 <= value("jobsvc_oldest_queued_age_seconds", queue="measured") < 200
    house.claim(job_id)
    upkeep.measure_once(database, 0)
    assert value("jobsvc_oldest_queued_age_seconds", queue="measured") == 0


def test_leases_that_ran_out_are_counted(house: House, database: Database) -> None:
    before = value("jobsvc_leases_expired_total")
    for _ in range(3):
        house.change(house.start().job_id, lease_expire_time=house.now() - timedelta(seconds=1))
    assert upkeep.reap_once(database, 2)[0] == 2
    assert value("jobsvc_leases_expired_total") - before == 2


async def test_calls_that_wait_for_a_database_thread_are_told(database: Database) -> None:
    threads = AsyncDatabase(database, 2)
    go, inside = threading.Event(), threading.Semaphore(0)

    def hold(_: Connection) -> None:
        inside.release()
        assert go.wait(SECONDS_MAX)

    calls = [asyncio.create_task(threads.read(hold)) for _ in range(5)]
    try:
        for _ in range(2):
            assert await asyncio.to_thread(inside.acquire, timeout=SECONDS_MAX)
        assert value("jobsvc_database_calls_waiting") == 3
    finally:
        go.set()
        await asyncio.gather(*calls)
        threads.close()
    assert value("jobsvc_database_calls_waiting") == 0


async def test_lag_is_that_of_watchers_who_follow_and_not_of_those_who_catch_up(
    house: House, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PAGE_EVENTS", 4)
    claimed = house.start()
    house.report(claimed, *[LINE] * 9)
    old = house.now() - timedelta(hours=1)
    house.write(lambda tx: tx.execute(job_events.update().values(event_time=old)))
    count, total = value("jobsvc_watch_lag_seconds_count"), value("jobsvc_watch_lag_seconds_sum")
    threads = AsyncDatabase(database, 2)
    hub = WatchHub(threads, 3600.0)
    hub.start()
    try:
        async with asyncio.timeout(SECONDS_MAX), aclosing(hub.watch(claimed.job_id, 0, 3600)) as s:
            for _ in range(11):
                await anext(s)
            assert value("jobsvc_watch_lag_seconds_count") == count
            house.report(claimed, LINE)
            hub.notify(house.effects.changes)
            await anext(s)
    finally:
        await hub.stop()
        threads.close()
    assert value("jobsvc_watch_lag_seconds_count") == count + 1
    assert value("jobsvc_watch_lag_seconds_sum") - total < 60
