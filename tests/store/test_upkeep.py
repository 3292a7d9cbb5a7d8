from __future__ import annotations

from datetime import timedelta

import pytest

from jobsvc.core.attempts import JobTypeInfo, Snoozed
from jobsvc.core.model import DAY, Effects, RetryPolicy
from jobsvc.core.states import JobState
from jobsvc.store import dispatching, hot
from jobsvc.store.tables import job_events, jobs
from tests.store.house import DONE, FATAL, RETRYABLE, House, worker

ONLY_DEMO = frozenset({"demo"})


# Promote and expire.


def test_what_is_due_is_queued(house: House) -> None:
    scheduled = house.submit(delay=60.0, queue="q", priority=2)
    retrying = house.submit(retry_policy=RetryPolicy(60.0, 1.0, 60.0, 0.0))
    house.finish(house.claim(retrying), RETRYABLE)
    later = house.submit(delay=120.0)
    house.deliver()
    assert house.promote() == 0
    house.wait(61)
    assert house.promote() == 1  # the greater of the two counts: neither was a full batch of two
    assert house.history(scheduled) == ["SUBMITTED>SCHEDULED", "QUEUED>QUEUED"]
    assert house.history(retrying)[-1] == "QUEUED>QUEUED"
    assert house.get(later).state == JobState.SCHEDULED
    assert {d.job_id for d in house.effects.dispatches} == {scheduled, retrying}
    assert house.owed() == ["job", "job"]
    dispatch = next(d for d in house.effects.dispatches if d.job_id == scheduled)
    assert (dispatch.kind, dispatch.queue, dispatch.priority) == ("job", "q", 2)
    assert house.get(retrying).next_attempt_time is None
    assert house.promote() == 0


def test_promoting_takes_no_more_than_its_limit_oldest_first(house: House) -> None:
    ids = [house.submit(delay=float(n)) for n in (50, 10, 40, 20, 30)]
    house.wait(60)
    assert house.promote(limit=3) == 3
    states = {n: house.get(i).state for n, i in zip((50, 10, 40, 20, 30), ids, strict=True)}
    assert sorted(n for n, state in states.items() if state == "QUEUED") == [10, 20, 30]
    assert house.promote(limit=3) == 2


def test_a_due_job_past_its_expire_time_expires(house: House) -> None:
    job_id = house.submit(delay=60.0, ttl=61.0)
    house.wait(62)
    assert house.promote() == 1
    assert house.history(job_id) == ["SUBMITTED>SCHEDULED", "FAILED>FAILED"]
    assert house.owed() == ["dead"]


@pytest.mark.parametrize("waiting", ["QUEUED", "SCHEDULED", "RETRYING"])
def test_whatever_waits_past_its_expire_time_expires(house: House, waiting: str) -> None:
    job_id = house.submit(
        delay=DAY if waiting == "SCHEDULED" else None,
        ttl=60.0,
        retry_policy=RetryPolicy(DAY, 1.0, DAY, 0.0),
    )
    if waiting == "RETRYING":
        house.finish(house.claim(job_id), RETRYABLE)
    assert house.get(job_id).state == waiting
    house.deliver()
    assert house.expire() == 0
    house.wait(61)
    assert house.expire() == 1
    job = house.get(job_id)
    assert job.error is not None
    assert (job.state, job.error.type, job.error.retryable) == ("FAILED", "EXPIRED", False)
    assert house.history(job_id)[-1] == "FAILED>FAILED"
    assert [d.kind for d in house.effects.dispatches] == house.owed() == ["dead"]
    assert house.expire() == 0


def test_a_running_job_does_not_expire(house: House) -> None:
    claimed = house.start(ttl=60.0)
    house.wait(61)
    assert house.expire() == 0
    assert house.finish(claimed, DONE)


def test_expiring_takes_no_more_than_its_limit(house: House) -> None:
    for n in range(5):
        house.submit(ttl=10.0 + n)
    house.wait(60)
    assert [house.expire(limit=3), house.expire(limit=3), house.expire(limit=3)] == [3, 2, 0]


# What is owed to the broker.


def test_the_relay_takes_what_its_writer_did_not_publish(house: House) -> None:
    job_id = house.submit(queue="q", priority=4)
    (announced,) = house.effects.dispatches
    assert house.take_owed() == []
    house.wait(2.1)
    assert house.take_owed() == [announced]
    assert house.take_owed() == []  # it has some time to publish it
    house.wait(dispatching.TAKEN_SECONDS + 0.1)
    assert house.take_owed() == [announced]
    hot.forget_published(house.database, [announced.outbox_id])
    house.wait(dispatching.TAKEN_SECONDS + 0.1)
    assert house.take_owed() == []
    assert house.owed(job_id) == []


def test_the_relay_takes_no_more_than_its_limit_oldest_first(house: House) -> None:
    ids = [house.submit() for _ in range(5)]
    house.wait(3)
    taken = [house.take_owed(limit=3), house.take_owed(limit=3)]
    assert [{d.job_id for d in part} for part in taken] == [set(ids[:3]), set(ids[3:])]


def test_a_message_is_owed_anew_to_whoever_is_queued(house: House) -> None:
    queued, running = house.submit(), house.start().job_id
    held = house.submit("other")
    house.claim_all([held], types=ONLY_DEMO)
    house.deliver()
    house.republish(queued, running, held)
    assert [d.job_id for d in house.effects.dispatches] == [queued]
    assert house.owed() == ["job"]
    assert house.row(queued).last_sequence == 1
    assert house.row(queued).dispatch_count == 0


def test_a_lost_message_is_owed_again_ever_more_rarely(house: House) -> None:
    job_id = house.submit()
    house.deliver()
    for seconds in (60, 120, 240, 480, 960, 1800, 1800):
        house.wait(seconds - 1)
        assert house.redispatch() == 0, seconds
        house.wait(1.5)
        assert house.redispatch() == 1, seconds
        assert house.owed(job_id) == ["job"]
        assert house.take_owed() == []  # whoever found it is sending it
        house.wait(2)
        assert [d.job_id for d in house.take_owed()] == [job_id]
        house.change(job_id, dispatch_time=house.now())
        house.deliver()
    assert house.row(job_id).last_sequence == 1


def test_the_wait_begins_anew_when_a_job_is_queued_again(house: House) -> None:
    job_id = house.submit()
    house.deliver()
    for _ in range(3):
        house.wait(1800)
        assert house.redispatch() == 1
        house.deliver()
    house.finish(house.claim(job_id), Snoozed(0.0))
    house.promote()
    house.deliver()
    house.wait(60.5)
    assert house.redispatch() == 1


def test_a_message_that_is_owed_still_is_not_lost(house: House) -> None:
    job_id = house.submit()
    house.wait(7200)
    assert house.redispatch() == 0
    assert house.redispatch_all(house.now()) == 0
    assert house.owed(job_id) == ["job"]


def test_only_queued_jobs_of_the_queue_are_redispatched(house: House) -> None:
    here, elsewhere = house.submit(), house.submit(queue="elsewhere")
    house.start()
    house.submit(delay=DAY)
    held = house.submit("other")
    house.claim_all([held], types=ONLY_DEMO)
    house.deliver()
    house.wait(120)
    assert house.redispatch("default") == 1
    assert house.owed(here) == ["job"]
    assert house.owed(elsewhere) == house.owed(held) == []


def test_after_the_loss_of_a_broker_every_message_is_owed_again(house: House) -> None:
    queued = [house.submit(), house.submit(queue="elsewhere")]
    held = house.submit("other")
    house.claim_all([held], types=ONLY_DEMO)
    house.start()
    house.deliver()
    lost = house.now()
    later = house.submit()
    house.deliver()
    assert house.redispatch_all(lost, limit=1) == 1
    assert house.redispatch_all(lost) == 1
    assert house.redispatch_all(lost) == 0
    house.wait(2)
    assert {d.job_id for d in house.take_owed()} == set(queued)
    assert house.owed(later) == []


def test_a_queue_is_overdue_when_a_job_waits_for_a_minute(house: House) -> None:
    house.announce(worker(queues=("default", "other")))
    house.submit()
    house.deliver()

    def overdue() -> list[str]:
        return house.database.read(dispatching.overdue_queues)

    assert overdue() == []
    dispatch_time = house.now() - timedelta(seconds=61)
    (job_id,) = (d.job_id for d in house.effects.dispatches)
    house.change(job_id, dispatch_time=dispatch_time)
    assert overdue() == ["default"]


def test_a_queue_is_short_of_messages_when_more_wait_than_can_be_on_their_way(
    house: House,
) -> None:
    house.announce(worker(prefetch=2))
    for _ in range(4):
        house.submit()

    def short(ready: int) -> bool:
        return house.write(lambda tx: dispatching.short(tx, "default", ready))

    assert [short(0), short(1), short(2), short(3)] == [True, True, False, False]
    house.wait(31)  # the worker is dead, and its messages are the broker's again
    assert [short(3), short(4)] == [True, False]


# Held jobs.


def test_held_jobs_are_released_to_a_worker_that_has_their_type(house: House) -> None:
    other, elsewhere = house.submit("other"), house.submit("other", queue="elsewhere")
    house.claim_all([other, elsewhere], types=ONLY_DEMO)
    house.deliver()
    assert house.release_held() == 0
    house.announce(worker("w1", job_types=("demo",)))
    assert house.release_held() == 0
    house.announce(worker("w2", job_types=("other", "demo")), JobTypeInfo("other"))
    assert house.release_held() == 1
    assert [d.job_id for d in house.effects.dispatches] == [other]
    assert not house.row(other).held
    assert house.row(elsewhere).held
    assert house.row(other).last_sequence == 1
    assert house.release_held() == 0


def test_releasing_takes_no_more_than_its_limit(house: House) -> None:
    ids = [house.submit("other") for _ in range(5)]
    house.claim_all(ids, types=ONLY_DEMO)
    house.announce(worker(job_types=("other",)), JobTypeInfo("other"))
    assert [house.release_held(limit=3), house.release_held(limit=3)] == [3, 2]


# Purge.


def test_an_ended_job_is_deleted_with_its_events_when_its_time_is_over(house: House) -> None:
    done, failed, waiting = house.start(), house.start(), house.submit()
    house.finish(done, DONE)
    house.finish(failed, FATAL)
    house.wait(7 * DAY - 60)
    assert house.purge() == 0
    house.wait(90)  # it may still come after a resume token
    assert house.purge() == 0
    house.wait(60)
    assert house.purge() == 1
    assert (house.count(jobs), house.count(job_events)) == (2, 5)
    house.wait(23 * DAY)
    assert house.purge() == 1
    assert house.get(waiting).state == JobState.QUEUED
    assert (house.count(jobs), house.count(job_events)) == (1, 1)
    house.wait(400 * DAY)
    assert house.purge() == 0


def test_purging_takes_no_more_than_its_limit(house: House) -> None:
    for _ in range(5):
        house.finish(house.start(), DONE)
    house.wait(8 * DAY)
    assert [house.purge(limit=3), house.purge(limit=3), house.purge(limit=3)] == [3, 2, 0]


def test_nothing_to_do_leaves_no_effects(house: House) -> None:
    house.submit(delay=60.0)
    for verb in (house.promote, house.expire, house.reap, house.release_held):
        assert verb() == 0
        assert house.effects == Effects()
