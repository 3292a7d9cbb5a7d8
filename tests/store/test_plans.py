"""Every sweep finds its rows by the index that was made for it, among many that it is not about."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.store import dispatching, recovery, verbs
from jobsvc.store import schedules as schedule_store
from jobsvc.store.database import Database, Transaction
from jobsvc.store.dialects.reading import BY_INDEX
from jobsvc.store.reads import fleet, lookups
from jobsvc.store.rules import releasing, uniqueness
from jobsvc.store.tables import idempotency_keys, job_events, jobs, outbox, schedules
from tests.store.house import House, explain, new_job, new_token, worker

ENDED = 20_000
OF_EACH_KIND = 300

IDS = [str(uuid.UUID(int=n)) for n in range(1, 4)]


@pytest.fixture(scope="module")
def full(migrated_postgresql: Database) -> Iterator[House]:
    """Many ended jobs, and some hundred of each other kind that are not due yet."""
    house = House(migrated_postgresql)
    house.write(_empty)
    house.write(_fill)
    house.announce(worker(job_types=("demo", "other")))
    with migrated_postgresql.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.exec_driver_sql("ANALYZE")
    yield house
    house.write(_empty)


def _empty(tx: Transaction) -> None:
    for table in (jobs, job_events, outbox, idempotency_keys, schedules):
        tx.execute(sa.text(f"TRUNCATE {table.name}"))


def _fill(tx: Transaction) -> None:
    columns = (
        "id, job_type, queue, state, priority, payload, labels, max_attempts, initial_backoff, "
        "backoff_multiplier, max_backoff, jitter, timeout, trace_id, span_id, create_time, "
        "schedule_time, last_sequence, finish_time, purge_time, expire_time, next_attempt_time, "
        "dispatch_time, lease_token, lease_expire_time, held, unique_key"
    )
    statement = sa.text(
        f"INSERT INTO jobs ({columns}) "
        "SELECT lpad(to_hex(n + :start), 32, '0')::uuid, 'demo', 'default', :state, 0, '', '{}', "
        "10, 1, 1, 1, 0, 1, '', '', now(), now() + n * interval '1 s', 3, "
        "CASE WHEN :ended THEN now() END, "
        "CASE WHEN :ended THEN now() + n * interval '1 s' END, "
        "CASE WHEN n % 3 = 0 THEN now() + n * interval '1 h' END, "
        "CASE WHEN :state = 'RETRYING' THEN now() + n * interval '1 s' END, "
        "now() + n * interval '1 s', "
        "CASE WHEN :state = 'RUNNING' THEN gen_random_uuid() END, "
        "CASE WHEN :state = 'RUNNING' THEN now() + n * interval '1 s' END, :held, "
        "CASE WHEN n % 2 = 0 THEN n::text END "
        "FROM generate_series(1, :count) AS n"
    )
    kinds = [("SUCCEEDED", False, ENDED)]
    kinds += [(s, False, OF_EACH_KIND) for s in ("SCHEDULED", "QUEUED", "RUNNING", "RETRYING")]
    kinds += [("QUEUED", True, OF_EACH_KIND)]
    for number, (state, held, count) in enumerate(kinds):
        parameters = {"state": state, "held": held, "count": count, "start": number << 32}
        tx.execute(statement, {**parameters, "ended": state == "SUCCEEDED"})
    for insert in (
        (
            "INSERT INTO job_events (job_id, sequence, type, state, event_time, attempt, x) "
            "SELECT id, s, 'LOG', 'RUNNING', now(), 1, row_number() OVER (ORDER BY s, id) "
            "FROM jobs, generate_series(1, 3) AS s"
        ),
        (
            "INSERT INTO outbox (kind, job_id, job_type, queue, priority, attempt, error_type, "
            "create_time, not_before) "
            "SELECT 'job', id, 'demo', 'default', 0, 0, '', now(), now() + interval '1 h' "
            "FROM jobs LIMIT 5000"
        ),
        (
            "INSERT INTO idempotency_keys (key, request_hash, job_id, expire_time) "
            "SELECT id::text, '', id, now() + interval '1 day' FROM jobs LIMIT 5000"
        ),
        (
            "INSERT INTO schedules (id, cron, time_zone, request, paused, missed_ticks, overlap, "
            "next_time, revision) "
            "SELECT 's' || n, '* * * * *', 'UTC', repeat('x', 500)::bytea, n % 2 = 0, 'SKIP', "
            "'ALLOW', now() + n * interval '1 s', 1 FROM generate_series(1, 2000) AS n"
        ),
    ):
        tx.execute(sa.text(insert))


Work = Callable[[Transaction], object]


def plans(house: House, work: Work, *before: str) -> list[str]:
    """What PostgreSQL does for each statement of `work` after the SQL `before`; all of it is
    rolled back."""
    found: list[str] = []

    class Over(Exception):
        pass

    def look(_c: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SET ") and ";\n" not in statement:  # has no plan
            return
        explain(cursor, statement, parameters)
        found.append("\n".join(line for (line,) in cursor.fetchall()))

    def body(tx: Transaction) -> None:
        for statement in before:
            tx.execute(sa.text(statement))
        sa.event.listen(tx.connection, "before_cursor_execute", look)
        work(tx)
        raise Over

    with pytest.raises(Over):
        house.write(body)
    assert found
    return found


def shortcomings(found: list[str], index: str) -> list[str]:
    """The plans that read a whole table, and "unused" where none uses the index (`a|b`: any of
    them)."""
    wasteful = [
        plan
        for plan in found
        for table in ("jobs", "job_events", "outbox", "idempotency_keys", "schedules")
        if f"Seq Scan on {table}" in plan
    ]
    return wasteful + (
        []
        if any(name in plan for plan in found for name in index.split("|"))
        else ["unused", *found]
    )


WORK: dict[str, tuple[str, Work]] = {
    "claim": (
        "pk_jobs",
        lambda tx: verbs.claim(tx, IDS, frozenset({"demo"}), "w1", new_token(), 30.0),
    ),
    "renew": (
        "pk_jobs|ix_jobs_list_state",
        lambda tx: verbs.renew(tx, dict.fromkeys(IDS, new_token()), 30.0),
    ),
    "promote what is scheduled": ("ix_jobs_scheduled", lambda tx: verbs.promote(tx, 200)),
    "promote what retries": ("ix_jobs_retrying", lambda tx: verbs.promote(tx, 200)),
    "expire": ("ix_jobs_expiring", lambda tx: verbs.expire(tx, 200)),
    "reap": ("ix_jobs_leased", lambda tx: verbs.reap(tx, 200)),
    "release": ("ix_jobs_held", lambda tx: releasing.release_held(tx, 200)),
    "purge jobs": ("ix_jobs_purge", lambda tx: verbs.purge(tx, 200, timedelta(hours=24))),
    "purge keys": (
        "ix_idempotency_keys_expire_time",
        lambda tx: verbs.purge(tx, 200, timedelta(hours=24)),
    ),
    "holders of unique keys": (
        "ix_jobs_unique",
        lambda tx: uniqueness.lock_holders(tx, [("demo", "2"), ("other", "4")], [], IDS),
    ),
    "tick": (
        "ix_schedules_next_time",
        lambda tx: schedule_store.tick(tx, 200, lambda _: new_job()),
    ),
    "relay": ("ix_outbox_not_before", lambda tx: dispatching.take_owed(tx, 200)),
    "where jobs are lost": ("ix_jobs_list_state", lambda tx: survey(tx)),
    "what is lost": ("ix_jobs_list_state", lambda tx: owe(tx)),
    "what is owed": ("ix_outbox_job_id", lambda tx: owe(tx)),
    "backlog": ("ix_jobs_queued", lambda tx: dispatching.backlog(tx.connection)),
    "the oldest in the outbox": ("pk_outbox", lambda tx: dispatching.backlog(tx.connection)),
    "overdue queues": (
        "ix_jobs_queued",
        lambda tx: dispatching.overdue_queues(tx.connection),
    ),
    "events of one job": (
        "pk_job_events",
        lambda tx: lookups.list_events(tx.connection, IDS[0], 0, 100),
    ),
    "events of all jobs": ("ix_job_events_x", lambda tx: page_of_events(tx)),
    "events of all jobs, apart": ("ix_job_events_x", lambda tx: page_of_events(tx, apart=True)),
}


def survey(tx: Transaction) -> None:
    tx.connection.exec_driver_sql(BY_INDEX)  # as `Database.scan` has it
    recovery._survey(tx.connection, recovery.overdue("default", tx.now), IDS[0])


def owe(tx: Transaction) -> None:
    window = recovery._Window(IDS[0], str(uuid.UUID(int=2**128 - 1)))
    recovery._owe(tx, recovery.overdue("default", tx.now), window, 200)


def page_of_events(tx: Transaction, *, apart: bool = False) -> None:
    fleet.page_after(tx.connection, (7, fleet.NO_JOB, 0), 200, apart=apart)


@pytest.mark.parametrize("name", list(WORK))
def test_it_uses_its_index(full: House, name: str) -> None:
    index, work = WORK[name]
    assert shortcomings(plans(full, work), index) == []


@pytest.mark.parametrize("name", [n for n, (index, _) in WORK.items() if index.startswith("ix_")])
def test_without_its_index_it_would_be_noticed(full: House, name: str) -> None:
    index, work = WORK[name]

    assert shortcomings(plans(full, work, f"DROP INDEX {index}"), index) != []


def test_a_claim_reads_its_own_jobs_even_where_nothing_is_known_of_the_table(full: House) -> None:
    """A guard in sight of the planner once made it read all QUEUED jobs for each job of a claim."""
    ids = [str(uuid.UUID(int=(2 << 32) + n)) for n in range(1, 51)]
    found = plans(
        full,
        lambda tx: verbs.claim(tx, ids, frozenset({"demo"}), "w1", new_token(), 30.0),
        "UPDATE jobs SET queued_time = now() WHERE state = 'QUEUED'",
        "DELETE FROM pg_statistic WHERE starelid = 'jobs'::regclass",
        "UPDATE pg_class SET reltuples = -1 WHERE oid = 'jobs'::regclass",
    )
    updates = [plan for plan in found if plan.startswith("Update on jobs")]
    assert len(updates) == 1
    assert "ix_jobs" not in updates[0], updates[0]


def test_events_of_all_jobs_are_found_even_where_nothing_is_known_of_the_tables(
    full: House,
) -> None:
    forget = [
        statement.format(table)
        for table in ("jobs", "job_events")
        for statement in (
            "DELETE FROM pg_statistic WHERE starelid = '{}'::regclass",
            "UPDATE pg_class SET reltuples = -1 WHERE oid = '{}'::regclass",
        )
    ]
    found = plans(full, page_of_events, *forget)
    assert shortcomings(found, "ix_job_events_x") == []
    (plan,) = (plan for plan in found if "job_events" in plan)
    assert plan.count("ix_job_events_x") == 2, plan  # the page, and the latest of all
    # What is due is not read and sorted as a whole for each page of it.
    assert "Incremental Sort" in plan, plan
