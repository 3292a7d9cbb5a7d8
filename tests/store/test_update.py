"""UpdateJob: priority, schedule_time and labels of a job that waits."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import Claimed
from jobsvc.core.model import Job
from jobsvc.core.states import JobState
from jobsvc.errors import JobStateForbids, JobUnknown
from jobsvc.store.tables import job_labels
from tests.store.house import DONE, RETRYABLE, House, new_id, together

WAITING = ["SCHEDULED", "QUEUED", "RETRYING"]


def waiting(house: House, state: str) -> str:
    """With nothing owed to the broker."""
    job_id = house.submit(delay=3600.0 if state == "SCHEDULED" else None)
    if state == "RETRYING":
        house.finish(house.claim(job_id), RETRYABLE)
    house.deliver()
    assert house.get(job_id).state == state
    return job_id


def found_by(house: House, job_id: str) -> dict[str, str]:
    statement = sa.select(job_labels.c.key, job_labels.c.value)
    rows = house.database.read(
        lambda c: c.execute(statement.where(job_labels.c.job_id == job_id)).all()
    )
    return {row.key: row.value for row in rows}


@pytest.mark.parametrize("state", WAITING)
def test_a_waiting_job_is_changed_where_it_waits(house: House, state: str) -> None:
    job_id = waiting(house, state)
    before = house.row(job_id)
    job = house.update_job(job_id, priority=7, labels={"a": "b"}, actor="bob")
    assert job == replace(house.get(job_id), input=None)
    assert (job.state, job.priority, job.labels) == (state, 7, {"a": "b"})
    after = house.row(job_id)
    for column in ("schedule_time", "next_attempt_time", "queued_time", "dispatch_count"):
        assert getattr(after, column) == getattr(before, column)
    event = house.events(job_id)[-1]
    assert (event.type, event.state, event.actor) == ("UPDATED", state, "bob")
    assert event.sequence == job.last_sequence == before.last_sequence + 1
    (change,) = house.effects.changes
    assert change.last_sequence == job.last_sequence


@pytest.mark.parametrize("state", WAITING)
def test_a_time_in_the_past_is_now(house: House, state: str) -> None:
    job_id = waiting(house, state)
    job = house.update_job(job_id, schedule_time=house.now() - timedelta(days=400))
    assert (job.state, job.next_attempt_time) == (JobState.QUEUED, None)
    assert job.schedule_time is not None
    assert job.create_time <= job.schedule_time <= house.now()
    assert house.history(job_id)[-1] == "UPDATED>QUEUED"
    assert house.owed() == ([] if state == "QUEUED" else ["job"])
    assert house.finish(house.claim(job_id), DONE)


@pytest.mark.parametrize("state", WAITING)
def test_a_time_ahead_is_waited_for(house: House, state: str) -> None:
    job_id = waiting(house, state)
    due = house.now() + timedelta(minutes=5)
    job = house.update_job(job_id, schedule_time=due)
    assert (job.state, job.schedule_time, job.next_attempt_time) == ("SCHEDULED", due, None)
    assert house.history(job_id)[-1] == "UPDATED>SCHEDULED"
    assert house.owed() == []
    assert house.claim_all([job_id]) == ()  # the message of a job that was QUEUED
    assert house.promote() == 0
    house.wait(301)
    assert house.promote() == 1
    assert house.finish(house.claim(job_id), DONE)


def test_labels_take_the_place_of_all_there_were(house: House) -> None:
    job_id = house.submit(labels={"a": "1", "b": "2"})
    other = house.submit(labels={"a": "1"})
    assert house.update_job(job_id, labels={"b": "3", "c": "4"}).labels == {"b": "3", "c": "4"}
    assert found_by(house, job_id) == {"b": "3", "c": "4"}
    assert house.update_job(job_id, labels={}).labels == {}
    assert found_by(house, job_id) == {}
    assert found_by(house, other) == {"a": "1"}


def test_what_is_not_named_stays(house: House) -> None:
    job_id = house.submit(priority=3, labels={"a": "b"}, delay=60.0)
    before = house.get(job_id)
    house.update_job(job_id, priority=4)
    assert house.get(job_id) == replace(before, priority=4, last_sequence=2)


def test_an_update_that_changes_nothing_is_told_of_too(house: House) -> None:
    job_id = house.submit(priority=3)
    house.deliver()
    house.update_job(job_id, priority=3)
    assert house.history(job_id) == ["SUBMITTED>QUEUED", "UPDATED>QUEUED"]
    assert house.owed() == []


def test_another_priority_takes_another_message(house: House) -> None:
    job_id = house.submit(priority=3)
    house.deliver()
    house.update_job(job_id, priority=0)
    (dispatch,) = house.effects.dispatches
    assert (dispatch.kind, dispatch.job_id, dispatch.priority) == ("job", job_id, 0)
    other = house.submit(priority=5)
    ids = [job_id, other]
    found = house.claim_all(ids, priorities={job_id: 3, other: 5})
    assert [claimed.job_id for claimed in found] == [other]
    assert house.get(job_id).state == JobState.QUEUED
    (claimed,) = house.claim_all([job_id], priorities={job_id: 0})
    assert house.finish(claimed, DONE)


def test_a_held_job_keeps_waiting_for_room(house: House) -> None:
    job_id = house.submit("other")
    house.claim_all([job_id], types=frozenset({"demo"}))
    house.deliver()
    house.update_job(job_id, priority=9)
    assert (house.row(job_id).held, house.owed()) == (True, [])
    job = house.update_job(job_id, schedule_time=house.now() + timedelta(minutes=1))
    assert (job.state, house.row(job_id).held) == ("SCHEDULED", False)


def test_one_whose_time_is_over_expires_all_the_same(house: House) -> None:
    job_id = house.submit(ttl=60.0)
    house.update_job(job_id, schedule_time=house.now() + timedelta(minutes=5))
    house.wait(61)
    assert house.expire() == 1
    assert house.history(job_id)[-2:] == ["UPDATED>SCHEDULED", "FAILED>FAILED"]


@pytest.mark.parametrize("state", [s for s in JobState if s.value not in WAITING])
def test_a_job_that_does_not_wait_is_not_changed(house: House, state: JobState) -> None:
    claimed = house.start(labels={"a": "b"})
    if state is JobState.CANCELLED:
        house.cancel(claimed.job_id)
    if state.terminal:
        house.finish(claimed, DONE if state is JobState.SUCCEEDED else RETRYABLE)
    if state is JobState.FAILED:
        house.wait(60)
        house.promote()
        house.change(claimed.job_id, max_attempts=2)
        house.finish(house.claim(claimed.job_id), RETRYABLE)
    before = house.row(claimed.job_id)
    assert before.state == state
    with pytest.raises(JobStateForbids) as caught:
        house.update_job(claimed.job_id, priority=9, labels={})
    assert (caught.value.job_id, caught.value.state) == (claimed.job_id, state)
    assert house.row(claimed.job_id) == before
    assert found_by(house, claimed.job_id) == {"a": "b"}


def test_an_unknown_job_cannot_be_changed(house: House) -> None:
    with pytest.raises(JobUnknown):
        house.update_job(new_id(), priority=9)


def test_an_update_and_a_claim_at_once(house: House) -> None:
    """One of them comes first. Either way the job runs, by the message that is its latest."""
    for _ in range(20):
        job_id = house.submit()

        def update(job_id: str = job_id) -> Job | None:
            try:
                return house.update_job(job_id, priority=5)
            except JobStateForbids:
                return None

        def claim(job_id: str = job_id) -> Claimed | None:
            found = house.claim_all([job_id], priorities={job_id: 0})
            return found[0] if found else None

        updated, claimed = together(update, claim)
        assert (updated is None) == (claimed is not None)
        if not isinstance(claimed, Claimed):
            (claimed,) = house.claim_all([job_id], priorities={job_id: 5})
        assert house.finish(claimed, DONE)
