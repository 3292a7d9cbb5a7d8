"""Bulk changes on each database: of many jobs, in batches that hold nobody up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.broker.topology import Broker
from jobsvc.core.model import JobFilter, OnConflict, Unique, UniqueScope
from jobsvc.outbox import Outbox
from jobsvc.services import bulk
from jobsvc.services.bulk import Bulk, Counts, Extent
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store import verbs
from jobsvc.store.tables import jobs
from tests.store.house import DONE, FATAL, WAIT_SECONDS_MAX, House, new_job

EVERY = JobFilter(queue="default")
MANY = Extent(100)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "BATCH", 3)


def change(house: House, verb: Callable[[Bulk], Coroutine[Any, Any, Counts]]) -> Counts:
    threads = AsyncDatabase(house.database, 1)
    try:
        outbox = Outbox(house.database, Broker("memory://bulk-tests"))
        return asyncio.run(verb(Bulk(house.database, threads, outbox)))
    finally:
        threads.close()


def states(house: House) -> list[str]:
    statement = sa.select(jobs.c.state).order_by(jobs.c.id)
    return list(house.database.read(lambda c: c.execute(statement).scalars().all()))


def test_many_are_cancelled_retried_and_deleted(house: House) -> None:
    house.submit_all([new_job() for _ in range(7)])
    assert change(house, lambda b: b.cancel(EVERY, Extent(4), "", "alice")) == Counts(4, 4, True)
    assert states(house) == ["QUEUED"] * 3 + ["CANCELLED"] * 4  # the newest
    assert change(house, lambda b: b.cancel(EVERY, MANY, "", "alice")) == Counts(3, 3)
    assert change(house, lambda b: b.retry(EVERY, Extent(5), "alice")) == Counts(5, 5, True)
    assert states(house) == ["CANCELLED"] * 2 + ["QUEUED"] * 5
    assert change(house, lambda b: b.delete(EVERY, MANY, "alice")) == Counts(2, 2)
    assert states(house) == ["QUEUED"] * 5


@pytest.mark.parametrize(
    ("holder", "scope", "how", "count"),
    [
        ("", UniqueScope.ACTIVE, OnConflict.REJECT, 1),
        ("waits", UniqueScope.ACTIVE, OnConflict.REJECT, 0),
        ("waits", UniqueScope.WAITING, OnConflict.RETURN_EXISTING, 0),
        ("waits", UniqueScope.ACTIVE, OnConflict.REPLACE, 1),
        ("runs", UniqueScope.ACTIVE, OnConflict.REJECT, 0),
        ("runs", UniqueScope.WAITING, OnConflict.REJECT, 1),
        ("ended", UniqueScope.ACTIVE, OnConflict.REJECT, 1),
        ("is of another type", UniqueScope.ACTIVE, OnConflict.REJECT, 1),
    ],
)
def test_those_are_found_that_can_be_retried(
    house: House, holder: str, scope: UniqueScope, how: OnConflict, count: int
) -> None:
    """`scope` is the holder's."""
    failed = house.submit(unique=Unique("k", on_conflict=how))
    house.finish(house.claim(failed), FATAL)
    if holder:
        job_type = "other" if holder == "is of another type" else "demo"
        held = house.submit(job_type, unique=Unique("k", scope), queue="elsewhere")
        if holder in ("runs", "ended"):
            running = house.claim(held)
            if holder == "ended":
                house.finish(running, DONE)
    dry = Extent(10, dry_run=True)
    assert change(house, lambda b: b.retry(EVERY, dry, "alice")) == Counts(count, 0)
    assert change(house, lambda b: b.retry(EVERY, MANY, "alice")) == Counts(count, count)


def test_a_claim_goes_on_beside_a_bulk_change(
    pg_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch has locked is its own jobs, and no other's."""
    older = [pg_house.submit() for _ in range(2)]
    for _ in range(3):
        pg_house.submit()
    locked, go_on = threading.Event(), threading.Event()
    cancel_many = verbs.cancel_many

    def slowly(*arguments: Any) -> Any:
        answers = cancel_many(*arguments)
        locked.set()
        assert go_on.wait(WAIT_SECONDS_MAX)
        return answers

    monkeypatch.setattr(verbs, "cancel_many", slowly)
    found: list[Counts] = []
    cancel = threading.Thread(
        target=lambda: found.append(
            change(pg_house, lambda b: b.cancel(EVERY, Extent(3), "", "alice"))
        )
    )
    cancel.start()
    assert locked.wait(WAIT_SECONDS_MAX)
    assert len(pg_house.claim_all(older)) == 2
    go_on.set()
    cancel.join(WAIT_SECONDS_MAX)
    assert found == [Counts(3, 3, True)]
    assert sorted(states(pg_house)) == ["CANCELLED"] * 3 + ["RUNNING"] * 2
