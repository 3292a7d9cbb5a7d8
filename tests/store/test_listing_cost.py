"""A page of a list reads few rows, whatever is asked for and whatever the planner believes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.core.model import JobFilter
from jobsvc.core.states import JobState
from jobsvc.store.database import Database, Transaction
from jobsvc.store.reads import listing
from jobsvc.store.reads.listing import Search
from tests.store.house import House, explain, wipe

JOBS = 20_000
LOOK, STRIDE, PROBE = 1_000, 250, 50
PAGE = 50
# Each entry that is looked at, and its job; the window of times, twice; some probes; the page.
ROWS_MAX = 2 * (LOOK + STRIDE) + 2 * LOOK + 6 * PROBE + PAGE + 1
START = datetime(2026, 3, 1, tzinfo=UTC)

INSERT = """
    INSERT INTO jobs (id, job_type, queue, state, priority, payload, labels, max_attempts,
        initial_backoff, backoff_multiplier, max_backoff, jitter, timeout, trace_id, span_id,
        create_time, schedule_time, last_sequence, finish_time, idempotency_key)
    SELECT (lpad(to_hex(:start + n * 1000), 12, '0') || lpad(to_hex(n), 20, '0'))::uuid, 'demo',
        'default', 'SUCCEEDED', 0, '', '{"env": "prod"}', 10, 1, 1, 1, 0, 1, '', '',
        at, at, 3, at + interval '1 s', 'k' || n
    FROM generate_series(1, :jobs) AS n,
        LATERAL (SELECT CAST(:begin AS timestamptz) + n * interval '1 s' AS at) AS moment
"""
SOME = "id IN (SELECT id FROM jobs WHERE right(idempotency_key, {}) = '{}')"
UPDATES = (
    "UPDATE jobs SET state = 'FAILED', error_type = 'ValueError', error_time = now() WHERE "
    + SOME.format(2, "50"),
    "UPDATE jobs SET state = 'QUEUED', finish_time = NULL WHERE " + SOME.format(2, "51"),
    (
        "UPDATE jobs SET unique_key = idempotency_key, unique_scope = 'ACTIVE', "
        "unique_on_conflict = 'REJECT'"
    ),
    f"UPDATE jobs SET job_type = 'rare' WHERE {SOME.format(3, '500')}",
    f"UPDATE jobs SET queue = 'slow' WHERE {SOME.format(3, '700')}",
    "INSERT INTO job_labels SELECT 'env', 'prod', id FROM jobs",
    "INSERT INTO job_labels SELECT 'shop', right(idempotency_key, 3), id FROM jobs",
    (
        "INSERT INTO idempotency_keys (key, request_hash, job_id, expire_time) "
        "SELECT idempotency_key, '', id, now() FROM jobs"
    ),
)
# What the planner knows: that all jobs had succeeded once; how things are; nothing.
STATISTICS = {
    "stale": (),
    "fresh": ("ANALYZE jobs", "ANALYZE job_labels", "ANALYZE idempotency_keys"),
    "none": (
        "DELETE FROM pg_statistic WHERE starelid IN ('jobs'::regclass, 'job_labels'::regclass)",
        "UPDATE pg_class SET reltuples = -1 WHERE relname IN ('jobs', 'job_labels')",
    ),
}


def at(number: int) -> datetime:
    return START + timedelta(seconds=number)


def states(*names: str) -> frozenset[JobState]:
    return frozenset(map(JobState, names))


SEARCHES = {
    "all": ("pk_jobs", Search(JobFilter())),
    "a state": ("ix_jobs_list_state", Search(JobFilter(states=states("FAILED")))),
    "states": ("ix_jobs_list_state", Search(JobFilter(states=states("FAILED", "SUCCEEDED")))),
    "a type": ("ix_jobs_list_job_type", Search(JobFilter(job_types=frozenset({"rare"})))),
    "a queue": ("ix_jobs_list_queue", Search(JobFilter(queue="slow"))),
    "an error": (
        "ix_jobs_list_error_type",
        Search(JobFilter(error_types=frozenset({"ValueError", "TIMEOUT"}))),
    ),
    "any error": ("ix_jobs_list_error", Search(JobFilter(), failed=True)),
    "what can be retried": ("ix_jobs_unique", Search(JobFilter(), free=True)),
    "a label": ("pk_job_labels", Search(JobFilter(labels={"shop": "123"}))),
    "labels": ("pk_job_labels", Search(JobFilter(labels={"shop": "123", "env": "prod"}))),
    "a key": ("pk_idempotency_keys", Search(JobFilter(idempotency_key="k77"))),
    "when it ended": (
        "ix_jobs_finish_time",
        Search(JobFilter(finish_time_after=at(900), finish_time_before=at(1_200))),
    ),
    "of many the rarest": (
        "ix_jobs_list_job_type",
        Search(
            JobFilter(
                states=states("SUCCEEDED"), job_types=frozenset({"rare"}), labels={"env": "prod"}
            )
        ),
    ),
}
# What no index leads to; they end when enough was looked at.
HARD = {
    "when it began": JobFilter(create_time_before=at(9_000), queue="default"),
    "much that nobody has": JobFilter(
        queue="default", states=states("SUCCEEDED"), labels={"a": ""}
    ),
    "a wide time": JobFilter(finish_time_after=at(10), labels={"env": "prod"}),
    "what excludes itself": JobFilter(job_types=frozenset({"demo"}), queue="slow"),
    "a state before its time": JobFilter(
        states=states("SUCCEEDED"), finish_time_before=at(19_000), finish_time_after=at(17_000)
    ),
}


@pytest.fixture(scope="module")
def many(migrated_postgresql: Database) -> Iterator[House]:
    """So many jobs, most of which have succeeded; when the planner last looked, all had."""
    wipe(migrated_postgresql)
    house = House(migrated_postgresql)
    begin = {"begin": START, "start": int(START.timestamp() * 1000), "jobs": JOBS}
    house.write(lambda tx: tx.execute(sa.text(INSERT), begin))
    with migrated_postgresql.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.exec_driver_sql("ANALYZE")
    house.write(lambda tx: [tx.execute(sa.text(update)) for update in UPDATES])
    yield house
    wipe(migrated_postgresql)


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOOK", LOOK), ("STRIDE", STRIDE), ("PROBE", PROBE)):
        monkeypatch.setattr(listing, name, value)


def cost(
    house: House, search: Search, after: str, *before: str, read: Any = listing.page
) -> tuple[int, set[str]]:
    """How many rows a page of the list reads in all, and by which indexes."""
    total = 0
    indexes: set[str] = set()

    class Over(Exception):
        pass

    def count(node: dict[str, Any]) -> None:
        nonlocal total
        if "Relation Name" in node:
            removed = node.get("Rows Removed by Filter", 0)
            total += round((node["Actual Rows"] + removed) * node["Actual Loops"])
            indexes.add(node.get("Index Name", node["Node Type"]))
        for child in node.get("Plans", ()):
            count(child)

    def look(_c: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        explain(cursor, statement, parameters, "(ANALYZE, FORMAT JSON)")
        count(cursor.fetchone()[0][0]["Plan"])

    def body(tx: Transaction) -> None:
        for statement in before:
            tx.execute(sa.text(statement))
        sa.event.listen(tx.connection, "before_cursor_execute", look)
        read(tx.connection, search, after, PAGE)
        raise Over

    with pytest.raises(Over):
        house.write(body)
    return total, indexes


@pytest.mark.parametrize("knowledge", list(STATISTICS))
@pytest.mark.parametrize("name", list(SEARCHES))
@pytest.mark.parametrize("read", [listing.find, listing.page])
def test_a_page_goes_along_its_index(many: House, name: str, knowledge: str, read: Any) -> None:
    index, search = SEARCHES[name]
    total, indexes = cost(many, search, "", *STATISTICS[knowledge], read=read)
    assert total <= ROWS_MAX
    assert index in indexes
    assert indexes <= {index, "pk_jobs"} or len(search.filter.labels) > 0


@pytest.mark.parametrize("knowledge", list(STATISTICS))
@pytest.mark.parametrize("name", list(HARD))
def test_a_page_ends_where_no_index_helps(many: House, name: str, knowledge: str) -> None:
    search = Search(HARD[name])
    for after in ("", str(uuid.UUID(int=int(at(15_000).timestamp() * 1000) << 80))):
        total, _ = cost(many, search, after, *STATISTICS[knowledge])
        assert 0 < total <= ROWS_MAX


@pytest.mark.parametrize(
    "name", [name for name, (index, _) in SEARCHES.items() if index.startswith("ix_")]
)
def test_without_its_index_it_would_be_noticed(many: House, name: str) -> None:
    index, search = SEARCHES[name]
    total, indexes = cost(many, search, "", f"DROP INDEX {index}")
    assert total > ROWS_MAX or index not in indexes
