"""Queues, workers and job types as operators see them, and why a job is not running."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import Concurrency
from jobsvc.core.operations import Explanation, JobType, Queue, RateLimit, WaitReason, Worker
from jobsvc.core.states import JobState
from jobsvc.errors import JobUnknown
from jobsvc.store import queues, registry
from jobsvc.store.reads import explaining
from jobsvc.store.tables import queue_starts, workers
from tests.store.house import DONE, FATAL, RETRYABLE, House, new_id, worker


def load(house: House, name: str = "default") -> Queue:
    return house.database.read(lambda c: queues.get_queue(c, name))


def explain(house: House, job_id: str, *, broker: bool = True) -> Explanation:
    return house.database.read(lambda c: explaining.explain(c, job_id, broker))


# Queues.


def test_a_queue_counts_its_jobs_by_state(house: House) -> None:
    house.announce(worker(queues=("default", "other")))
    house.start()
    house.finish(house.start(), RETRYABLE)
    house.finish(house.start(), DONE)
    for name in ("default", "default", "other"):
        house.submit(queue=name)
    house.submit(delay=60.0)
    queue = load(house)
    assert queue.counts == {
        JobState.SCHEDULED: 1,
        JobState.QUEUED: 2,
        JobState.RUNNING: 1,
        JobState.RETRYING: 1,
    }
    assert load(house, "other").counts == {JobState.QUEUED: 1}


def test_held_jobs_are_queued_and_grow_old(house: House) -> None:
    house.pause()
    job_id = house.submit()
    house.claim_all([job_id])
    house.change(job_id, queued_time=house.now() - timedelta(minutes=5))
    queue = load(house)
    assert queue.counts == {JobState.QUEUED: 1}
    assert queue.oldest_queued_age is not None
    assert 300 <= queue.oldest_queued_age < 330


def test_a_queue_without_jobs_has_no_age(house: House) -> None:
    house.resume("empty")
    assert load(house, "empty") == Queue("empty", 1, False, None, None)


def test_queues_come_by_name_in_pages(house: House) -> None:
    for name in ("b", "a", "c"):
        house.resume(name)

    def page(after: str, limit: int) -> list[str]:
        found = house.database.read(lambda c: queues.list_queues(c, after, limit))
        return [queue.name for queue in found]

    assert (page("", 2), page("b", 2), page("c", 2)) == (["a", "b"], ["c"], [])


def test_limits_are_changed_one_by_one(house: House) -> None:
    house.limit(max_running=4)
    house.rate(3, 60.0)
    queue = load(house)
    assert (queue.max_running, queue.rate_limit) == (4, RateLimit(3, 60.0))
    house.limit(max_running=None)
    queue = load(house)
    assert (queue.max_running, queue.rate_limit) == (None, RateLimit(3, 60.0))


def test_what_live_workers_hold_is_added_up(house: House) -> None:
    for worker_id, age in (("w1", 0), ("w2", 0), ("dead", 31)):
        house.announce(worker(worker_id))
        house.write(
            lambda tx, w=worker_id: registry.heartbeat(tx, w, None, {"default": 2, "q": 1})  # type: ignore[misc]
        )
        if age:
            house.write(
                lambda tx: tx.execute(
                    sa.update(workers)
                    .where(workers.c.id == "dead")
                    .values(heartbeat_time=tx.now - timedelta(seconds=31))
                )
            )
    queue = load(house)
    assert (queue.live_workers, queue.unacknowledged_messages) == (2, 4)


# Workers and job types.


def test_a_worker_is_shown_with_what_it_runs(house: House) -> None:
    house.announce(worker("w1", queues=("a", "b"), job_types=("demo", "other")))
    house.announce(worker("w2"))
    running = [house.claim(house.submit(), worker_id="w1").job_id for _ in range(2)]
    house.finish(house.start(), DONE)
    house.write(lambda tx: registry.heartbeat(tx, "w1", 5.0, {}))
    first, second = house.database.read(lambda c: registry.list_workers(c, "", 10))
    assert isinstance(first, Worker)
    assert (first.worker_id, first.host, first.pid, first.version) == ("w1", "h", 1, "0.1.0")
    assert (first.queues, first.job_types) == (("a", "b"), ("demo", "other"))
    assert (first.concurrency, first.running) == (4, tuple(running))
    assert first.claim_time is not None
    assert timedelta(seconds=4) < first.heartbeat_time - first.claim_time < timedelta(seconds=6)
    assert (second.worker_id, second.running, second.claim_time) == ("w2", (), None)
    assert house.database.read(lambda c: registry.list_workers(c, "w1", 10)) == [second]


def test_a_heartbeat_before_the_next_claim_keeps_the_time_of_the_last(house: House) -> None:
    house.announce(worker("w1"))
    house.write(lambda tx: registry.heartbeat(tx, "w1", 5.0, {}))
    house.write(lambda tx: registry.heartbeat(tx, "w1"))
    (found,) = house.database.read(lambda c: registry.list_workers(c, "", 10))
    assert found.claim_time is not None


def test_job_types_count_the_workers_that_have_them(house: House) -> None:
    echo, other = JobTypeInfo("echo", "Echoes."), JobTypeInfo("other")
    house.announce(worker("w1", job_types=("echo", "other")), echo, other)
    house.announce(worker("w2", job_types=("echo",)), echo)

    def page(after: str, limit: int) -> list[JobType]:
        return house.database.read(lambda c: registry.list_types(c, after, limit))

    assert page("", 10) == [JobType(echo, 2), JobType(other, 1)]
    assert (page("", 1), page("echo", 1)) == ([JobType(echo, 2)], [JobType(other, 1)])


# Why a job is not running.


def test_an_unknown_job_is_not_explained(house: House) -> None:
    with pytest.raises(JobUnknown):
        explain(house, new_id())


def test_it_has_ended(house: House) -> None:
    claimed = house.start()
    house.finish(claimed, FATAL)
    found = explain(house, claimed.job_id)
    assert (found.state, found.reason) == (JobState.FAILED, WaitReason.ENDED)
    assert found.facts.keys() == {"finish_time", "error_type"}
    assert found.facts["finish_time"].endswith("Z")


def test_it_runs(house: House) -> None:
    claimed = house.start()
    found = explain(house, claimed.job_id)
    assert (found.state, found.reason) == (JobState.RUNNING, WaitReason.RUNNING)
    assert (found.facts["worker_id"], found.facts["attempt"]) == ("w1", "1")


def test_it_is_not_due_or_backs_off(house: House) -> None:
    later = house.submit(delay=60.0)
    found = explain(house, later)
    assert (found.state, found.reason) == (JobState.SCHEDULED, WaitReason.NOT_DUE)
    due = house.row(later).schedule_time
    assert found.facts == {"next_time": due.isoformat().replace("+00:00", "Z")}
    claimed = house.start()
    house.finish(claimed, RETRYABLE)
    found = explain(house, claimed.job_id)
    assert (found.state, found.reason) == (JobState.RETRYING, WaitReason.RETRY_BACKOFF)
    assert found.facts["error_type"] == "ValueError"
    assert (found.facts["failures"], found.facts["max_attempts"]) == ("1", "10")


def test_each_reason_is_told_before_those_that_follow(house: House) -> None:
    """Everything that can hold a job holds this one; one thing after the other is taken away."""
    key = Concurrency("k", 1)
    house.announce(worker("w1", job_types=("demo",), concurrency=2))
    first = house.submit(priority=5)
    job_id = house.submit("other", concurrency=key)
    running = house.start(concurrency=key)
    house.limit(max_running=1)
    house.write(
        lambda tx: queues.set_limits(tx, "default", {"rate_limit"}, None, RateLimit(1, 3600.0))
    )
    house.pause()
    house.write(
        lambda tx: tx.execute(
            sa.insert(queue_starts).values(
                queue="default", until=tx.now + timedelta(hours=1), starts=1
            )
        )
    )

    def because(**options: Any) -> tuple[WaitReason, dict[str, str]]:
        found = explain(house, job_id, broker=False, **options)
        assert found.message.endswith(".")
        assert found.state is JobState.QUEUED
        return found.reason, dict(found.facts)

    assert because() == (WaitReason.QUEUE_PAUSED, {"queue": "default"})
    house.resume()
    reason, facts = because()
    assert reason is WaitReason.NO_WORKER
    assert facts == {"queue": "default", "job_type": "other", "live_worker_count": "1"}
    house.announce(worker("w1", job_types=("demo", "other"), concurrency=2))
    assert because() == (
        WaitReason.QUEUE_LIMIT,
        {"queue": "default", "limit": "1", "running": "1"},
    )
    house.limit(max_running=None)
    reason, facts = because()
    assert reason is WaitReason.RATE_LIMIT
    assert (facts["limit"], facts["started"], facts["period_seconds"]) == ("1", "1", "3600")
    assert facts["next_time"].endswith("Z")
    house.rate(0, 0)
    assert because() == (
        WaitReason.CONCURRENCY_LIMIT,
        {"concurrency_key": "k", "limit": "1", "running": "1"},
    )
    house.finish(running, DONE)
    reason, facts = because()
    assert (reason, facts["ahead_count"]) == (WaitReason.BEHIND_OTHERS, "1")
    assert (facts["running"], facts["slot_count"]) == ("0", "2")
    house.finish(house.claim(first), DONE)
    assert because()[0] is WaitReason.BROKER_UNAVAILABLE
    assert explain(house, job_id).reason is WaitReason.BEHIND_OTHERS
    assert explain(house, job_id).facts["ahead_count"] == "0"


def test_all_slots_are_taken(house: House) -> None:
    house.announce(worker("w1", concurrency=1))
    house.start()
    found = explain(house, house.submit(), broker=False)
    assert found.reason is WaitReason.BEHIND_OTHERS
    assert (found.facts["running"], found.facts["slot_count"]) == ("1", "1")


def test_what_waits_for_something_else_does_not_go_first(house: House) -> None:
    house.announce(worker("w1", job_types=("demo",)))
    house.start(concurrency=Concurrency("k", 1))
    keyed = house.submit(concurrency=Concurrency("k", 1))
    typed = house.submit("other")
    house.claim_all([keyed, typed], types=frozenset({"demo"}))
    older = house.submit()
    job_id = house.submit()
    house.submit()
    assert explain(house, job_id).facts["ahead_count"] == "1"
    assert explain(house, older).facts["ahead_count"] == "0"


def test_nobody_serves_its_queue(house: House) -> None:
    house.announce(worker("w1", queues=("elsewhere",)))
    found = explain(house, house.submit())
    assert (found.reason, found.facts["live_worker_count"]) == (WaitReason.NO_WORKER, "0")
