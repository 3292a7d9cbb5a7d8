"""What a list finds is what a plain look at every job finds, whichever way it goes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.core.model import JobFilter
from jobsvc.core.states import JobState
from jobsvc.store.database import Connection, Database
from jobsvc.store.locking import lock
from jobsvc.store.reads import listing
from jobsvc.store.reads.listing import Search
from tests.store import crowd
from tests.store.house import wipe

JOBS = 250
Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(migrated: Database) -> Iterator[list[Row]]:
    """Random jobs, the newest first."""
    chance = random.Random(11)
    made = [crowd.random_row(chance) for _ in range(JOBS)]
    wipe(migrated)
    migrated.write(lambda tx: crowd.insert(tx, made))
    yield sorted(made, key=lambda row: str(row["id"]), reverse=True)
    wipe(migrated)


@pytest.fixture
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LOOK", 120)
    monkeypatch.setattr(listing, "STRIDE", 50)
    monkeypatch.setattr(listing, "PROBE", 10)


def wanted(row: Row, f: JobFilter) -> bool:
    """The contract's words, one by one."""
    if f.states and row["state"] not in f.states:
        return False
    if f.job_types and row["job_type"] not in f.job_types:
        return False
    if f.queue and row["queue"] != f.queue:
        return False
    if any(row["labels"].get(key) != value for key, value in f.labels.items()):
        return False
    if f.error_types and row["error_type"] not in f.error_types:
        return False
    if f.idempotency_key and row["idempotency_key"] != f.idempotency_key:
        return False
    for name in ("create_time", "finish_time"):
        after, before = getattr(f, f"{name}_after"), getattr(f, f"{name}_before")
        if (after or before) and row[name] is None:
            return False
        if after and row[name] < after:
            return False
        if before and row[name] >= before:
            return False
    return True


def pages(database: Database, search: Search, size: int) -> list[list[str]]:
    found = []
    after = ""
    while True:
        ids, last = database.scan(
            lambda c, after=after: listing.find(c, search, after, size)  # type: ignore[misc]
        )
        jobs, same = database.read(
            lambda c, after=after: listing.page(c, search, after, size)  # type: ignore[misc]
        )
        assert ([job.job_id for job in jobs], same) == (ids, last)
        assert len(ids) <= size
        found.append(ids)
        if not last:
            return found
        assert not after or last < after
        after = last


def listed(database: Database, search: Search, size: int = 1_000) -> list[str]:
    return [job_id for page in pages(database, search, size) for job_id in page]


@pytest.mark.usefixtures("in_small_steps")
def test_it_finds_what_the_filter_says(migrated: Database, rows: list[Row]) -> None:
    chance = random.Random(5)
    sizes = []
    for _ in range(35):
        asked = crowd.random_filter(chance, rows)
        expected = [row["id"] for row in rows if wanted(row, asked)]
        assert listed(migrated, Search(asked), chance.choice((30, 60, 500))) == expected, asked
        sizes.append(len(expected))
    assert sum(0 < size < JOBS for size in sizes) > 15  # they tell something


@pytest.mark.usefixtures("in_small_steps")
@pytest.mark.parametrize("size", [20, 49, 50, 51, 120, 250, 251])
def test_pages_of_any_size_are_the_whole_list(
    migrated: Database, rows: list[Row], size: int
) -> None:
    assert listed(migrated, Search(JobFilter()), size) == [row["id"] for row in rows]
    states = frozenset({JobState.QUEUED, JobState.FAILED, JobState.SUCCEEDED})
    expected = [row["id"] for row in rows if row["state"] in states]
    assert listed(migrated, Search(JobFilter(states=states)), size) == expected


def test_a_page_ends_when_enough_was_looked_at(
    migrated: Database, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "LOOK", 60)
    monkeypatch.setattr(listing, "STRIDE", 60)
    late = rows[0]["create_time"] + timedelta(days=99)
    ended = Search(JobFilter(finish_time_before=late))  # too many to begin with these
    found = pages(migrated, ended, JOBS)
    assert len(found) == JOBS // 60 + 1
    states = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
    expected = listed(migrated, Search(JobFilter(states=states)))
    assert [job_id for page in found for job_id in page] == expected


@pytest.mark.parametrize(
    "asked",
    [
        JobFilter(create_time_after=crowd.START + timedelta(days=99)),
        JobFilter(create_time_before=crowd.START - timedelta(days=1)),
        JobFilter(finish_time_after=crowd.START + timedelta(days=99), queue="slow"),
        JobFilter(labels={"env": "prod", "shop.id": "4"}),
        JobFilter(states=frozenset({JobState.QUEUED}), job_types=frozenset({"unknown"})),
    ],
)
def test_what_nothing_can_match_is_known_at_once(
    migrated: Database, rows: list[Row], asked: JobFilter
) -> None:
    statements = []

    def find(connection: Connection) -> object:
        sa.event.listen(
            connection, "before_cursor_execute", lambda *args: statements.append(args[2])
        )
        return listing.find(connection, Search(asked), "", 50)

    assert migrated.scan(find) == ([], "")
    assert sum("SELECT" in statement for statement in statements) <= 2


def test_a_time_is_exact_whatever_clock_an_id_began_with(
    migrated: Database, rows: list[Row]
) -> None:
    for row in rows[::25]:
        created, ended = row["create_time"], row["finish_time"]
        tick = timedelta(microseconds=1)
        for asked, expected in (
            (JobFilter(create_time_after=created, create_time_before=created + tick), True),
            (JobFilter(create_time_after=created - tick, create_time_before=created), False),
            (JobFilter(finish_time_after=ended, finish_time_before=ended and ended + tick), True),
        ):
            assert (row["id"] in listed(migrated, Search(asked))) is expected


def test_jobs_with_an_error_are_found_by_themselves(migrated: Database, rows: list[Row]) -> None:
    search = Search(JobFilter(), failed=True)
    expected = [row["id"] for row in rows if row["error_type"] is not None]
    assert listed(migrated, search, 20) == expected


@pytest.mark.parametrize("seed", range(3))
def test_a_locked_job_is_judged_as_the_list_does(
    migrated: Database, rows: list[Row], seed: int
) -> None:
    chance = random.Random(seed)
    locked = migrated.write(lambda tx: lock(tx, [row["id"] for row in rows]))
    for _ in range(40):
        search = Search(crowd.random_filter(chance, rows))
        assert [row["id"] for row in rows if listing.matches(search, locked[row["id"]])] == [
            row["id"] for row in rows if wanted(row, search.filter)
        ]
