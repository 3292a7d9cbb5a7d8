"""Unique keys at submit: who holds one, and what becomes of whoever comes to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from jobsvc.core.attempts import Ending, JobError
from jobsvc.core.model import Effects, Job, NewJob, Unique, UniqueScope
from jobsvc.core.model import OnConflict as How
from jobsvc.core.states import JobState
from jobsvc.errors import IdempotencyKeyReused, JobStateForbids, JobUnknown, UniqueConflict
from jobsvc.store import verbs
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.statements import lock_number
from jobsvc.store.tables import idempotency_keys, job_labels, jobs
from jobsvc.store.verbs import Answer, Submitted, preview, submit
from jobsvc.store.verbs.submitting import find_keys
from tests.store.house import (
    DONE,
    EVERY_TYPE,
    FATAL,
    RETRYABLE,
    WAIT_SECONDS_MAX,
    House,
    new_job,
    new_token,
    together,
    wait_until_blocked,
)

EXISTING = Unique("k")
REJECT = Unique("k", on_conflict=How.REJECT)
REPLACE = Unique("k", on_conflict=How.REPLACE)
WAITING = Unique("k", UniqueScope.WAITING)


def ask(house: House, request: NewJob) -> Answer:
    """Both ways, which must agree in all but the id of a new job."""
    shown = house.database.read(lambda c: preview(c, request, None))
    (answer,) = house.submit_all([request])
    if isinstance(answer, Submitted) and answer.job_id == request.job_id:
        assert isinstance(shown, Submitted)
        assert (shown.job_id, shown.already_existed) == ("", False)
        assert shown.job is not None
        assert shown.job.unique == request.unique
    elif isinstance(answer, Submitted):
        assert shown == answer
    else:
        assert (type(shown), shown.job_id) == (type(answer), answer.job_id)
    return answer


def stored(answer: Answer, request: NewJob) -> bool:
    assert not isinstance(answer, IdempotencyKeyReused)
    return isinstance(answer, Submitted) and answer.job_id == request.job_id


def in_state(house: House, state: str, unique: Unique) -> str:
    job_id = house.submit(unique=unique, delay=60.0 if state == "SCHEDULED" else None)
    if state in ("SCHEDULED", "QUEUED"):
        return job_id
    claimed = house.claim(job_id)
    endings: dict[str, Ending] = {"RETRYING": RETRYABLE, "SUCCEEDED": DONE, "FAILED": FATAL}
    if state == "CANCELLED":
        house.cancel(job_id)
        house.finish(claimed, RETRYABLE)
    elif state in endings:
        house.finish(claimed, endings[state])
    return job_id


@pytest.mark.parametrize("scope", list(UniqueScope))
@pytest.mark.parametrize("state", list(JobState))
def test_a_job_holds_its_key_as_long_as_its_own_scope_says(
    house: House, state: JobState, scope: UniqueScope
) -> None:
    holder = in_state(house, state, Unique("k", scope))
    assert house.get(holder).state == state
    holds = not state.terminal and (state is not JobState.RUNNING or scope is UniqueScope.ACTIVE)
    request = new_job(unique=replace(REJECT, scope=UniqueScope.WAITING))
    answer = ask(house, request)
    assert stored(answer, request) != holds
    if holds:
        assert isinstance(answer, UniqueConflict)
        assert answer.job_id == holder


def test_a_key_is_its_job_types_own(house: House) -> None:
    house.submit(unique=REJECT)
    for request in (
        new_job("other", unique=REJECT),
        new_job(unique=Unique("K", on_conflict=How.REJECT)),
        new_job(),
    ):
        assert stored(ask(house, request), request)
    last = new_job(unique=REJECT)
    assert not stored(ask(house, last), last)


def test_the_holder_answers_for_a_request(house: House) -> None:
    holder = house.submit(unique=REJECT, labels={"a": "b"})
    answer = ask(house, new_job(unique=EXISTING, queue="else"))
    assert answer == Submitted(holder, replace(house.get(holder), input=None), already_existed=True)
    assert house.count(jobs) == 1
    assert house.effects == Effects()


def test_a_refused_request_leaves_nothing(house: House) -> None:
    holder = house.submit(unique=EXISTING)
    other = new_job()
    refused, free = house.submit_all(
        [new_job(unique=REJECT, idempotency_key="i", labels={"a": "b"}), other]
    )
    assert isinstance(refused, UniqueConflict)
    assert refused.job_id == holder
    assert stored(free, other)
    assert (house.count(jobs), house.count(job_labels)) == (2, 0)
    assert house.count(idempotency_keys) == 0
    house.cancel(holder)
    again = new_job(unique=REJECT, idempotency_key="i")
    assert stored(ask(house, again), again)


@pytest.mark.parametrize("state", ["SCHEDULED", "QUEUED", "RETRYING"])
def test_who_waits_is_replaced(house: House, state: str) -> None:
    old = in_state(house, state, EXISTING)
    house.deliver()
    request = new_job(unique=REPLACE, actor="bob")
    answer = ask(house, request)
    assert answer == Submitted(
        request.job_id, replace(house.get(request.job_id), input=None), replaced=(old,)
    )
    job = house.get(old)
    assert job.error == JobError("CANCELLED", f"replaced by job {request.job_id}")
    event = house.events(old)[-1]
    assert (event.type, event.state, event.actor) == ("CANCELLED", "CANCELLED", "bob")
    assert {c.job_id for c in house.effects.changes} == {old, request.job_id}
    assert house.owed() == ["job"]
    assert house.claim_all([old]) == ()


def test_who_runs_is_left_and_the_new_one_waits_beside_it(house: House) -> None:
    running = house.start(unique=REPLACE)
    first = new_job(unique=REPLACE)
    answer = ask(house, first)
    assert isinstance(answer, Submitted)
    assert answer.replaced == ()
    # Of two that hold the key, the one whose run is to come answers.
    held = ask(house, new_job(unique=EXISTING))
    assert held.job_id == first.job_id
    assert ask(house, new_job(unique=REJECT)).job_id == first.job_id
    # And of those two, the one that waits is replaced.
    second = ask(house, new_job(unique=REPLACE))
    assert isinstance(second, Submitted)
    assert second.replaced == (first.job_id,)
    house.cancel(second.job_id)
    assert ask(house, new_job(unique=EXISTING)).job_id == running.job_id
    assert house.finish(running, DONE)


def test_all_that_wait_are_replaced(house: House) -> None:
    """There are two once one that was left running waits again."""
    running = house.start(unique=REPLACE)
    beside = house.submit(unique=REPLACE)
    house.finish(running, RETRYABLE)
    answer = ask(house, new_job(unique=REPLACE))
    assert isinstance(answer, Submitted)
    assert set(answer.replaced) == {running.job_id, beside}
    assert house.get(running.job_id).state == house.get(beside).state == JobState.CANCELLED


def test_who_goes_back_to_waiting_asks_nobody(house: House) -> None:
    running = house.start(unique=WAITING)
    beside = house.submit(unique=WAITING)
    house.finish(running, RETRYABLE)
    assert house.get(running.job_id).state == JobState.RETRYING
    assert ask(house, new_job(unique=REJECT)).job_id == beside


def test_requests_of_one_call_see_each_other(house: House) -> None:
    first, twin = new_job(unique=EXISTING), new_job(unique=EXISTING)
    rejected, other = new_job(unique=REJECT), new_job("other", unique=REJECT)
    later = new_job(unique=REPLACE)
    answers = house.submit_all([first, twin, rejected, other, later])
    assert isinstance(answers[0], Submitted)
    assert isinstance(answers[1], Submitted)
    assert (answers[1].job_id, answers[1].already_existed) == (first.job_id, True)
    assert isinstance(answers[2], UniqueConflict)
    assert answers[2].job_id == first.job_id
    assert stored(answers[3], other)
    assert isinstance(answers[4], Submitted)
    assert answers[4].replaced == (first.job_id,)
    # All are answered with what the call has led to.
    assert answers[0].job == answers[1].job == replace(house.get(first.job_id), input=None)
    assert house.history(first.job_id) == ["SUBMITTED>QUEUED", "CANCELLED>CANCELLED"]
    assert {d.job_id for d in house.effects.dispatches} == {other.job_id, later.job_id}


def test_one_that_expires_at_once_holds_no_key(house: House) -> None:
    dead = new_job(unique=EXISTING, expire_time=house.now())
    alive = new_job(unique=EXISTING)
    answers = house.submit_all([dead, alive])
    assert stored(answers[0], dead)
    assert stored(answers[1], alive)


# With an idempotency key.


def test_an_idempotency_key_comes_first(house: House) -> None:
    request = new_job(unique=REPLACE, idempotency_key="i")
    first = ask(house, request)
    again = ask(house, new_job(unique=REPLACE, idempotency_key="i"))
    assert isinstance(again, Submitted)
    assert (again.job_id, again.already_existed) == (first.job_id, True)
    other = ask(house, new_job(unique=REJECT, idempotency_key="i", request_hash=b"2"))
    assert isinstance(other, IdempotencyKeyReused)
    house.finish(house.claim(first.job_id), DONE)
    assert ask(house, new_job(unique=REPLACE, idempotency_key="i")).job_id == first.job_id


def test_an_idempotency_key_names_the_job_that_answered(house: House) -> None:
    holder = house.submit(unique=EXISTING)
    assert ask(house, new_job(unique=EXISTING, idempotency_key="i")).job_id == holder
    house.finish(house.claim(holder), DONE)
    again = ask(house, new_job(unique=EXISTING, idempotency_key="i"))
    assert isinstance(again, Submitted)
    assert (again.job_id, again.already_existed) == (holder, True)
    other = ask(house, new_job(idempotency_key="i", request_hash=b"2"))
    assert isinstance(other, IdempotencyKeyReused)
    assert other.job_id == holder
    house.delete(holder)
    assert ask(house, new_job(unique=EXISTING, idempotency_key="i")) == Submitted(
        holder, None, already_existed=True
    )


def test_a_key_that_a_refused_request_had_is_free_for_the_next_one_in_the_call(
    house: House,
) -> None:
    house.submit(unique=EXISTING)
    refused = new_job(unique=REJECT, idempotency_key="i", request_hash=b"1")
    other = new_job(idempotency_key="i", request_hash=b"2")
    same = new_job(idempotency_key="i", request_hash=b"2")
    answers = house.submit_all([refused, other, same])
    assert isinstance(answers[0], UniqueConflict)
    assert stored(answers[1], other)
    assert answers[2].job_id == other.job_id
    keys = house.database.read(lambda c: find_keys(c, ["i"]))
    assert keys == {"i": (b"2", other.job_id)}


# Many at once.


def test_one_key_submitted_by_a_hundred_threads_is_one_job(house: House) -> None:
    def once(how: How) -> Answer:
        request = new_job(unique=Unique("k", on_conflict=how))
        return house.write(lambda tx: submit(tx, [request], {}))[0][0]

    answers = together(*[partial(once, How.RETURN_EXISTING), partial(once, How.REJECT)] * 50)
    new = [a for a in answers if isinstance(a, Submitted) and not a.already_existed]
    assert {answer.job_id for answer in answers} == {new[0].job_id}
    assert len(new) == 1
    assert house.count(jobs) == 1
    assert house.owed() == ["job"]


def test_of_a_crowd_that_replaces_one_stays(house: House) -> None:
    def once() -> str:
        request = new_job(unique=REPLACE)
        return house.write(lambda tx: submit(tx, [request], {}))[0][0].job_id

    states = [house.get(job_id).state for job_id in together(*[once] * 40)]
    assert sorted(states) == [*[JobState.CANCELLED] * 39, JobState.QUEUED]


def test_keys_are_locked_in_order(pg_house: House) -> None:
    """Two that locked the same keys in opposite order would each wait for the other."""
    house = pg_house
    one, two = sorted("ab", key=lambda name: lock_number(f"unique demo {name}"))
    runs: list[str] = []
    locked_one = threading.Event()

    def take(tx: Transaction, *names: str) -> list[str]:
        requests = [new_job(unique=Unique(name)) for name in names]
        return [answer.job_id for answer in submit(tx, requests, {})[0]]

    def one_by_one(tx: Transaction) -> list[str]:
        runs.append("forth")
        first = take(tx, one)
        locked_one.set()
        wait_until_blocked(house)
        return first + take(tx, two)

    def backwards(tx: Transaction) -> list[str]:
        runs.append("back")
        return take(tx, two, one)

    def second() -> list[str]:
        assert locked_one.wait(WAIT_SECONDS_MAX)
        return house.write(backwards)

    forth, back = together(lambda: house.write(one_by_one), second)
    assert forth == back[::-1]
    assert sorted(runs) == ["back", "forth"]  # neither had to be tried again
    assert house.count(jobs) == 2


def test_whoever_replaces_leaves_a_job_whose_claim_came_first(pg_house: House) -> None:
    house = pg_house
    old = house.submit(unique=REPLACE)
    claiming = threading.Event()

    def claim(tx: Transaction) -> None:
        verbs.claim(tx, [old], EVERY_TYPE, "w1", new_token(), 30.0)
        claiming.set()
        wait_until_blocked(house)

    def replace_it() -> Answer:
        assert claiming.wait(WAIT_SECONDS_MAX)
        return house.write(lambda tx: submit(tx, [new_job(unique=REPLACE)], {}))[0][0]

    _, answer = together(lambda: house.write(claim), replace_it)
    assert isinstance(answer, Submitted)
    assert answer.replaced == ()
    assert house.get(old).state == JobState.RUNNING


def test_a_retry_a_delete_and_a_submit_at_once(house: House) -> None:
    """Of the first two one comes too late; the key has one holder in the end."""
    for _ in range(10):
        ended = house.start(unique=EXISTING)
        house.finish(ended, FATAL)

        def attempt(verb: Callable[[str], object], job_id: str = ended.job_id) -> object:
            try:
                return verb(job_id)
            except (JobUnknown, JobStateForbids, UniqueConflict) as refused:
                return refused

        def come(_: str) -> Answer:
            return house.write(lambda tx: submit(tx, [new_job(unique=EXISTING)], {}))[0][0]

        retried, deleted, came = together(
            *(partial(attempt, verb) for verb in (house.retry, house.delete, come))
        )
        assert isinstance(came, Submitted)
        assert came.already_existed == isinstance(retried, Job)
        if isinstance(retried, Job):
            assert came.job_id == ended.job_id
            assert isinstance(deleted, JobStateForbids)
        elif isinstance(retried, UniqueConflict):
            assert retried.job_id == came.job_id
            assert deleted is None
        else:
            assert isinstance(retried, JobUnknown)
            assert deleted is None
        house.finish(house.claim(came.job_id), DONE)
