"""A long backlog of held jobs makes no claim, no end and no tick slow: each reads a few of them, by
the index that was made for it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.operations import WaitReason
from jobsvc.store import queues, registry, verbs
from jobsvc.store.database import Database, Transaction
from jobsvc.store.reads import explaining
from jobsvc.store.rules import limits, releasing
from tests.store.house import DONE, House, new_token, wipe, worker
from tests.store.test_plans import Work, plans, shortcomings

HELD = 6_000
ENDED = 20_000

STARTS = {"ended": 0, "held": 1 << 32, "running": 2 << 32, "queued": 3 << 32, "offered": 4 << 32}


def _id(kind: str, number: int = 1) -> str:
    return str(uuid.UUID(int=STARTS[kind] + number))


@pytest.fixture(scope="module")
def crowded(migrated_postgresql: Database) -> Iterator[House]:
    house = House(migrated_postgresql)
    wipe(migrated_postgresql)
    house.announce(worker(job_types=("demo",)), JobTypeInfo("demo"))
    house.limit(max_running=3)
    house.write(_fill)
    with migrated_postgresql.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.exec_driver_sql("ANALYZE")
    yield house
    wipe(migrated_postgresql)


def _fill(tx: Transaction) -> None:
    columns = (
        "id, job_type, queue, state, priority, payload, labels, max_attempts, initial_backoff, "
        "backoff_multiplier, max_backoff, jitter, timeout, trace_id, span_id, create_time, "
        "schedule_time, last_sequence, finish_time, purge_time, queued_time, dispatch_time, "
        "lease_token, lease_expire_time, worker_id, held, held_for, concurrency_key, "
        "concurrency_max"
    )
    statement = sa.text(
        f"INSERT INTO jobs ({columns}) "
        "SELECT lpad(to_hex(n + :start), 32, '0')::uuid, 'demo', 'default', :state, n % 10, '', "
        "'{}', 10, 1, 1, 1, 0, 1, '', '', now(), now(), 2, "
        "CASE WHEN :state = 'SUCCEEDED' THEN now() END, "
        "CASE WHEN :state = 'SUCCEEDED' THEN now() END, now(), "
        "now() - n * interval '1 s', "
        "CASE WHEN :state = 'RUNNING' THEN gen_random_uuid() END, "
        "CASE WHEN :state = 'RUNNING' THEN now() + interval '1 h' END, 'w1', :held, "
        "CASE WHEN :held THEN (ARRAY['TYPE', 'QUEUE', 'KEY'])[1 + n % 3] "
        "WHEN :offered THEN 'OFFERED' END, "
        "CASE WHEN n % 2 = 0 THEN 'big' ELSE 'k' || n % 100 END, 1 "
        "FROM generate_series(1, :count) AS n"
    )
    for kind, state, count in (
        ("ended", "SUCCEEDED", ENDED),
        ("held", "QUEUED", HELD),
        ("running", "RUNNING", 5),
        ("queued", "QUEUED", 200),
        ("offered", "QUEUED", 3_000),  # most of them long ago
    ):
        given = {"start": STARTS[kind], "state": state, "count": count}
        flags = {"held": kind == "held", "offered": kind == "offered"}
        tx.execute(statement, given | flags)


def _room(tx: Transaction) -> None:
    tx.limited = True
    limits.Room(tx, ["default"], ["k1", "k2"])


def _release(tx: Transaction) -> None:
    tx.execute(sa.text("UPDATE queues SET max_running = 1000"))
    tx.limited = True
    assert releasing.release_held(tx, 100).count > 100


def _claim(tx: Transaction) -> None:
    ids = [_id("queued", n) for n in range(1, 20)]
    verbs.claim(tx, ids, frozenset({"demo"}), "w1", new_token(), 30.0)


def _finish(tx: Transaction) -> None:
    running = "SELECT id, lease_token FROM jobs WHERE state = 'RUNNING' AND lease_token IS NOT NULL"
    found = tx.execute(sa.text(f"{running} ORDER BY lease_expire_time")).all()
    verbs.finish(tx, {str(row.id): (str(row.lease_token), DONE) for row in found})


def _explain(tx: Transaction) -> None:
    tx.execute(sa.text("UPDATE queues SET max_running = NULL"))
    tx.execute(sa.text(f"UPDATE jobs SET concurrency_key = NULL WHERE id = '{_id('queued')}'"))
    found = explaining.explain(tx.connection, _id("queued"), broker_reachable=True)
    assert found.reason is WaitReason.BEHIND_OTHERS


WORK: dict[str, tuple[str, Work]] = {
    "count what runs": ("ix_jobs_leased", lambda tx: limits.count_running(tx.connection)),
    "count what runs of keys": (
        "ix_jobs_running_key",
        lambda tx: limits.count_running_keys(tx.connection, ["k1", "k2"]),
    ),
    "keep places in a queue": ("ix_jobs_offered", _room),
    # PostgreSQL 18 can also skip from queue to queue, over what was offered lately.
    "keep places of a key": ("ix_jobs_offered_key|ix_jobs_offered", _room),
    "release for a queue": ("ix_jobs_held", _release),
    "release for a key": ("ix_jobs_held_key", _release),
    "release for a type": ("ix_jobs_held_type", _release),
    "claim": ("ix_jobs_offered", _claim),
    "finish": ("ix_jobs_held_key", _finish),
    "list queues": ("ix_jobs_queued", lambda tx: queues.list_queues(tx.connection, "", 50)),
    "what is scheduled": (
        "ix_jobs_scheduled",
        lambda tx: queues.list_queues(tx.connection, "", 50),
    ),
    "list workers": (
        "ix_jobs_leased|ix_jobs_list_state",
        lambda tx: registry.list_workers(tx.connection, "", 50),
    ),
    "explain": ("ix_jobs_queued", _explain),
}


@pytest.mark.parametrize("name", list(WORK))
def test_it_uses_its_index(crowded: House, name: str) -> None:
    index, work = WORK[name]
    found = plans(crowded, work)
    assert shortcomings(found, index) == []
    assert not [plan for plan in found if "ix_jobs_list_queue" in plan]


@pytest.mark.parametrize("name", ["keep places in a queue", "release for a queue", "finish"])
def test_it_does_even_where_nothing_is_known_of_the_table(crowded: House, name: str) -> None:
    _, work = WORK[name]
    found = plans(
        crowded,
        work,
        "DELETE FROM pg_statistic WHERE starelid = 'jobs'::regclass",
        "UPDATE pg_class SET reltuples = -1 WHERE oid = 'jobs'::regclass",
    )
    wasteful = ("ix_jobs_list_queue", "ix_jobs_list_job_type", "Seq Scan on jobs")
    reads = [plan for plan in found if not plan.startswith("Update on")]
    assert [plan for plan in reads if any(way in plan for way in wasteful)] == []


def test_a_tick_or_an_end_locks_a_few_of_a_long_backlog(crowded: House) -> None:
    """In the order of the index, and not those first of all that wait."""
    found = [*plans(crowded, _release), *plans(crowded, _finish)]
    locks = [plan for plan in found if "LockRows" in plan and "_held" in plan]
    for of in ("_type", "queue", "= 'big'"):
        assert any(of in plan for plan in locks), of
    # Of the other keys there are a few jobs each, which may as well be sorted.
    assert [plan for plan in locks if "Sort" in plan and "= 'k" not in plan] == []
