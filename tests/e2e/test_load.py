"""Many jobs, and many watchers."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobsvc.core.states import EventType, JobState
from jobsvc.store.tables import job_events
from tests.e2e.conftest import HANDLERS
from tests.harness import Load, Service, Watchers, until
from tests.harness.load import assert_pure, mixed

pytestmark = pytest.mark.alone

JOBS = 20_000
WATCHERS = 1_000
WATCHED_JOBS = 100
LINES = 20


@pytest.mark.timeout(180)
def test_twenty_thousand_jobs(service: Service) -> None:
    service.start(servers=1, workers=2)
    load = Load(service.channel, mixed(JOBS), threads=2, bulk=500)
    ids = load.join(90)
    assert len(set(ids)) == JOBS
    service.wait_ended(JOBS, 120)
    service.wait_idle()
    assert service.broker.depth("jobs.poison") == service.broker.depth("jobs.dead") == 0
    report = service.check(ids, jobs_min=JOBS)
    assert report.states == {JobState.SUCCEEDED: JOBS}
    assert report.event_types[EventType.ATTEMPT_FAILED] == JOBS // 10
    results = service.results()
    assert len(results) == JOBS
    assert_pure(results)
    workers = {e.worker_id for e in service.events(job_events.c.type == EventType.STARTED)}
    assert len(workers) == 2


@pytest.mark.timeout(120)
def test_a_thousand_watchers(service: Service, tmp_path: Path) -> None:
    service.start(handlers=HANDLERS, isolation="thread", concurrency=str(WATCHED_JOBS))
    client = service.client()
    gate = tmp_path / "gate"
    payload = {"path": str(gate), "lines": LINES}
    ids = [client.submit("test.gate", payload).job.job_id for _ in range(WATCHED_JOBS)]
    with Watchers(service, channels=4) as watchers:
        watchers.watch(ids * (WATCHERS // WATCHED_JOBS))
        until(
            lambda: all(len(recording.seen) >= 2 for recording in watchers.recordings),
            40,
            "every watcher has seen its job start",
        )
        gate.with_suffix(".1").touch()
        watchers.join(60)
        watchers.check(WATCHERS)
        assert not watchers.interruptions
        assert {len(r.seen) for r in watchers.recordings} == {LINES + 3}
    service.wait_idle()
    service.check(ids, jobs_min=WATCHED_JOBS)
