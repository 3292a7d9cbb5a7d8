from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import AttemptFailed, Input, JobError, Progress
from jobsvc.core.model import Effects
from jobsvc.core.states import JobState
from jobsvc.store import batch, locking
from jobsvc.store.database import Transaction
from jobsvc.store.tables import outbox
from tests.store.house import (
    DONE,
    FATAL,
    RETRYABLE,
    WAIT_SECONDS_MAX,
    House,
    new_id,
    new_token,
    together,
    wait_until_blocked,
    worker,
)


def test_a_claim_starts_an_attempt(house: House) -> None:
    job_id = house.submit(
        input=Input(b"\x00payload", "text/x"), queue="q", timeout=7.5, trace_id="t"
    )
    token = new_token()
    claimed = house.claim(job_id, token=token, worker_id="w7", lease_seconds=12.0)
    assert (claimed.job_id, claimed.token, claimed.attempt) == (job_id, token, 1)
    assert (claimed.job_type, claimed.queue) == ("demo", "q")
    assert (claimed.input, claimed.timeout) == (Input(b"\x00payload", "text/x"), 7.5)
    assert claimed.trace_id == "t"
    row = house.row(job_id)
    assert (row.state, row.attempt, row.worker_id) == ("RUNNING", 1, "w7")
    assert row.lease_token == token
    assert row.lease_expire_time == row.start_time + timedelta(seconds=12)
    started = house.events(job_id)[-1]
    assert (started.sequence, started.type, started.state) == (2, "STARTED", "RUNNING")
    assert (started.attempt, started.worker_id) == (1, "w7")
    assert started.event_time == row.start_time
    (change,) = house.effects.changes
    assert (change.job_id, change.last_sequence) == (job_id, 2)
    assert house.effects.dispatches == ()


def test_each_attempt_is_numbered_and_starts_without_progress(house: House) -> None:
    job_id = house.submit()
    first = house.claim(job_id)
    assert house.report(first, Progress(1, 2))
    assert house.finish(first, RETRYABLE)
    house.wait(3600)
    house.promote()
    second = house.claim(job_id, worker_id="w2")
    assert second.attempt == 2
    job = house.get(job_id)
    assert (job.attempt, job.progress, job.worker_id) == (2, None, "w2")
    assert job.error is not None  # the latest failure stays to be seen


def scheduled(house: House) -> str:
    return house.submit(delay=60.0)


def running(house: House) -> str:
    return house.start().job_id


def retrying(house: House) -> str:
    claimed = house.start()
    house.finish(claimed, RETRYABLE)
    return claimed.job_id


def succeeded(house: House) -> str:
    claimed = house.start()
    house.finish(claimed, DONE)
    return claimed.job_id


def failed(house: House) -> str:
    claimed = house.start()
    house.finish(claimed, FATAL)
    return claimed.job_id


def cancelled(house: House) -> str:
    return house.cancel(house.submit()).job_id


@pytest.mark.parametrize("make", [scheduled, running, retrying, succeeded, failed, cancelled])
def test_only_a_queued_job_is_claimed(house: House, make: Callable[[House], str]) -> None:
    job_id = make(house)
    before = house.row(job_id)
    assert house.claim_all([job_id]) == ()
    assert house.effects == Effects()
    assert house.row(job_id) == before


def test_an_unknown_job_is_passed_over(house: House) -> None:
    job_id = house.submit()
    (claimed,) = house.claim_all([new_id(), job_id, new_id()])
    assert claimed.job_id == job_id


def test_many_are_claimed_under_one_token(house: House) -> None:
    ids = [house.submit() for _ in range(5)]
    ended = cancelled(house)
    claimed = house.claim_all([*reversed(ids), ended])
    assert [c.job_id for c in claimed] == ids
    assert len({c.token for c in claimed}) == 1


def test_a_claim_repeated_with_its_token_answers_the_same(house: House) -> None:
    ids = [house.submit(), house.submit()]
    token = new_token()
    first = house.claim_all(ids, token=token)
    assert len(first) == 2
    again = house.claim_all(ids, token=token)
    assert again == tuple(replace(claimed, waited=0.0) for claimed in first)
    assert house.effects == Effects()
    assert [house.row(i).last_sequence for i in ids] == [2, 2]
    assert house.claim_all(ids, token=new_token()) == ()


def test_a_claim_tells_how_long_the_message_was_on_its_way(house: House) -> None:
    job_id = house.submit(delay=60.0)
    house.wait(100)
    house.promote()
    house.wait(7)
    assert 7.0 <= house.claim(job_id).waited < 60.0


def test_a_job_past_its_expire_time_expires_instead(house: House) -> None:
    job_id = house.submit(ttl=60.0)
    house.deliver()
    house.wait(61)
    assert house.claim_all([job_id]) == ()
    job = house.get(job_id)
    assert (job.state, job.attempt) == (JobState.FAILED, 0)
    assert job.error is not None
    assert job.error.type == "EXPIRED"
    assert house.history(job_id) == ["SUBMITTED>QUEUED", "FAILED>FAILED"]
    assert house.owed(job_id) == ["dead"]


def test_a_type_that_another_live_worker_has_is_passed_on_after_a_while(house: House) -> None:
    house.announce(worker("w2", job_types=("other",)))
    job_id = house.submit("other")
    house.deliver()
    assert house.claim_all([job_id], types=frozenset({"demo"})) == ()
    assert house.row(job_id).state == "QUEUED"
    assert not house.row(job_id).held
    assert house.owed(job_id) == ["job"]
    assert house.history(job_id) == ["SUBMITTED>QUEUED"]
    # Published at once, the message would go round and round between the broker and workers that
    # cannot use it: only the relay sends it, when it is due.
    assert house.effects.dispatches == ()
    assert house.take_owed() == []
    house.wait(1.1)
    (dispatch,) = house.take_owed()
    assert (dispatch.job_id, dispatch.job_type) == (job_id, "other")


@pytest.mark.parametrize(
    "live",
    [
        {"worker_id": "w2", "job_types": ("demo",)},
        {"worker_id": "w2", "job_types": ("other",), "queues": ("elsewhere",)},
    ],
)
def test_a_type_that_no_live_worker_of_the_queue_has_is_held(
    house: House, live: dict[str, str]
) -> None:
    house.announce(worker(**live))
    job_id = house.submit("other")
    house.deliver()
    assert house.claim_all([job_id], types=frozenset({"demo"})) == ()
    assert house.row(job_id).held
    assert house.owed() == []
    assert house.history(job_id) == ["SUBMITTED>QUEUED"]


def test_a_worker_that_fell_silent_has_no_types(house: House) -> None:
    house.announce(worker("w2", job_types=("other",)))
    house.wait(31)
    job_id = house.submit("other")
    house.claim_all([job_id], types=frozenset({"demo"}))
    assert house.row(job_id).held


def test_a_held_job_is_claimed_by_a_worker_that_has_its_type(house: House) -> None:
    job_id = house.submit("other")
    house.claim_all([job_id], types=frozenset({"demo"}))
    assert house.claim(job_id, types=frozenset({"other"})).attempt == 1
    assert not house.row(job_id).held


@pytest.mark.parametrize("rolls_back", [False, True])
def test_a_claim_waits_for_a_locked_row(house: House, rolls_back: bool) -> None:
    """Passing over it would drop the message while somebody only keeps books on the row."""
    job_id = house.submit()
    locked, go_on = threading.Event(), threading.Event()

    class GiveUp(Exception):
        pass

    def keep_books(tx: Transaction) -> None:
        b = batch.Batch(tx)
        b.set(locking.lock(tx, [job_id])[job_id], dispatch_count=7)
        b.write()
        locked.set()
        assert go_on.wait(WAIT_SECONDS_MAX)
        if rolls_back:
            raise GiveUp

    def bookkeeper() -> None:
        try:
            house.write(keep_books)
        except GiveUp:
            assert rolls_back

    def claim_meanwhile() -> None:
        assert locked.wait(WAIT_SECONDS_MAX)
        claimant.start()
        if not house.database.sqlite:
            wait_until_blocked(house)
        assert claimant.is_alive()
        go_on.set()
        claimant.join(WAIT_SECONDS_MAX)

    claimant = threading.Thread(target=lambda: house.claim_all([job_id]))
    together(bookkeeper, claim_meanwhile)
    assert house.row(job_id).state == "RUNNING"
    assert house.row(job_id).dispatch_count == (0 if rolls_back else 7)


def test_a_locked_row_is_the_relays_to_pass_over(pg_house: House) -> None:
    house = pg_house
    first, second = house.submit(), house.submit()
    house.wait(3)

    def other_relay(tx: Transaction) -> list[str]:
        tx.execute(sa.select(outbox.c.id).where(outbox.c.job_id == first).with_for_update())
        return [dispatch.job_id for dispatch in house.take_owed()]

    assert house.write(other_relay) == [second]


def test_the_error_of_an_attempt_has_all_its_parts(house: House) -> None:
    claimed = house.start()
    error = JobError("E", "ü\n", "trace", retryable=True)
    house.finish(claimed, AttemptFailed(error))
    assert house.get(claimed.job_id).error == error
    assert house.events(claimed.job_id)[-1].error == error
