"""The hot path beside the verbs: what it takes, what it leaves, and that both write the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import Claimed, Interrupted, Succeeded
from jobsvc.core.model import Concurrency, JobUpdate, NewJob, Unique
from jobsvc.errors import IdempotencyKeyReused, JobStateForbids
from jobsvc.store import hot, verbs
from jobsvc.store.database import Database, Transaction
from jobsvc.store.hot.claiming import CLAIM
from jobsvc.store.hot.finishing import SUCCEED
from jobsvc.store.hot.publishing import FORGET_PUBLISHED
from jobsvc.store.hot.submitting import SUBMIT, SUBMIT_ALL, Known
from jobsvc.store.hot.watching import EVENTS_AFTER, HEADS
from jobsvc.store.tables import (
    idempotency_keys,
    job_events,
    job_labels,
    jobs,
    metadata,
    outbox,
    service,
)
from jobsvc.store.verbs import Submitted
from tests.store.house import (
    DONE,
    EVERY_QUEUE,
    EVERY_TYPE,
    FATAL,
    LEASE_SECONDS,
    RETRYABLE,
    House,
    new_job,
    new_token,
    together,
    wipe,
)

KNOWN = Known(0, {}, EVERY_QUEUE)


@pytest.fixture
def house(pg_house: House) -> Iterator[House]:
    """Its registry is at revision 0, and goes back to what it was."""
    revision = sa.select(service.c.registry_revision)
    before = pg_house.database.read(lambda c: c.execute(revision).scalar_one())
    set_revision(pg_house, 0)
    yield pg_house
    set_revision(pg_house, before)


def set_revision(house: House, number: int) -> None:
    house.write(lambda tx: tx.execute(sa.update(service).values(registry_revision=number)))


def claim(house: House, job_id: str, **options: Any) -> list[str]:
    """The ids of what the hot path claims of it."""
    values: dict[str, Any] = {"priority": 0, "types": EVERY_TYPE, "token": new_token()} | options
    found = hot.claim(
        house.database,
        {job_id: values["priority"]},
        values["types"],
        "w1",
        values["token"],
        LEASE_SECONDS,
    )
    return [each.job_id for each in found.claimed]


def store(house: House, request: NewJob, known: Known = KNOWN) -> bool:
    """Whether the hot path stores it."""
    stored, _ = hot.submit(house.database, [request], known)
    count = sa.select(sa.func.count()).where(jobs.c.id == request.job_id)
    is_there = bool(house.database.read(lambda c: c.execute(count).scalar_one()))
    assert is_there is bool(stored)
    return is_there


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"priority": 9, "queue": "slow", "max_attempts": 3, "timeout": 5.0, "retention": 3600.0},
        {"labels": {"a": "1", "b": "ü"}, "idempotency_key": "k", "request_hash": b"\x00\xff"},
        {"concurrency": Concurrency("c", 3)},
    ],
)
def test_a_plain_job_is_stored_by_one_statement(house: House, fields: dict[str, Any]) -> None:
    assert store(house, new_job(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"unique": Unique("u")},
        {"delay": 0.0},
        {"ttl": 1.0},
        {"schedule_time": "now"},
        {"expire_time": "now"},
    ],
)
def test_a_job_with_more_to_decide_is_the_verbs(house: House, fields: dict[str, Any]) -> None:
    now = house.now()
    for name, value in fields.items():
        fields[name] = now if value == "now" else value
    assert not store(house, new_job(**fields))


def test_other_job_types_than_the_caller_knows_are_the_verbs(house: House) -> None:
    assert not store(house, new_job(), Known(1, {}, EVERY_QUEUE))
    assert house.count(idempotency_keys) == 0


def test_a_queue_that_is_not_known_is_the_verbs(house: House) -> None:
    assert not store(house, new_job(queue="new"), Known(0, {}, {"default"}))
    assert store(house, new_job(), Known(0, {}, {"default"}))


def test_a_limit_anywhere_is_the_verbs(house: House) -> None:
    plain = house.submit()
    running = house.start()
    house.pause("elsewhere")
    assert not store(house, new_job(idempotency_key="k"))
    assert house.count(idempotency_keys) == 0
    assert not claim(house, plain)
    assert not hot.succeed(house.database, {running.job_id: (running.token, DONE)})[0]
    house.resume("elsewhere")
    assert claim(house, plain)


def test_a_key_that_is_in_use_is_the_verbs(house: House) -> None:
    """Of a group only that request; of one that goes as a whole, all."""
    first, again, other = (new_job(idempotency_key=k) for k in ("k", "k", "l"))
    assert store(house, first)
    stored, effects = hot.submit(house.database, [again, other], KNOWN)
    assert list(stored) == [other.job_id]
    assert [d.job_id for d in effects.dispatches] == [other.job_id]
    before = house.count(jobs), house.count(outbox), house.count(idempotency_keys)
    whole = [new_job(idempotency_key="m"), new_job(idempotency_key="k"), new_job()]
    assert hot.submit_all(house.database, whole, KNOWN) is None
    assert (house.count(jobs), house.count(outbox), house.count(idempotency_keys)) == before


def test_of_a_key_twice_in_a_group_one_is_stored(house: House) -> None:
    twins = [new_job(idempotency_key="k", request_hash=b"1") for _ in range(2)]
    stored, _ = hot.submit(house.database, twins, KNOWN)
    ((first),) = stored
    (other,) = [each for each in twins if each.job_id != first]
    answers, _ = house.write(lambda tx: verbs.submit(tx, [other], {}))
    assert isinstance(answers[0], Submitted)
    assert (answers[0].job_id, answers[0].already_existed) == (first, True)
    reused = new_job(idempotency_key="k", request_hash=b"2")
    assert not store(house, reused)
    answers, _ = house.write(lambda tx: verbs.submit(tx, [reused], {}))
    assert isinstance(answers[0], IdempotencyKeyReused)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"job_type": "strange"}, {}),
        ({"priority": 3}, {"priority": 4}),
        ({"concurrency": Concurrency("c", 3)}, {}),
        ({"delay": 60.0}, {}),
    ],
)
def test_a_job_that_may_not_start_is_left(
    house: House, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    job_id = house.submit(**fields)
    before = house.row(job_id)
    assert not claim(house, job_id, **options)
    assert house.row(job_id) == before


@pytest.mark.parametrize("held_for", [None, "TYPE", "QUEUE", "KEY", "OFFERED"])
def test_a_held_or_offered_job_is_the_verbs(house: House, held_for: str | None) -> None:
    job_id = house.submit()
    house.change(job_id, held=held_for != "OFFERED", held_for=held_for)
    assert not claim(house, job_id)
    house.change(job_id, held=False, held_for=None)
    assert claim(house, job_id)


def test_an_expired_job_is_the_verbs(house: House) -> None:
    job_id = house.submit(ttl=3600.0)
    past = house.now()
    assert claim(house, job_id)
    other = house.submit(ttl=3600.0)
    house.change(other, expire_time=past)
    assert not claim(house, other)


def test_what_runs_already_is_left_also_under_the_same_token(house: House) -> None:
    running = house.start()
    before = house.row(running.job_id)
    assert not claim(house, running.job_id, token=running.token)
    assert house.row(running.job_id) == before


@pytest.mark.parametrize("ending", [RETRYABLE, FATAL])
def test_any_other_ending_than_success_is_the_verbs(house: House, ending: Any) -> None:
    running = house.start()
    accepted, _ = hot.succeed(house.database, {running.job_id: (running.token, ending)})
    assert not accepted
    assert house.row(running.job_id).state == "RUNNING"


def test_no_success_is_written_without_the_lease(house: House) -> None:
    running, ended, waiting = house.start(), house.start(), house.submit()
    house.finish(ended, DONE)
    before = [house.row(i) for i in (running.job_id, ended.job_id, waiting)]
    endings = {
        running.job_id: (new_token(), DONE),
        ended.job_id: (ended.token, DONE),
        waiting: (running.token, DONE),
    }
    accepted, effects = hot.succeed(house.database, endings)
    assert not accepted
    assert not effects.changes
    assert [house.row(i) for i in (running.job_id, ended.job_id, waiting)] == before


def test_a_job_with_a_concurrency_key_is_ended_by_the_verb(house: House) -> None:
    """Somebody may wait for its place."""
    running = house.start(concurrency=Concurrency("c", 1))
    assert not hot.succeed(house.database, {running.job_id: (running.token, DONE)})[0]


# The same rows.

_OF_ITS_OWN = {"id", "job_id", "lease_token", "x", "last_x", "key"}


def rows(database: Database, table: sa.Table, order: sa.Column[Any]) -> list[dict[str, Any]]:
    """Without what is random or a clock's; whether that is there."""

    def shown(column: str, value: object) -> object:
        if column in _OF_ITS_OWN or column == "idempotency_key":
            return value is not None
        return value

    found = database.read(lambda c: c.execute(sa.select(table).order_by(order)).mappings().all())
    return [{name: shown(name, value) for name, value in row.items()} for row in found]


def live(house: House, submit: Callable[[NewJob], Any], take: Any, end: Any) -> dict[str, Any]:
    """All tables after a job's life, by the given ways, at one moment."""
    request = new_job(
        queue="q",
        priority=4,
        labels={"a": "1"},
        idempotency_key=new_token(),
        request_hash=b"\x00\x01",
        actor='al"ice',
        trace_id="t",
        span_id="s",
        concurrency=None,
    )
    answer, submitted = submit(request)
    assert answer.job_id == request.job_id
    claimed = take(request)
    ended = end(claimed.claimed[0])
    found: dict[str, Any] = {
        table.name: rows(house.database, table, order)
        for table, order in (
            (jobs, jobs.c.id),
            (job_events, job_events.c.sequence),
            (job_labels, job_labels.c.key),
            (outbox, outbox.c.id),
            (idempotency_keys, idempotency_keys.c.key),
        )
    }
    found["told"] = [
        (len(e.changes), [c.last_sequence for c in e.changes], dict(e.steps), len(e.dispatches))
        for e in (submitted, claimed.effects, ended[1])
    ]
    (one,) = claimed.claimed
    found["claimed"] = (one.job_type, one.queue, one.attempt, one.input, one.timeout, one.waited)
    found["job"] = (answer.job.create_time, answer.job.state, answer.job.queue, answer.job.labels)
    return found


def test_both_ways_write_the_same(house: House) -> None:
    database, token = house.database, new_token()
    house.frozen = house.now()
    house._set_clock()

    def one(found: tuple[Any, Any]) -> tuple[Any, Any]:
        (answer,) = found[0].values() if isinstance(found[0], dict) else found[0]
        return answer, found[1]

    by_statement = live(
        house,
        lambda request: one(hot.submit(database, [request], KNOWN)),
        lambda r: hot.claim(database, {r.job_id: 4}, EVERY_TYPE, "w1", token, 30.0),
        lambda c: hot.succeed(database, {c.job_id: (c.token, DONE)}),
    )
    wipe(database)
    by_verb = live(
        house,
        lambda request: one(house.write(lambda tx: verbs.submit(tx, [request], {}))),
        lambda r: house.write(
            lambda tx: verbs.claim(tx, [r.job_id], EVERY_TYPE, "w1", token, 30.0, {r.job_id: 4})
        ),
        lambda c: house.write(lambda tx: verbs.finish(tx, {c.job_id: (c.token, DONE)})),
    )
    house.frozen = None
    house._set_clock()
    assert by_statement == by_verb


# Beside others.


def test_a_row_that_is_locked_is_left_to_the_verb(house: House) -> None:
    """Whoever waited for it would hold up all others."""
    job_id, other = house.submit(priority=1), house.submit(priority=1)

    def body(tx: Transaction) -> list[str]:
        verbs.update(tx, job_id, JobUpdate(labels={"a": "b"}), "alice")
        given = {job_id: 1, other: 1}
        found = hot.claim(house.database, given, EVERY_TYPE, "w1", new_token(), LEASE_SECONDS)
        return [each.job_id for each in found.claimed]

    assert house.write(body) == [other]
    assert house.history(job_id) == ["SUBMITTED>QUEUED", "UPDATED>QUEUED"]
    assert claim(house, job_id, priority=1) == [job_id]


def test_two_that_have_the_same_jobs_in_another_order_do_not_deadlock(house: House) -> None:
    ids = [house.submit() for _ in range(30)]
    for _ in range(5):
        found = together(
            lambda: claim_many(house, ids),
            lambda: claim_many(house, ids[::-1]),
        )
        assert sorted(each.job_id for each in found[0] + found[1]) == ids
        for each in found[0] + found[1]:
            house.finish(each, Interrupted())


def claim_many(house: House, ids: Sequence[str]) -> tuple[Claimed, ...]:
    given = dict.fromkeys(ids, 0)
    found = hot.claim(house.database, given, EVERY_TYPE, "w1", new_token(), LEASE_SECONDS)
    return found.claimed


def test_any_mix_of_both_leaves_legal_histories(house: House) -> None:
    """The checker looks at all of them in the end."""
    ids = [house.submit(max_attempts=3) for _ in range(60)]

    def work(seed: int) -> int:
        chance = random.Random(seed)
        mine = House(house.database, hot=seed % 2 == 0)
        ended = 0
        for _ in range(60):
            batch = chance.sample(ids, 8)
            claimed = mine.claim_all(batch, worker_id=f"w{seed}")
            for each in claimed:
                how = chance.choice((DONE, DONE, RETRYABLE, Succeeded(DONE.result)))
                ended += mine.finish(each, how)
            if chance.random() < 0.3:
                with suppress(JobStateForbids):
                    mine.cancel(chance.choice(ids))
        return ended

    assert sum(together(*(lambda s=s: work(s) for s in range(4)))) >= 40


# Plans.


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize(
    ("statement", "given"),
    [
        (SUBMIT, "'[]', 0, '1 h', '1 s'"),
        (SUBMIT_ALL, "'[]', 0, '1 h', '1 s'"),
        (CLAIM, "'[]', '{demo}', 'w', gen_random_uuid(), '30 s'"),
        (SUCCEED, "'[]', 1.0"),
        (FORGET_PUBLISHED, "'{1}'"),
        (EVENTS_AFTER, "'{}', '{}', 64"),
        (HEADS, "'{}'"),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_a_statement_reads_no_table_whole(
    house: House, statement: Any, given: str, analyzed: bool
) -> None:
    """Whatever is known of the tables: nothing, or that they are as good as empty."""
    if analyzed:
        with house.database.engine.connect() as other:
            other.execution_options(isolation_level="AUTOCOMMIT")
            other.exec_driver_sql("ANALYZE")
    connection = house.database._single.raw_connection()
    try:
        with connection.cursor() as cursor:  # type: ignore[attr-defined]
            cursor.execute("DEALLOCATE ALL")
            connection.info.clear()
            cursor.execute(statement.prepare)
            cursor.execute(f"EXPLAIN EXECUTE {statement.name}({given})")
            plan = "\n".join(line for (line,) in cursor.fetchall())
            cursor.execute("DEALLOCATE ALL")
    finally:
        connection.close()
    wasteful = [
        f"{way} on {table.name}"
        for table in metadata.sorted_tables
        for way in ("Seq Scan", "Bitmap Heap Scan")
        if f"{way} on {table.name}" in plan
    ]
    assert [each for each in wasteful if not each.endswith(" service")] == [], plan
    assert "Hash Join" not in plan
    assert "Merge Join" not in plan
    if statement in (CLAIM, SUCCEED):
        assert "Index Scan using pk_jobs on jobs" in plan, plan
        assert "Tid Scan on jobs" in plan, plan
