from __future__ import annotations

from datetime import timedelta

import pytest

from jobsvc.core.attempts import (
    AttemptFailed,
    Claimed,
    Ending,
    Input,
    Interrupted,
    JobError,
    Snoozed,
    Stopped,
    Succeeded,
)
from jobsvc.core.model import DAY, Effects, RetryPolicy
from jobsvc.core.states import JobState
from jobsvc.store import verbs
from jobsvc.store.reads import lookups
from tests.store.house import CRASH, DONE, FATAL, RETRYABLE, House, new_token

EVERY_ENDING: list[Ending] = [DONE, RETRYABLE, FATAL, CRASH, Interrupted(), Snoozed(5.0), Stopped()]
STARTED = ["SUBMITTED>QUEUED", "STARTED>RUNNING"]


def run_again(house: House, job_id: str) -> Claimed:
    house.wait(DAY)
    house.promote()
    return house.claim(job_id)


@pytest.mark.parametrize("result", [Input(b""), Input(bytes(range(256))), Input(b"x", "image/png")])
def test_success_keeps_the_result(house: House, result: Input) -> None:
    claimed = house.start()
    house.deliver()
    assert house.finish(claimed, Succeeded(result))
    assert house.history(claimed.job_id) == [*STARTED, "SUCCEEDED>SUCCEEDED"]
    outcome = house.database.read(lambda c: lookups.get_outcome(c, claimed.job_id))
    assert (outcome.state, outcome.result, outcome.error) == (JobState.SUCCEEDED, result, None)
    job = house.get(claimed.job_id)
    assert job.finish_time == house.events(claimed.job_id)[-1].event_time
    assert house.owed() == []
    assert house.effects.dispatches == ()


@pytest.mark.parametrize(
    ("ending", "days"), [(DONE, 7), (FATAL, 30), (Stopped(), 7)], ids=["done", "failed", "stopped"]
)
@pytest.mark.parametrize("retention", [None, 7200.0])
def test_how_long_an_ended_job_is_kept(
    house: House, ending: Ending, days: int, retention: float | None
) -> None:
    claimed = house.start(retention=retention)
    house.cancel(claimed.job_id) if isinstance(ending, Stopped) else None
    assert house.finish(claimed, ending)
    job = house.get(claimed.job_id)
    assert job.finish_time is not None
    kept = timedelta(seconds=retention) if retention else timedelta(days=days)
    assert job.purge_time == job.finish_time + kept


def test_a_failure_is_tried_again_after_its_backoff(house: House) -> None:
    policy = RetryPolicy(10.0, 3.0, 50.0, 0.0)
    job_id = house.submit(retry_policy=policy)
    house.deliver()
    for expected in (10, 30, 50, 50):
        claimed = run_again(house, job_id)
        house.deliver()
        assert house.finish(claimed, RETRYABLE)
        event = house.events(job_id)[-1]
        assert (event.type, event.state, event.error) == (
            *("ATTEMPT_FAILED", "RETRYING"),
            RETRYABLE.error,
        )
        assert event.next_attempt_time == event.event_time + timedelta(seconds=expected)
        job = house.get(job_id)
        assert (job.next_attempt_time, job.error) == (event.next_attempt_time, RETRYABLE.error)
        assert house.owed() == []


def test_jitter_spreads_the_backoff(house: House) -> None:
    waits = set()
    for _ in range(10):
        claimed = house.start(retry_policy=RetryPolicy(100.0, 1.0, 100.0, 0.5))
        house.finish(claimed, RETRYABLE)
        event = house.events(claimed.job_id)[-1]
        assert event.next_attempt_time is not None
        waits.add((event.next_attempt_time - event.event_time).total_seconds())
    assert all(50 <= wait <= 150 for wait in waits)
    assert len(waits) > 5


@pytest.mark.parametrize("after", [0.0, 7.0])
def test_the_handler_chooses_the_wait(house: House, after: float) -> None:
    claimed = house.start()
    house.finish(claimed, AttemptFailed(RETRYABLE.error, retry_after=after))
    event = house.events(claimed.job_id)[-1]
    assert event.next_attempt_time == event.event_time + timedelta(seconds=after)


def test_an_error_that_is_not_retryable_fails_the_job(house: House) -> None:
    claimed = house.start()
    house.deliver()
    assert house.finish(claimed, FATAL)
    assert house.history(claimed.job_id) == [*STARTED, "ATTEMPT_FAILED>RUNNING", "FAILED>FAILED"]
    attempt_failed, failed = house.events(claimed.job_id)[-2:]
    assert attempt_failed.error == failed.error == FATAL.error
    assert attempt_failed.event_time == failed.event_time
    outcome = house.database.read(lambda c: lookups.get_outcome(c, claimed.job_id))
    assert (outcome.state, outcome.result, outcome.error) == (JobState.FAILED, None, FATAL.error)
    (dispatch,) = house.effects.dispatches
    assert (dispatch.kind, dispatch.job_id, dispatch.attempt) == ("dead", claimed.job_id, 1)
    assert dispatch.error_type == "TypeError"
    assert house.owed() == ["dead"]


def test_the_budget_is_max_attempts(house: House) -> None:
    job_id = house.submit(max_attempts=2)
    assert house.finish(house.claim(job_id), RETRYABLE)
    assert house.get(job_id).state == JobState.RETRYING
    assert house.finish(run_again(house, job_id), RETRYABLE)
    assert house.get(job_id).state == JobState.FAILED
    assert house.get(job_id).error == RETRYABLE.error


def test_interruptions_and_snoozes_are_free(house: House) -> None:
    job_id = house.submit(max_attempts=1)
    claimed = house.claim(job_id)
    for ending in (Interrupted(), Snoozed(1.0), Interrupted(), Snoozed(0.0)):
        assert house.finish(claimed, ending)
        claimed = run_again(house, job_id)
    assert claimed.attempt == 5
    assert house.finish(claimed, DONE)
    assert (house.row(job_id).failures, house.row(job_id).crashes) == (0, 0)


def test_the_third_crash_ends_the_job_whatever_its_budget(house: House) -> None:
    job_id = house.submit(max_attempts=100)
    for crashes in (1, 2):
        assert house.finish(run_again(house, job_id), CRASH)
        assert house.get(job_id).state == JobState.RETRYING
        assert house.row(job_id).crashes == crashes
        assert house.finish(run_again(house, job_id), RETRYABLE)  # a failure between is no crash
    assert house.finish(run_again(house, job_id), CRASH)
    job = house.get(job_id)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error.type == "WORKER_LOST"
    assert house.row(job_id).failures == 5


def test_an_interrupted_job_goes_back_and_owes_a_message(house: House) -> None:
    claimed = house.start()
    house.deliver()
    assert house.finish(claimed, Interrupted())
    assert house.history(claimed.job_id) == [*STARTED, "ATTEMPT_INTERRUPTED>QUEUED"]
    assert [d.kind for d in house.effects.dispatches] == house.owed() == ["job"]
    row = house.row(claimed.job_id)
    assert (row.lease_token, row.lease_expire_time, row.attempt) == (None, None, 1)


def test_a_snoozed_job_waits_as_scheduled(house: House) -> None:
    claimed = house.start()
    house.deliver()
    assert house.finish(claimed, Snoozed(90.0))
    event = house.events(claimed.job_id)[-1]
    assert (event.type, event.state) == ("SNOOZED", "SCHEDULED")
    assert house.get(claimed.job_id).schedule_time == event.event_time + timedelta(seconds=90)
    assert house.owed() == []


def test_a_stop_without_a_cancel_is_an_interruption(house: House) -> None:
    claimed = house.start()
    assert house.finish(claimed, Stopped())
    assert house.history(claimed.job_id)[-1] == "ATTEMPT_INTERRUPTED>QUEUED"


@pytest.mark.parametrize("ending", [Interrupted(), Snoozed(5.0), Stopped()])
def test_once_cancelled_a_job_never_waits_again(house: House, ending: Ending) -> None:
    claimed = house.start()
    house.deliver()
    house.cancel(claimed.job_id, "enough")
    assert house.finish(claimed, ending)
    requested, cancelled = house.events(claimed.job_id)[-2:]
    assert (requested.type, requested.state) == ("CANCEL_REQUESTED", "RUNNING")
    assert (cancelled.type, cancelled.state) == ("CANCELLED", "CANCELLED")
    assert cancelled.error == JobError("CANCELLED", "enough")
    assert house.get(claimed.job_id).error == cancelled.error
    assert house.owed() == []


@pytest.mark.parametrize("ending", [RETRYABLE, CRASH, AttemptFailed(RETRYABLE.error, 5.0)])
def test_a_failure_after_a_cancel_is_told_and_ends_cancelled(house: House, ending: Ending) -> None:
    claimed = house.start()
    house.deliver()
    house.cancel(claimed.job_id)
    assert house.finish(claimed, ending)
    expected = ["CANCEL_REQUESTED>RUNNING", "ATTEMPT_FAILED>RUNNING", "CANCELLED>CANCELLED"]
    assert house.history(claimed.job_id) == [*STARTED, *expected]
    failed, cancelled = house.events(claimed.job_id)[-2:]
    assert isinstance(ending, AttemptFailed)
    assert failed.error == ending.error
    assert cancelled.error == JobError("CANCELLED", "enough")
    assert house.owed() == []


def test_success_comes_before_a_cancel_that_is_only_requested(house: House) -> None:
    claimed = house.start()
    house.cancel(claimed.job_id)
    assert house.finish(claimed, DONE)
    assert house.get(claimed.job_id).state == JobState.SUCCEEDED


@pytest.mark.parametrize("ending", EVERY_ENDING, ids=lambda e: type(e).__name__)
def test_an_ending_needs_the_lease(house: House, ending: Ending) -> None:
    """A worker that was taken for dead comes back after another has started the job."""
    job_id = house.submit(max_attempts=5)
    stale = house.claim(job_id)
    house.wait(31)
    assert house.reap() == 1
    fresh = run_again(house, job_id)
    before = house.row(job_id)
    assert not house.finish(stale, ending)
    assert house.effects == Effects()
    assert house.row(job_id) == before
    assert house.finish(fresh, DONE)


@pytest.mark.parametrize("ending", EVERY_ENDING, ids=lambda e: type(e).__name__)
def test_a_job_ends_an_attempt_once(house: House, ending: Ending) -> None:
    claimed = house.start()
    assert house.finish(claimed, ending)
    before = house.row(claimed.job_id)
    for again in EVERY_ENDING:
        assert not house.finish(claimed, again)
    assert house.row(claimed.job_id) == before


def test_many_end_in_one_transaction_each_by_its_own_token(house: House) -> None:
    good, bad, stale = house.start(), house.start(), house.start()
    endings: dict[str, tuple[str, Ending]] = {
        stale.job_id: (new_token(), DONE),
        bad.job_id: (bad.token, FATAL),
        good.job_id: (good.token, DONE),
    }
    accepted, effects = house.write(lambda tx: verbs.finish(tx, endings))
    assert accepted == {good.job_id, bad.job_id}
    assert {c.job_id: c.last_sequence for c in effects.changes} == {good.job_id: 3, bad.job_id: 4}
    states = [house.get(c.job_id).state for c in (good, bad, stale)]
    assert states == ["SUCCEEDED", "FAILED", "RUNNING"]


def test_results_with_and_without_a_type_are_written_together(house: House) -> None:
    """NULL beside a value: where many rows go as arrays, they must keep apart."""
    results = [Input(b"plain"), Input(b"\x00", "image/png"), Input(b"")]
    running = [house.start() for _ in results]
    endings: dict[str, tuple[str, Ending]] = {
        claimed.job_id: (claimed.token, Succeeded(result))
        for claimed, result in zip(running, results, strict=True)
    }
    house.write(lambda tx: verbs.finish(tx, endings))
    for claimed, result in zip(running, results, strict=True):
        row = house.row(claimed.job_id)
        assert Input(row.result, row.result_content_type) == result


@pytest.mark.parametrize(
    ("retryable", "max_attempts"), [(False, 10), (True, 1)], ids=["not retryable", "used up"]
)
def test_a_final_failure_after_a_cancel_stays_a_failure(
    house: House, retryable: bool, max_attempts: int
) -> None:
    """It would not have waited again, so the request changes nothing."""
    claimed = house.start(max_attempts=max_attempts)
    house.cancel(claimed.job_id)
    assert house.finish(claimed, AttemptFailed(JobError("Broken", "no", retryable=retryable)))
    failed, ended = house.events(claimed.job_id)[-2:]
    assert (failed.type, failed.state) == ("ATTEMPT_FAILED", "RUNNING")
    assert (ended.type, ended.state) == ("FAILED", "FAILED")
