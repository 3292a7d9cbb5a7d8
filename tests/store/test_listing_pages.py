"""Pages of lists while jobs come and go, and what is read for them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from jobsvc.core.attempts import AttemptFailed, Input, JobError, Progress
from jobsvc.core.model import Concurrency, JobFilter, OnConflict, RetryPolicy, Unique, UniqueScope
from jobsvc.core.states import JobState
from jobsvc.store.reads import listing
from jobsvc.store.reads.listing import Search
from tests.store.house import House, new_id

EVERY = Search(JobFilter())


def test_who_stays_is_listed_once_whatever_comes_and_goes(house: House) -> None:
    before = [house.submit() for _ in range(12)]
    gone = {before[2], before[5], before[9]}
    seen: list[str] = []
    after = ""
    for turn in range(20):
        ids, after = house.database.scan(
            lambda c, after=after: listing.find(c, EVERY, after, 3)  # type: ignore[misc]
        )
        seen += ids
        if not after:
            break
        house.submit()
        if turn < 3:
            house.forget_job(sorted(gone)[turn])
    assert len(seen) == len(set(seen))
    assert set(before) - gone <= set(seen)


def test_an_idempotency_key_that_outlived_its_job_finds_nothing(house: House) -> None:
    job_id = house.submit(idempotency_key="k")
    search = Search(JobFilter(idempotency_key="k"))
    assert house.database.scan(lambda c: listing.find(c, search, "", 9)) == ([job_id], "")
    house.forget_job(job_id)
    assert house.database.scan(lambda c: listing.find(c, search, "", 9)) == ([], "")


# What is read of them.


def read(house: House, ids: list[str], *, full: bool) -> list[Any]:
    return house.database.scan(lambda c: list(listing.read(c, ids, full=full)))


def test_jobs_are_read_in_the_order_asked_for(house: House) -> None:
    ids = [house.submit() for _ in range(5)]
    asked = [ids[3], new_id(), ids[0], ids[4]]
    assert [job.job_id for job in read(house, asked, full=False)] == [ids[3], ids[0], ids[4]]


def test_without_full_no_payload_and_no_traceback_is_read(house: House) -> None:
    claimed = house.start(input=Input(b"big"))
    house.finish(claimed, AttemptFailed(JobError("TypeError", "never", "line 1")))
    (basic,) = read(house, [claimed.job_id], full=False)
    assert basic.input is None
    assert basic.error == JobError("TypeError", "never")
    paged, _ = house.database.read(lambda c: listing.page(c, EVERY, "", 9))
    assert paged == [basic]
    (full,) = read(house, [claimed.job_id], full=True)
    assert full.input == Input(b"big")
    assert full == house.get(claimed.job_id)
    assert full.error.traceback == "line 1"


def test_a_page_has_all_that_a_job_shows(house: House) -> None:
    """As one that is read by itself has it."""
    begun = house.start(
        labels={"a": "b"},
        idempotency_key="k",
        priority=3,
        unique=Unique("u", UniqueScope.WAITING, OnConflict.REJECT),
        concurrency=Concurrency("c", 2),
        retry_policy=RetryPolicy(1.5, 3.0, 40.0, 0.1),
        retention=3600.0,
        expire_time=house.now() + timedelta(hours=1),
    )
    house.report(begun, Progress(1.0, 2.0, "half"))
    later = house.submit(delay=60.0)
    house.finish(begun, AttemptFailed(JobError("TypeError", "never", "line 1", retryable=True)))
    asked = [later, begun.job_id]
    alone = [replace(house.get(job_id), input=None) for job_id in asked]
    (error,) = (job.error for job in alone if job.error)
    expected = [replace(job, error=job.error and replace(error, traceback="")) for job in alone]
    paged, _ = house.database.read(lambda c: listing.page(c, EVERY, "", 9))
    assert paged == read(house, asked, full=False) == expected


def test_a_page_of_one_filter_takes_one_statement(pg_house: House) -> None:
    for _ in range(5):
        pg_house.submit()
    statements = []

    def page(connection: sa.Connection) -> object:
        sa.event.listen(
            connection, "before_cursor_execute", lambda *args: statements.append(args[2])
        )
        search = Search(JobFilter(states=frozenset({JobState.QUEUED})))
        return listing.page(connection, search, "", 3)

    pg_house.database.read(page)
    assert len(statements) == 1


def test_large_payloads_are_read_as_they_are_asked_for(house: House) -> None:
    half = Input(bytes(listing.READ_BYTES // 2))
    ids = [house.submit(input=half) for _ in range(10)]
    given = []  # the parameters of each statement

    def first_two(connection: sa.Connection) -> list[str]:
        sa.event.listen(connection, "before_cursor_execute", lambda *args: given.append(args[3]))
        jobs_in_turn = listing.read(connection, ids, full=True)
        return [next(jobs_in_turn).job_id, next(jobs_in_turn).job_id]

    assert house.database.scan(first_two) == ids[:2]
    assert len(given[-2]) == 10  # their sizes
    assert len(given[-1]) == 2  # and these two
