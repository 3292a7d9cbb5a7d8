from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import Input, JobTypeInfo
from jobsvc.core.model import DAY, Effects, RetryPolicy
from jobsvc.core.states import JobState
from jobsvc.errors import IdempotencyKeyReused
from jobsvc.store.database import Transaction
from jobsvc.store.tables import idempotency_keys, job_events, jobs
from jobsvc.store.verbs import Submitted, preview, submit
from jobsvc.store.verbs.submitting import KEY_LIFETIME, find_keys
from tests.store.house import (
    DONE,
    WAIT_SECONDS_MAX,
    House,
    new_id,
    new_job,
    together,
    wait_until_blocked,
)


def test_a_bare_job_gets_the_services_defaults(house: House) -> None:
    job = house.get(house.submit("demo", actor="alice", trace_id="t1"))
    assert (job.job_type, job.queue, job.state) == ("demo", "default", JobState.QUEUED)
    assert (job.priority, job.attempt, job.max_attempts) == (0, 0, 10)
    assert (job.timeout, job.retry_policy) == (1800.0, RetryPolicy(10.0, 2.0, 3600.0, 0.2))
    assert (job.input, job.labels, job.trace_id) == (Input(b""), {}, "t1")
    assert job.schedule_time == job.create_time
    assert job.last_sequence == 1
    assert (job.start_time, job.finish_time, job.expire_time, job.purge_time) == (None,) * 4
    assert (job.next_attempt_time, job.progress, job.error) == (None, None, None)
    assert (job.worker_id, job.cancel_requested, job.idempotency_key) == ("", False, None)
    (event,) = house.events(job.job_id)
    assert (event.sequence, event.type, event.state) == (1, "SUBMITTED", "QUEUED")
    assert (event.attempt, event.actor, event.event_time) == (0, "alice", job.create_time)
    assert house.owed() == ["job"]


def test_what_is_submitted_is_stored_exactly(house: House) -> None:
    data = bytes(range(256))
    request = new_job(
        input=Input(data, "application/x-thing"),
        queue="slow",
        priority=9,
        max_attempts=3,
        retry_policy=RetryPolicy(0.5, 1.5, 7.25, 0.0),
        timeout=12.5,
        retention=3600.0,
        labels={"b": "ü", "a": ""},
        idempotency_key="k",
        request_hash=b"\x00\xff",
    )
    (answer,) = house.submit_all([request])
    assert isinstance(answer, Submitted)
    job = house.get(request.job_id)
    assert job.input == Input(data, "application/x-thing")
    assert (job.queue, job.priority, job.max_attempts) == ("slow", 9, 3)
    assert (job.retry_policy, job.timeout) == (request.retry_policy, 12.5)
    assert (job.labels, job.idempotency_key) == ({"b": "ü", "a": ""}, "k")
    assert answer.job is not None
    assert answer.job.input is None
    assert house.database.read(lambda c: find_keys(c, ["k"])) == {"k": (b"\x00\xff", job.job_id)}


def test_the_answer_is_the_job_as_it_is_stored(house: House) -> None:
    (answer,) = house.submit_all([new_job(delay=60.0, labels={"a": "b"}, ttl=90.0)])
    assert isinstance(answer, Submitted)
    assert answer.job == replace(house.get(answer.job_id), input=None)


def test_a_types_defaults_come_before_the_services_and_after_the_requests(house: House) -> None:
    info = JobTypeInfo("demo", queue="typed", max_attempts=4, timeout=5.0)
    own = new_job(queue="mine", max_attempts=2, timeout=1.0)
    bare, other = new_job(), new_job("other")
    house.submit_all([own, bare, other], [info])
    for request, expected in (
        (own, ("mine", 2, 1.0)),
        (bare, ("typed", 4, 5.0)),
        (other, ("default", 10, 1800.0)),
    ):
        job = house.get(request.job_id)
        assert (job.queue, job.max_attempts, job.timeout) == expected


@pytest.mark.parametrize("by", ["delay", "schedule_time"])
def test_a_job_for_later_is_scheduled_and_owes_no_message(house: House, by: str) -> None:
    due = house.now() + timedelta(hours=1)
    when: dict[str, Any] = {by: 3600.0 if by == "delay" else due}
    job_id = house.submit(**when)
    job = house.get(job_id)
    assert job.state == JobState.SCHEDULED
    assert job.schedule_time is not None
    if by == "delay":
        assert job.schedule_time == job.create_time + timedelta(hours=1)
    else:
        assert job.schedule_time == due
    assert house.history(job_id) == ["SUBMITTED>SCHEDULED"]
    assert house.owed() == []
    assert house.effects.dispatches == ()


@pytest.mark.parametrize("by", ["delay", "schedule_time"])
def test_a_job_for_the_past_is_due_now(house: House, by: str) -> None:
    past = house.now() - timedelta(days=400)
    when: dict[str, Any] = {by: 0.0 if by == "delay" else past}
    job = house.get(house.submit(**when))
    assert job.state == JobState.QUEUED
    assert job.schedule_time == job.create_time
    assert house.owed() == ["job"]


def test_the_effects_name_the_change_and_the_message(house: House) -> None:
    job_id = house.submit(queue="q", priority=3)
    (change,), (dispatch,) = house.effects.changes, house.effects.dispatches
    assert (change.job_id, change.last_sequence) == (job_id, 1)
    assert (dispatch.kind, dispatch.job_id, dispatch.job_type) == ("job", job_id, "demo")
    assert (dispatch.queue, dispatch.priority, dispatch.attempt) == ("q", 3, 0)


@pytest.mark.parametrize("delay", [None, 60.0])
def test_a_past_expire_time_expires_at_once(house: House, delay: float | None) -> None:
    past = house.now() - timedelta(seconds=1)
    (answer,) = house.submit_all([new_job(expire_time=past, delay=delay)])
    assert isinstance(answer, Submitted)
    waiting = "QUEUED" if delay is None else "SCHEDULED"
    assert house.history(answer.job_id) == [f"SUBMITTED>{waiting}", "FAILED>FAILED"]
    job = house.get(answer.job_id)
    assert job.error is not None
    assert (job.state, job.error.type, job.error.retryable) == ("FAILED", "EXPIRED", False)
    assert answer.job is not None
    assert (answer.job.state, answer.job.last_sequence) == ("FAILED", 2)
    assert house.owed() == ["dead"]


def test_a_ttl_counts_from_the_submit(house: House) -> None:
    job = house.get(house.submit(ttl=90.0))
    assert job.expire_time == job.create_time + timedelta(seconds=90)


def test_a_preview_stores_nothing(house: House) -> None:
    request = new_job(delay=5.0, labels={"a": "b"})
    info = JobTypeInfo("demo", queue="typed")
    answer = house.database.read(lambda c: preview(c, request, info))
    assert isinstance(answer, Submitted)
    job = answer.job
    assert job is not None
    assert answer.job_id == job.job_id == ""
    assert (job.queue, job.state, job.last_sequence) == ("typed", "SCHEDULED", 0)
    assert job.labels == {"a": "b"}
    assert house.count(jobs) == 0


# Idempotency keys.


def test_the_same_request_again_is_the_first_job(house: House) -> None:
    first = house.submit(idempotency_key="k", request_hash=b"1")
    claimed = house.claim(first)
    again = new_job(idempotency_key="k", request_hash=b"1")
    (answer,) = house.submit_all([again])
    assert isinstance(answer, Submitted)
    assert (answer.job_id, answer.already_existed) == (first, True)
    assert answer.job is not None
    assert answer.job.state == JobState.RUNNING
    assert house.effects == Effects()
    assert house.count(jobs) == 1
    assert claimed.job_id == first


def test_another_request_with_the_key_is_refused_and_the_others_stand(house: House) -> None:
    first = house.submit(idempotency_key="k", request_hash=b"1")
    reused = new_job(idempotency_key="k", request_hash=b"2")
    free = new_job()
    refused, stored = house.submit_all([reused, free])
    assert isinstance(refused, IdempotencyKeyReused)
    assert refused.job_id == first
    assert isinstance(stored, Submitted)
    assert stored.job_id == free.job_id
    assert house.count(jobs) == 2


def test_a_key_twice_in_one_call(house: House) -> None:
    first, same, other = (new_job(idempotency_key="k", request_hash=h) for h in (b"1", b"1", b"2"))
    answers = house.submit_all([first, same, other])
    assert isinstance(answers[0], Submitted)
    assert isinstance(answers[1], Submitted)
    assert isinstance(answers[2], IdempotencyKeyReused)
    assert [answers[0].job_id, answers[1].job_id, answers[2].job_id] == [first.job_id] * 3
    assert [answers[0].already_existed, answers[1].already_existed] == [False, True]
    assert answers[1].job == answers[0].job
    assert house.count(jobs) == 1


def test_the_answers_come_in_the_order_of_the_requests(house: House) -> None:
    old = house.submit(idempotency_key="z", request_hash=b"1")
    requests = [
        new_job(idempotency_key="z", request_hash=b"1"),
        new_job(),
        new_job(idempotency_key="a", request_hash=b"1"),
        new_job(idempotency_key="z", request_hash=b"9"),
        new_job(idempotency_key="a", request_hash=b"1"),
    ]
    answers = house.submit_all(requests)
    expected = [old, requests[1].job_id, requests[2].job_id, old, requests[2].job_id]
    assert [answer.job_id for answer in answers] == expected


def test_a_thousand_in_one_call(house: House) -> None:
    requests = [new_job(idempotency_key=f"k{n}", request_hash=b"1") for n in range(1000)]
    answers = house.submit_all(requests)
    assert [a.job_id for a in answers] == [r.job_id for r in requests]
    assert house.count(jobs) == house.count(job_events) == len(house.owed()) == 1000
    assert len({d.job_id for d in house.effects.dispatches}) == 1000
    again = house.submit_all(
        [new_job(idempotency_key=f"k{n}", request_hash=b"1") for n in range(1000)]
    )
    assert [a.job_id for a in again] == [r.job_id for r in requests]


def test_a_key_outlives_its_job(house: House) -> None:
    first = house.submit(idempotency_key="k", request_hash=b"1")
    house.forget_job(first)
    same, other = (new_job(idempotency_key="k", request_hash=h) for h in (b"1", b"2"))
    answered, refused = house.submit_all([same, other])
    assert answered == Submitted(first, None, already_existed=True)
    assert isinstance(refused, IdempotencyKeyReused)
    assert house.count(jobs) == 0


def test_a_key_lives_a_day_and_as_long_as_its_job(house: House) -> None:
    def keys() -> int:
        house.purge()
        return house.count(idempotency_keys)

    waiting = house.submit(idempotency_key="waits", request_hash=b"1")
    gone = house.submit(idempotency_key="gone", request_hash=b"1")
    house.forget_job(gone)
    house.wait(KEY_LIFETIME.total_seconds() - 1)
    assert keys() == 2
    house.wait(2)
    assert keys() == 1
    house.wait(400 * DAY)
    assert keys() == 1
    house.finish(house.claim(waiting), DONE)
    house.wait(8 * DAY)
    assert keys() == 0
    assert house.submit(idempotency_key="waits", request_hash=b"2")


def test_one_key_submitted_by_a_hundred_threads_is_one_job(house: House) -> None:
    def once() -> str:
        request = new_job(idempotency_key="k", request_hash=b"1")
        answers, _ = house.write(lambda tx: submit(tx, [request], {}))
        return answers[0].job_id

    answered = together(*[once] * 100)
    assert len(set(answered)) == 1
    assert house.count(jobs) == house.count(idempotency_keys) == 1
    assert house.owed() == ["job"]


def test_keys_are_taken_in_order(pg_house: House) -> None:
    """Two that took the same keys in opposite order would each wait for the other."""
    house = pg_house
    runs: list[str] = []
    took_one = threading.Event()

    def take(tx: Transaction, *names: str) -> list[str]:
        requests = [new_job(idempotency_key=n, request_hash=b"1") for n in names]
        return [answer.job_id for answer in submit(tx, requests, {})[0]]

    def one_by_one(tx: Transaction) -> list[str]:
        runs.append("forth")
        first = take(tx, "a")
        took_one.set()
        wait_until_blocked(house)
        return first + take(tx, "b")

    def backwards(tx: Transaction) -> list[str]:
        runs.append("back")
        return take(tx, "b", "a")

    def second() -> list[str]:
        assert took_one.wait(WAIT_SECONDS_MAX)
        return house.write(backwards)

    forth, back = together(lambda: house.write(one_by_one), second)
    assert forth == back[::-1]
    assert sorted(runs) == ["back", "forth"]  # neither had to be tried again
    assert house.count(jobs) == 2


def test_a_key_purged_while_it_is_looked_up_is_taken_anew(pg_house: House) -> None:
    house = pg_house
    gone = house.submit(idempotency_key="k", request_hash=b"1")
    house.forget_job(gone)
    request = new_job(idempotency_key="k", request_hash=b"1")
    purged: list[object] = []

    def submit_slowly(tx: Transaction) -> str:
        def purge(*_: object) -> None:
            if not purged:
                purged.append(house.write(lambda tx: tx.execute(sa.delete(idempotency_keys))))

        # After the first statement, which finds the key taken, and before the look at whose it is.
        sa.event.listen(tx.connection, "after_cursor_execute", purge)
        answers, _ = submit(tx, [request], {})
        return answers[0].job_id

    assert house.write(submit_slowly) == request.job_id
    assert purged
    assert house.get(request.job_id).state == JobState.QUEUED


def test_an_unknown_key_is_not_found(house: House) -> None:
    assert house.database.read(lambda c: find_keys(c, [new_id()])) == {}
