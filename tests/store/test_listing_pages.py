"""Pages of lists while jobs come and go, and what is read for them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from jobsvc.core.model import AttemptFailed, Input, JobError, JobFilter
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
    (full,) = read(house, [claimed.job_id], full=True)
    assert full.input == Input(b"big")
    assert full == house.get(claimed.job_id)
    assert full.error.traceback == "line 1"


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
