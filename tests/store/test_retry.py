"""RetryJob and DeleteJob: what becomes of a job that has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import JobError, Log, Output, Progress
from jobsvc.core.model import Job, Unique, UniqueScope
from jobsvc.core.model import OnConflict as How
from jobsvc.core.states import JobState
from jobsvc.errors import JobStateForbids, JobUnknown, UniqueConflict
from jobsvc.store.tables import idempotency_keys, job_events, job_labels, jobs
from jobsvc.store.verbs import Submitted
from jobsvc.store.verbs.running import LOG_BYTES_MAX, OUTPUT_BYTES_MAX
from tests.store.house import CRASH, DONE, FATAL, RETRYABLE, House, new_id, new_job


def failed(house: House, **fields: Any) -> str:
    claimed = house.start(**fields)
    house.finish(claimed, FATAL)
    return claimed.job_id


def cancelled(house: House, **fields: Any) -> str:
    return house.cancel(house.submit(**fields)).job_id


def stopped(house: House, **fields: Any) -> str:
    """Cancelled while it ran, by an attempt that failed."""
    claimed = house.start(**fields)
    house.cancel(claimed.job_id)
    house.finish(claimed, RETRYABLE)
    return claimed.job_id


def expired(house: House, **fields: Any) -> str:
    (answer,) = house.submit_all([new_job(expire_time=house.now(), **fields)])
    assert isinstance(answer, Submitted)
    return answer.job_id


ENDS = [failed, cancelled, stopped, expired]
End = Callable[[House], str]


@pytest.mark.parametrize("end", ENDS)
def test_an_ended_job_runs_again(house: House, end: End) -> None:
    job_id = end(house)
    before = house.row(job_id)
    house.deliver()
    job = house.retry(job_id, "bob")
    assert job == replace(house.get(job_id), input=None)
    assert (job.state, job.attempt) == (JobState.QUEUED, before.attempt)
    assert job.last_sequence == before.last_sequence + 1
    assert (job.finish_time, job.purge_time, job.expire_time, job.error) == (None,) * 4
    assert not job.cancel_requested
    assert house.row(job_id).error_type is None
    event = house.events(job_id)[-1]
    assert (event.type, event.state, event.actor) == ("RETRIED", "QUEUED", "bob")
    assert event.error is None
    assert house.owed() == ["job"]
    assert [d.job_id for d in house.effects.dispatches] == [job_id]
    claimed = house.claim(job_id)
    assert claimed.attempt == before.attempt + 1
    assert house.finish(claimed, DONE)


def test_a_run_has_a_budget_of_its_own(house: House) -> None:
    """Of failures, of lost workers, and of what a handler tells."""
    job_id = house.submit(max_attempts=10)
    for _ in range(2):
        for attempt in range(1, 4):
            claimed = house.claim(job_id)
            assert house.row(job_id).log_bytes == house.row(job_id).output_bytes == 0 or attempt > 1
            house.report(claimed, Progress(1, 2), Log("INFO", "x"), Output(text="y"))
            house.finish(claimed, CRASH)
            if attempt < 3:
                house.wait(8000)
                house.promote()
        job = house.get(job_id)
        assert (job.state, house.row(job_id).crashes) == (JobState.FAILED, 3)
        assert house.retry(job_id).progress is None
    assert house.get(job_id).attempt == 6


def test_a_run_may_log_however_much_the_one_before_did(house: House) -> None:
    claimed = house.start()
    full = {"log_bytes": LOG_BYTES_MAX + 1, "output_bytes": OUTPUT_BYTES_MAX + 1}
    house.change(claimed.job_id, **full)
    house.finish(claimed, FATAL)
    house.retry(claimed.job_id)
    house.report(house.claim(claimed.job_id), Log("INFO", "again"), Output(text="again"))
    assert [e.type for e in house.events(claimed.job_id)[-2:]] == ["LOG", "OUTPUT"]


def test_one_that_was_to_wait_is_due_now(house: House) -> None:
    job = house.retry(cancelled(house, delay=3600.0))
    assert job.schedule_time is not None
    assert job.schedule_time <= house.now()
    first = house.get(failed(house))
    house.wait(60)
    assert house.retry(first.job_id).schedule_time == first.schedule_time


def test_a_held_job_that_was_cancelled_gets_a_message(house: House) -> None:
    job_id = house.submit("other")
    house.claim_all([job_id], types=frozenset({"demo"}))
    house.cancel(job_id)
    house.deliver()
    house.retry(job_id)
    assert (house.row(job_id).held, house.owed()) == (False, ["job"])


@pytest.mark.parametrize("state", [s for s in JobState if s not in ("FAILED", "CANCELLED")])
def test_no_other_job_can_be_retried(house: House, state: JobState) -> None:
    job_id = house.submit(delay=60.0 if state is JobState.SCHEDULED else None)
    if state in (JobState.RUNNING, JobState.RETRYING, JobState.SUCCEEDED):
        claimed = house.claim(job_id)
        if state is not JobState.RUNNING:
            house.finish(claimed, RETRYABLE if state is JobState.RETRYING else DONE)
    before = house.row(job_id)
    with pytest.raises(JobStateForbids) as caught:
        house.retry(job_id)
    assert (caught.value.job_id, caught.value.state) == (job_id, state)
    assert house.row(job_id) == before


def test_an_unknown_job_is_neither_retried_nor_deleted(house: House) -> None:
    for verb in (house.retry, house.delete):
        with pytest.raises(JobUnknown):
            verb(new_id())


def test_of_many_each_is_answered(house: House) -> None:
    one, two = failed(house), cancelled(house)
    queued, succeeded = house.submit(), house.start()
    house.finish(succeeded, DONE)
    asked = [one, two, queued, succeeded.job_id, new_id()]
    answers = house.retry_many(*asked)
    assert list(answers) == sorted(asked[:4], key=list(answers).index)
    assert {i for i, a in answers.items() if isinstance(a, Job)} == {one, two}
    assert all(isinstance(answers[i], JobStateForbids) for i in (queued, succeeded.job_id))
    assert len(house.effects.dispatches) == 2
    assert house.retry_many() == {}
    gone = house.delete_many(*asked)
    assert {i for i, a in gone.items() if isinstance(a, Job)} == {succeeded.job_id}
    assert len(gone) == 4
    assert house.delete_many() == {}


# Unique keys.


@pytest.mark.parametrize("how", [How.RETURN_EXISTING, How.REJECT])
def test_a_retry_does_not_run_beside_the_holder_of_its_key(house: House, how: How) -> None:
    """Not even where a submit would be answered with the holder: the caller named a job."""
    first = failed(house, unique=Unique("k", on_conflict=how))
    second = house.submit(unique=Unique("k"))
    other = house.submit("other", unique=Unique("k"))
    before = house.row(first)
    with pytest.raises(UniqueConflict) as caught:
        house.retry(first)
    assert caught.value.job_id == second
    assert house.row(first) == before
    house.cancel(second)
    assert house.retry(first).state == JobState.QUEUED
    assert house.get(other).state == JobState.QUEUED


def test_a_retry_takes_the_place_of_who_waits(house: House) -> None:
    unique = Unique("k", on_conflict=How.REPLACE)
    first = failed(house, unique=unique)
    running = house.start(unique=unique)
    waiting = house.submit(unique=unique)
    assert house.retry(first, "bob").state == JobState.QUEUED
    assert house.get(running.job_id).state == JobState.RUNNING
    replaced = house.get(waiting)
    assert replaced.error == JobError("CANCELLED", f"replaced by job {first}")
    assert house.events(waiting)[-1].actor == "bob"
    assert {c.job_id for c in house.effects.changes} == {first, waiting}


def test_who_runs_holds_a_key_of_its_own_scope(house: House) -> None:
    first = failed(house, unique=Unique("k"))
    house.start(unique=Unique("k", UniqueScope.WAITING))
    assert house.retry(first).state == JobState.QUEUED


def test_many_retried_at_once_see_each_other(house: House) -> None:
    one, two = (failed(house, unique=Unique("k")) for _ in range(2))
    answers = house.retry_many(two, one)
    assert isinstance(answers[one], Job)
    refused = answers[two]
    assert isinstance(refused, UniqueConflict)
    assert refused.job_id == one
    house.cancel(one)
    how = Unique("r", on_conflict=How.REPLACE)
    old, new = failed(house, unique=how), failed(house, unique=how)
    answers = house.retry_many(new, old)
    assert [house.get(i).state for i in (old, new)] == [JobState.CANCELLED, JobState.QUEUED]
    assert house.history(old)[-2:] == ["RETRIED>QUEUED", "CANCELLED>CANCELLED"]
    answer = answers[old]
    assert isinstance(answer, Job)
    assert answer.state == JobState.CANCELLED


# Deleting.


def test_nothing_is_left_of_a_deleted_job_but_its_key(house: House) -> None:
    job_id = house.submit(labels={"a": "b"}, idempotency_key="k", request_hash=b"1")
    kept = house.submit(labels={"a": "b"})
    claimed = house.claim(job_id)
    house.report(claimed, Log("INFO", "x"))
    house.finish(claimed, DONE)
    house.delete(job_id)
    for table in (jobs, job_labels, job_events):
        assert house.count(table) == 1
    assert house.get(kept).labels == {"a": "b"}
    again = new_job(idempotency_key="k", request_hash=b"1")
    assert house.submit_all([again]) == [Submitted(job_id, None, already_existed=True)]
    house.wait(timedelta(hours=24, seconds=1).total_seconds())
    house.purge()
    assert house.count(idempotency_keys) == 0
    with pytest.raises(JobUnknown):
        house.delete(job_id)


def test_a_purged_job_leaves_no_labels(house: House) -> None:
    house.cancel(house.submit(labels={"a": "b"}, retention=3600.0))
    house.wait(3600 + 61)
    assert house.purge() == 1
    assert house.count(job_labels) == 0


def test_a_dead_letter_that_is_owed_is_sent_all_the_same(house: House) -> None:
    job_id = failed(house)
    house.delete(job_id)
    assert [d.kind for d in house.effects.dispatches] == ["dead"]
    assert "dead" in house.owed(job_id)


@pytest.mark.parametrize("state", [s for s in JobState if not s.terminal])
def test_a_job_that_has_not_ended_is_not_deleted(house: House, state: JobState) -> None:
    job_id = house.submit(delay=60.0 if state is JobState.SCHEDULED else None)
    if state in (JobState.RUNNING, JobState.RETRYING):
        claimed = house.claim(job_id)
        if state is JobState.RETRYING:
            house.finish(claimed, RETRYABLE)
    with pytest.raises(JobStateForbids) as caught:
        house.delete(job_id)
    assert caught.value.state == state
    assert house.get(job_id).state == state


def test_the_message_of_a_deleted_job_starts_nothing(house: House) -> None:
    job_id = cancelled(house)
    house.delete(job_id)
    assert house.claim_all([job_id]) == ()
    assert house.database.read(lambda c: c.execute(sa.select(jobs.c.id)).all()) == []
