"""A worker runs apart from all others what may have killed one."""

from __future__ import annotations

import time

import pytest

from jobsvc.core.attempts import Input, Succeeded
from jobsvc.core.states import JobState
from tests.harness.wait import until
from worker.runtime import claiming
from worker.runtime.consumer import Delivery

from .conftest import CONCURRENCY, SECONDS_MAX, Runtime, Shaky

DONE = Succeeded(Input(b"done"))


def suspect(runtime: Runtime) -> str:
    job_id = runtime.house.submit()
    runtime.house.change(job_id, apart=True)
    return job_id


def deliver_together(runtime: Runtime, *job_ids: str) -> list[Delivery]:
    now = time.monotonic()
    messages = [Delivery(each, 0, "default", 1000 + i, 1, now) for i, each in enumerate(job_ids)]
    assert runtime.inbox.on_deliveries(messages)
    return messages


def test_it_runs_when_all_others_have_ended_and_none_beside_it(runtime: Runtime) -> None:
    runtime.pool.slots = 3
    before, _ = runtime.run()
    first, second = suspect(runtime), suspect(runtime)
    messages = deliver_together(runtime, first, second)
    runtime.consumer.wait(lambda: runtime.consumer.prefetches[-1:] == [0])
    other = runtime.house.submit()
    passed_on = runtime.deliver(other)
    runtime.consumer.wait(lambda: passed_on in runtime.consumer.given_back)
    assert [task.job_id for task in runtime.pool.tasks] == [before]
    runtime.pool.end(before, DONE)
    for job_id, message in zip((first, second), messages, strict=True):
        assert runtime.pool.of(job_id).attempt == 1
        assert len(runtime.attempts) == 1
        late = runtime.deliver(other)
        runtime.consumer.wait(lambda late=late: late in runtime.consumer.given_back)  # type: ignore[misc]
        runtime.pool.end(job_id, DONE)
        runtime.consumer.wait_acknowledged(message)
    runtime.consumer.wait(lambda: runtime.consumer.prefetches[-1] == CONCURRENCY)
    runtime.deliver(other)
    assert runtime.pool.of(other).attempt == 1
    assert [task.job_id for task in runtime.pool.tasks] == [before, first, second, other]


def test_one_that_somebody_else_took_meanwhile_holds_nobody_up(runtime: Runtime) -> None:
    before, _ = runtime.run()
    job_id = suspect(runtime)
    message = runtime.deliver(job_id)
    runtime.consumer.wait(lambda: runtime.consumer.prefetches[-1:] == [0])
    runtime.house.cancel(job_id)
    runtime.pool.end(before, DONE)
    runtime.consumer.wait_acknowledged(message)
    runtime.consumer.wait(lambda: runtime.consumer.prefetches[-1] == CONCURRENCY)
    assert runtime.run()


def test_alone_in_a_process_the_others_wait(database: Shaky) -> None:
    runtime = Runtime(database, alone=True)
    runtime.start()
    job_id = suspect(runtime)
    runtime.deliver(job_id)
    runtime.pool.of(job_id)
    other = runtime.house.submit()
    runtime.deliver(other)
    assert len(runtime.inbox) == 1
    runtime.pool.end(job_id, DONE)
    runtime.pool.of(other)
    assert runtime.consumer.given_back == []
    assert runtime.consumer.prefetches == []
    runtime.stop()


def test_a_worker_that_stops_gives_their_messages_back(runtime: Runtime) -> None:
    before, _ = runtime.run()
    job_id = suspect(runtime)
    message = runtime.deliver(job_id)
    runtime.consumer.wait(lambda: runtime.consumer.prefetches[-1:] == [0])
    runtime.claiming.stop()
    assert message in runtime.consumer.given_back
    assert runtime.house.get(job_id).state is JobState.QUEUED
    runtime.pool.end(before, DONE)


def test_one_that_cannot_start_soon_comes_again(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "LOOK_SECONDS", 0.01)
    job_id = suspect(runtime)
    message = runtime.deliver(job_id)
    runtime.pool.unstarted = [runtime.pool.of(job_id)]
    runtime.consumer.wait_acknowledged(message)
    until(
        lambda: runtime.house.history(job_id)[-1] == "ATTEMPT_INTERRUPTED>QUEUED",
        SECONDS_MAX,
        "it is given back",
    )
    assert runtime.house.row(job_id).apart
