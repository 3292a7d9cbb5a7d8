"""Queues with limits, pausing and priorities, on the real broker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from generated.jobsvc.v1.job_pb2 import Concurrency
from jobsvc.core.states import EventType, JobState
from jobsvc.store.tables import job_events, jobs
from tests.e2e.conftest import HANDLERS
from tests.harness import Service, until

QUEUES = ("two", "rated", "keyed", "paused")
OF_EACH = 30
SLEEP = {"seconds": 0.02}


def most_at_once(service: Service, ids: list[str]) -> int:
    """How many of these jobs ran at the same moment."""
    changes: list[tuple[Any, int]] = []
    for event in service.events(job_events.c.job_id.in_(ids)):
        if event.type == EventType.STARTED:
            changes.append((event.event_time, 1))
        elif event.type == EventType.SUCCEEDED:
            changes.append((event.event_time, -1))
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    assert len(changes) == 2 * len(ids)
    assert running == 0
    return most


@pytest.mark.timeout(120)
def test_limits_hold_under_load_and_all_ends(service: Service) -> None:
    service.start(servers=1, workers=2, queues=",".join(QUEUES), concurrency="4")
    client, admin = service.client(), service.client().admin
    admin.update_queue("two", max_running=2)
    admin.update_queue("rated", rate_limit=(10, 1.0))
    admin.pause_queue("paused")
    ids: dict[str, list[str]] = {name: [] for name in QUEUES}
    for number in range(OF_EACH):
        for name in QUEUES:
            options: dict[str, Any] = {"queue": name, "priority": number % 3}
            if name == "keyed":
                options["concurrency"] = Concurrency(key="key", max_running=1)
            ids[name].append(client.submit("demo.sleep", SLEEP, **options).job.job_id)
        if number % 10 == 5:
            admin.pause_queue("two")
        elif number % 10 == 8:
            admin.resume_queue("two")
    (paused,) = (queue for queue in admin.queues() if queue.name == "paused")
    assert (paused.queued_count, paused.running_count) == (OF_EACH, 0)
    until(lambda: service.count(jobs.c.held, jobs.c.queue == "paused") == OF_EACH, 20, "held")
    admin.resume_queue("paused")
    total = OF_EACH * len(QUEUES)
    service.wait_ended(total, 60)
    assert service.count(jobs.c.state == JobState.SUCCEEDED) == total
    assert most_at_once(service, ids["two"]) <= 2
    assert most_at_once(service, ids["keyed"]) == 1
    starts = sorted(
        event.event_time
        for event in service.events(
            job_events.c.job_id.in_(ids["rated"]), job_events.c.type == EventType.STARTED
        )
    )
    for first, beyond in zip(starts, starts[10:], strict=False):
        assert (beyond - first).total_seconds() >= 1.0
    service.wait_idle(queues=QUEUES)
    shown = {queue.name: queue for queue in admin.queues()}
    assert {name: shown[name].live_worker_count for name in QUEUES} == dict.fromkeys(QUEUES, 2)
    until(
        lambda: all(
            queue.ready_message_count == queue.unacknowledged_message_count == 0
            for queue in admin.queues()
        ),
        20,
        "nothing is left on the broker",
    )
    service.check([each for of_queue in ids.values() for each in of_queue], jobs_min=total)


@pytest.mark.timeout(60)
def test_what_comes_later_goes_first_by_its_priority(service: Service, tmp_path: Path) -> None:
    """The only slot is taken, and a backlog of others waits for it, and then for another."""
    service.start(handlers=HANDLERS, concurrency="1")
    client = service.client()
    gate = tmp_path / "gate"
    running = client.submit("test.gate", {"path": str(gate)}).job.job_id
    until(lambda: "STARTED" in service.history(running), 20, "the slot is taken")
    low = [client.submit("demo.echo").job.job_id for _ in range(20)]
    high = [client.submit("demo.echo", priority=p).job.job_id for p in (5, 9, 5, 9)]
    until(lambda: service.broker.depth() == 24, 20, "all wait on the broker")
    gate.with_suffix(".1").touch()
    service.wait_ended(25, 30)
    started = sorted(
        (event.event_time, event.job_id)
        for event in service.events(job_events.c.type == EventType.STARTED)
    )
    order = [job_id for _, job_id in started]
    assert order[0] == running
    assert set(order[1:3]) == {high[1], high[3]}
    assert set(order[3:5]) == {high[0], high[2]}
    assert set(order[5:]) == set(low)
    service.wait_idle()
    service.check([running, *low, *high], jobs_min=25)
