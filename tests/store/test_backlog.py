"""What the database tells of the backlog: ages that count from when a job became QUEUED."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from jobsvc.core.attempts import Interrupted
from jobsvc.core.model import RetryPolicy
from jobsvc.store import dispatching
from jobsvc.store.dispatching import Backlog
from tests.store.house import DONE, RETRYABLE, House, worker

SECONDS = 100.0  # far more than a test takes


def backlog(house: House) -> Backlog:
    return house.database.read(dispatching.backlog)


def age(house: House, job_id: str, seconds: float = SECONDS) -> None:
    """Lets so much time have passed since the job's last step."""
    past = house.row(job_id).queued_time - timedelta(seconds=seconds)
    house.change(job_id, queued_time=past, dispatch_time=past)


def redispatch_all(house: House, job_id: str) -> None:
    assert house.redispatch_all(house.now()) == 1


@pytest.mark.parametrize(
    "send", [House.republish, redispatch_all, lambda house, _: house.redispatch()]
)
def test_a_new_message_makes_no_job_younger(
    house: House, send: Callable[[House, str], object]
) -> None:
    house.announce(worker())
    job_id = house.submit()
    house.deliver()
    age(house, job_id)
    before: datetime = house.row(job_id).dispatch_time
    send(house, job_id)
    assert house.row(job_id).dispatch_time > before
    assert SECONDS <= backlog(house).oldest["default"] < 2 * SECONDS
    assert SECONDS <= house.claim(job_id).waited < 2 * SECONDS


def test_each_attempt_waits_anew(house: House) -> None:
    claimed = house.start(retry_policy=RetryPolicy(1.0, 1.0, 1.0, 0.0))
    house.change(claimed.job_id, queued_time=house.now() - timedelta(seconds=SECONDS))
    house.finish(claimed, RETRYABLE)
    house.wait(2)
    assert house.promote() == 1
    again = house.claim(claimed.job_id)
    assert again.waited < SECONDS
    house.change(claimed.job_id, queued_time=house.now() - timedelta(seconds=SECONDS))
    house.finish(again, Interrupted())
    assert house.claim(claimed.job_id).waited < SECONDS


def test_the_oldest_is_told_for_each_queue_and_only_of_what_could_run(house: House) -> None:
    house.announce(worker(queues=("default", "other")))
    for queue, seconds in (("default", 30.0), ("default", 60.0)):
        age(house, house.submit(queue=queue), seconds)
    held = house.submit("other")
    house.claim_all([held], types=frozenset({"demo"}))
    house.change(held, queued_time=house.now() - timedelta(hours=1))
    house.finish(house.start(queue="other"), DONE)
    oldest = backlog(house).oldest
    assert 60.0 <= oldest["default"] < 90.0
    assert oldest["other"] == 0.0


def test_what_is_owed_ages_however_often_its_publishing_is_tried(house: House) -> None:
    assert backlog(house).owed == 0.0
    house.elapsed = timedelta(seconds=-SECONDS)
    house.submit()
    house.elapsed = timedelta()
    house.submit()
    assert len(house.take_owed()) == 1
    assert SECONDS <= backlog(house).owed < 2 * SECONDS
    house.deliver()
    assert backlog(house).owed == 0.0


def test_live_workers_are_counted_for_each_queue(house: House) -> None:
    house.announce(worker("w1", queues=("default", "other")))
    house.announce(worker("w2"))
    house.elapsed = timedelta(seconds=-31)
    house.announce(worker("dead", queues=("default", "left")))
    assert backlog(house).workers == {"default": 2, "other": 1, "left": 0}
