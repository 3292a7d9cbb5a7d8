from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from jobsvc.core.attempts import Claimed
from jobsvc.core.model import DAY, RetryPolicy
from jobsvc.core.states import JobState
from tests.store.house import DONE, LEASE_SECONDS, House, new_token


def test_a_lease_is_prolonged_from_now(house: House) -> None:
    claimed = house.start()
    house.wait(20)
    before = house.now()
    assert house.renew(claimed) == {(claimed.job_id, claimed.token): False}
    assert house.row(claimed.job_id).lease_expire_time >= before + timedelta(seconds=LEASE_SECONDS)
    house.wait(29)
    assert house.reap() == 0
    house.wait(2)
    assert house.reap() == 1


def test_renewing_tells_of_a_cancel(house: House) -> None:
    stopped, left = house.start(), house.start()
    house.cancel(stopped.job_id, reason="")
    assert house.renew(stopped, left) == {
        (stopped.job_id, stopped.token): True,
        (left.job_id, left.token): False,
    }


def test_a_lost_lease_is_missing_from_the_answer(house: House) -> None:
    lost, ended, held = house.start(), house.start(), house.start()
    house.finish(ended, DONE)
    house.wait(20)
    house.renew(held)
    house.wait(20)
    assert house.reap() == 1
    assert house.renew(lost, ended, held) == {(held.job_id, held.token): False}
    house.wait(DAY)
    house.promote()
    fresh = house.claim(lost.job_id)
    expire = house.row(lost.job_id).lease_expire_time
    house.wait(5)
    assert house.renew(lost) == {}
    assert house.row(lost.job_id).lease_expire_time == expire
    assert house.renew(fresh) == {(fresh.job_id, fresh.token): False}


def test_renewing_writes_no_event(house: House) -> None:
    claimed = house.start()
    house.renew(claimed)
    assert house.row(claimed.job_id).last_sequence == 2
    assert house.renew() == {}


def test_a_lost_worker_is_a_failed_attempt(house: House) -> None:
    claimed = house.start(retry_policy=RetryPolicy(10.0, 2.0, 3600.0, 0.0))
    house.wait(LEASE_SECONDS - 1)
    assert house.reap() == 0
    house.wait(2)
    assert house.reap() == 1
    event = house.events(claimed.job_id)[-1]
    assert (event.type, event.state, event.attempt) == ("ATTEMPT_FAILED", "RETRYING", 1)
    assert event.error is not None
    assert (event.error.type, event.error.retryable) == ("WORKER_LOST", True)
    assert event.next_attempt_time == event.event_time + timedelta(seconds=10)
    row = house.row(claimed.job_id)
    assert (row.failures, row.crashes, row.lease_token) == (1, 1, None)
    assert house.reap() == 0


def lose(house: House, job_id: str) -> None:
    house.wait(DAY)
    house.promote()
    house.claim(job_id)
    house.wait(LEASE_SECONDS + 1)
    assert house.reap() == 1


def test_a_job_that_loses_three_workers_fails(house: House) -> None:
    job_id = house.submit(max_attempts=50)
    for state in ("RETRYING", "RETRYING", "FAILED"):
        lose(house, job_id)
        assert house.get(job_id).state == state
    assert house.owed(job_id)[-1] == "dead"
    job = house.get(job_id)
    assert job.error is not None
    assert job.error.type == "WORKER_LOST"


def test_a_lost_worker_uses_up_the_budget_too(house: House) -> None:
    job_id = house.submit(max_attempts=1)
    lose(house, job_id)
    assert house.get(job_id).state == JobState.FAILED


def test_the_lost_worker_of_a_cancelled_job_ends_it(house: House) -> None:
    claimed = house.start()
    house.cancel(claimed.job_id)
    house.wait(LEASE_SECONDS + 1)
    assert house.reap() == 1
    assert house.history(claimed.job_id)[-2:] == ["ATTEMPT_FAILED>RUNNING", "CANCELLED>CANCELLED"]


def test_the_reaper_takes_no_more_than_its_limit_oldest_first(house: House) -> None:
    claimed = []
    for _ in range(5):
        claimed.append(house.start())
        house.wait(1)
    house.wait(LEASE_SECONDS)
    assert house.reap(limit=3) == 3
    states = [house.get(c.job_id).state for c in claimed]
    assert states == ["RETRYING"] * 3 + ["RUNNING"] * 2
    assert house.reap(limit=3) == 2


@pytest.mark.parametrize("gone", [["w1"], ["w1", "w3"], []])
def test_workers_known_to_be_gone_lose_their_jobs_at_once(house: House, gone: list[str]) -> None:
    running: dict[str, Claimed] = {
        name: house.claim(house.submit(), worker_id=name) for name in ("w1", "w2", "w3")
    }
    assert house.reap_workers(*gone) == len(gone)
    for name, claimed in running.items():
        expected = "RETRYING" if name in gone else "RUNNING"
        assert house.get(claimed.job_id).state == expected
        assert house.finish(claimed, DONE) == (name not in gone)


def test_no_claim_shares_a_lease_with_another(house: House) -> None:
    claimed = house.start()
    other = replace(claimed, token=new_token())
    assert house.renew(other) == {}
    assert not house.report(other)
