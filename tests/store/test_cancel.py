from __future__ import annotations

from dataclasses import replace

import pytest

from jobsvc.core.attempts import JobError
from jobsvc.core.model import Effects
from jobsvc.core.states import JobState
from jobsvc.errors import JobStateForbids, JobUnknown
from tests.store.house import DONE, FATAL, RETRYABLE, House, new_id


@pytest.mark.parametrize("waiting", ["QUEUED", "SCHEDULED", "RETRYING"])
def test_a_waiting_job_is_cancelled_at_once(house: House, waiting: str) -> None:
    job_id = house.submit(delay=60.0 if waiting == "SCHEDULED" else None)
    if waiting == "RETRYING":
        house.finish(house.claim(job_id), RETRYABLE)
    assert house.get(job_id).state == waiting
    house.deliver()
    job = house.cancel(job_id, "enough", "alice")
    assert job.state == JobState.CANCELLED
    assert job == replace(house.get(job_id), input=None)
    event = house.events(job_id)[-1]
    assert (event.type, event.state, event.actor) == ("CANCELLED", "CANCELLED", "alice")
    assert event.error == job.error == JobError("CANCELLED", "enough")
    assert house.effects.changes[0].last_sequence == job.last_sequence
    assert house.owed() == []
    assert house.promote() == house.expire() == 0
    assert house.claim_all([job_id]) == ()


def test_of_a_running_job_the_cancel_is_requested_once(house: House) -> None:
    claimed = house.start()
    job = house.cancel(claimed.job_id, "first", "alice")
    assert (job.state, job.cancel_requested) == (JobState.RUNNING, True)
    event = house.events(claimed.job_id)[-1]
    assert (event.type, event.state, event.actor) == ("CANCEL_REQUESTED", "RUNNING", "alice")
    assert event.sequence == job.last_sequence == 3
    assert house.cancel(claimed.job_id, "second", "bob") == job
    assert house.effects == Effects()
    assert house.row(claimed.job_id).cancel_reason == "first"


def test_a_reason_that_is_left_out_is_told_all_the_same(house: House) -> None:
    job = house.cancel(house.submit(), reason="")
    assert job.error is not None
    assert job.error.message
    claimed = house.start()
    assert house.cancel(claimed.job_id, reason="").cancel_requested


def test_a_cancelled_job_stays_as_it_is(house: House) -> None:
    job = house.cancel(house.submit(), "first")
    assert house.cancel(job.job_id, "second") == job
    assert house.effects == Effects()


@pytest.mark.parametrize(("ending", "state"), [(DONE, "SUCCEEDED"), (FATAL, "FAILED")])
def test_a_job_that_ended_otherwise_cannot_be_cancelled(
    house: House, ending: object, state: str
) -> None:
    claimed = house.start()
    house.finish(claimed, ending)  # type: ignore[arg-type]
    before = house.row(claimed.job_id)
    with pytest.raises(JobStateForbids) as caught:
        house.cancel(claimed.job_id)
    assert (caught.value.job_id, caught.value.state) == (claimed.job_id, state)
    assert house.row(claimed.job_id) == before


def test_an_unknown_job_cannot_be_cancelled(house: House) -> None:
    with pytest.raises(JobUnknown):
        house.cancel(new_id())


def test_a_held_job_is_cancelled_and_held_no_more(house: House) -> None:
    job_id = house.submit("other")
    house.claim_all([job_id], types=frozenset({"demo"}))
    assert house.row(job_id).held
    house.cancel(job_id)
    assert not house.row(job_id).held
