"""One fault each, in the middle of 2,000 jobs under load and with watchers on some of them.

After every fault: what was acknowledged is stored, histories are legal and gapless, each watcher
saw every event once and in order, results are those of the payloads, nothing is owed or left over,
and all has ended within the bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from jobsvc.client import from_value
from jobsvc.core.states import EventType, JobState
from jobsvc.store.tables import job_events
from tests.checker import Report
from tests.harness import Load, Process, Service, Watchers, until
from tests.harness.load import QUICK_RETRY, assert_pure, mixed
from tests.harness.service import LEASE_SECONDS, PATIENCE, REAP_SECONDS
from tests.services import RabbitmqNode

pytestmark = [pytest.mark.timeout(150), pytest.mark.alone]

JOBS = 2_000
SLEEPS = 16  # long enough that the fault finds some of them running
SLEEP_SECONDS = 1.5
WATCHERS_MIN = 40
ACKNOWLEDGED_BEFORE = 600  # of the jobs, when the fault comes

REQUEUE_SECONDS_MAX = (LEASE_SECONDS + REAP_SECONDS) * PATIENCE
STALE_SECONDS_MAX = 5.0 * PATIENCE
CONSUMING_SECONDS_MAX = 15.0 * PATIENCE
END_SECONDS_MAX = 75.0

# What a worker says of attempts whose lease is gone.
LEASE_LOST = ("attempt stopped", "outcome dropped: the lease was lost")


class Storm:
    """Load and watchers on a service that is about to be hurt."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.watchers = Watchers(service, channels=2)
        self.fleet = self.watchers.watch_all()
        self.load = Load(service.channel, mixed(JOBS, sleeps=SLEEPS, seconds=SLEEP_SECONDS))

    def middle(self) -> None:
        """Returns when a fault would hit the most: jobs run, wait, and go on being submitted."""
        ids = self.load.wait_acknowledged(SLEEPS)
        self.watchers.watch(ids)
        ids = self.load.wait_acknowledged(ACKNOWLEDGED_BEFORE)
        self.watchers.watch(ids[SLEEPS :: ACKNOWLEDGED_BEFORE // WATCHERS_MIN])
        until(lambda: self.service.running() > 0, 20, "jobs run")
        assert len(self.load.acknowledged) < JOBS, "the fault comes too late"

    def calm(self) -> Report:
        """All that must hold in the end."""
        ids = self.load.join()
        self.watchers.watch(ids[-10:])
        self.service.wait_ended(JOBS, END_SECONDS_MAX)
        self.service.wait_idle()
        self.watchers.join(20)
        self.watchers.check(WATCHERS_MIN)
        self.watchers.check_all(20)
        assert self.watchers.stalest_seconds <= STALE_SECONDS_MAX
        results = self.service.results()
        assert len(results) == JOBS
        assert_pure(results)
        report = self.service.check(ids, jobs_min=JOBS)
        assert report.jobs == JOBS
        assert report.states == {JobState.SUCCEEDED: JOBS}
        return report

    def close(self) -> None:
        self.load.stop()
        self.watchers.close()


Begin = Callable[..., Storm]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Starts the processes, then load and watchers, and returns in the middle of it."""
    storms: list[Storm] = []

    def make(service: Service, servers: int = 1, workers: int = 2, **settings: str) -> Storm:
        service.start(servers, workers, **settings)
        storms.append(Storm(service))
        storms[-1].middle()
        return storms[-1]

    yield make
    for storm in storms:
        storm.close()


def started_by(service: Service, worker: Process) -> int:
    """How many attempts a worker has begun."""
    worker_id = worker.wait_ready()["worker_id"]
    return len(
        service.events(job_events.c.type == EventType.STARTED, job_events.c.worker_id == worker_id)
    )


def assert_no_lease_lost(service: Service) -> None:
    """Nor may a worker believe so."""
    assert not service.errors("WORKER_LOST")
    records = [record for worker in service.workers for record in worker.records()]
    assert not [record for record in records if record["event"] in LEASE_LOST]


def assert_consuming_again(service: Service) -> None:
    back = time.time()
    for worker in service.workers:

        def again(worker: Process = worker) -> bool:
            times = [r["time"] for r in worker.records() if r["event"] == "consuming"]
            return datetime.fromisoformat(times[-1]).timestamp() > back

        until(again, CONSUMING_SECONDS_MAX, f"{worker.name} consumes again")


def test_killed_worker(service: Service, begin: Begin) -> None:
    storm = begin(service)
    victim = service.workers[0]
    worker_id = victim.wait_ready()["worker_id"]
    until(lambda: service.running(worker_id), 20, "the victim has jobs")
    victim.kill()
    killed = time.time()
    report = storm.calm()
    lost = service.errors("WORKER_LOST")
    assert lost, "it was to be killed with jobs running"
    late = max(event.event_time.timestamp() for event in lost) - killed
    assert late <= REQUEUE_SECONDS_MAX
    assert report.event_types[EventType.ATTEMPT_FAILED] >= len(lost)
    assert not storm.watchers.interruptions


def test_killed_server(service: Service, begin: Begin) -> None:
    storm = begin(service, servers=2)
    service.servers[0].kill()
    storm.calm()
    assert storm.watchers.interruptions, "some watched on the server that was killed"
    assert storm.fleet.interruptions, "so did who watches all jobs"
    assert_no_lease_lost(service)


def test_killed_broker(
    brittle_service: Service, brittle_broker: RabbitmqNode, begin: Begin
) -> None:
    storm = begin(brittle_service, log_level="debug")
    brittle_broker.kill()
    brittle_broker.start()
    assert_consuming_again(brittle_service)
    storm.calm()
    assert not storm.watchers.interruptions
    assert_no_lease_lost(brittle_service)


def test_wiped_broker(brittle_service: Service, brittle_broker: RabbitmqNode, begin: Begin) -> None:
    storm = begin(brittle_service, log_level="debug")
    brittle_broker.wipe()
    brittle_broker.start()
    assert_consuming_again(brittle_service)
    storm.calm()
    assert not storm.watchers.interruptions
    assert_no_lease_lost(brittle_service)


def test_frozen_worker(service: Service, begin: Begin) -> None:
    storm = begin(service)
    victim = service.workers[0]
    victim.pause()
    until(lambda: service.errors("WORKER_LOST"), REQUEUE_SECONDS_MAX, "its jobs are taken from it")
    storm.load.join()
    before = started_by(service, victim)
    until(lambda: service.running() == 0, END_SECONDS_MAX, "the other worker has done the rest")
    assert started_by(service, victim) == before
    victim.resume()
    # It finds out that its leases are gone, and lets what it did be.
    until(
        lambda: any(record["event"] in LEASE_LOST for record in victim.records()),
        20,
        "the worker that was frozen drops its outcomes",
    )
    storm.calm()
    # And it is of use again.
    client = service.client()
    other = service.workers[1]
    other.terminate()
    assert other.wait() == 0
    assert client.wait(client.submit("demo.echo").job.job_id, timeout=20).WhichOneof("outcome")


def test_stale_outcome_is_rejected(service: Service, tmp_path: Path) -> None:
    # One slot, or the first worker would be sent the message of the second attempt, and freeze it.
    settings = {"handlers": "worker.handlers,tests.harness.handlers", "concurrency": "1"}
    service.start(**settings)  # type: ignore[arg-type]
    client = service.client()
    gate = tmp_path / "gate"
    job = client.submit("test.gate", {"path": str(gate)}, retry_policy=QUICK_RETRY).job
    first = service.workers[0]
    until(lambda: service.history(job.job_id)[-1] == "STARTED", 20, "the first attempt runs")
    first.pause()
    second = service.worker(**settings)
    again = ["SUBMITTED", "STARTED", "ATTEMPT_FAILED", "QUEUED", "STARTED"]
    until(lambda: service.history(job.job_id) == again, 20, "the second attempt runs")
    # The first attempt's own process was not frozen: its outcome waits for the worker.
    gate.with_suffix(".1").touch()
    first.resume()

    def dropped() -> bool:
        return any(r["event"] in LEASE_LOST for r in first.records())

    until(dropped, 20, "the first worker drops the outcome")
    assert service.history(job.job_id) == again
    gate.with_suffix(".2").touch()
    assert from_value(client.wait(job.job_id, timeout=20).result) == {"attempt": 2}
    ended = service.events(job_events.c.type == EventType.SUCCEEDED)
    assert [event.worker_id for event in ended] == [second.wait_ready()["worker_id"]]
    service.wait_idle()
    service.check([job.job_id], jobs_min=1)


def test_terminated_worker(service: Service, begin: Begin) -> None:
    storm = begin(service)
    victim = service.workers[0]
    assert started_by(service, victim) > 0
    victim.terminate()
    assert victim.wait() == 0
    assert service.running(victim.wait_ready()["worker_id"]) == 0
    storm.calm()
    failures = service.events(job_events.c.type == EventType.ATTEMPT_FAILED)
    assert {event.detail["error"]["type"] for event in failures} == {"DemoError"}
    assert_no_lease_lost(service)


def test_terminated_server(service: Service, begin: Begin) -> None:
    storm = begin(service, servers=2)
    victim = service.servers[0]
    victim.terminate()
    assert victim.wait() == 0
    storm.calm()
    # A stream that comes when all has been said finds nobody listening.
    assert set(storm.watchers.interruptions) <= {"DRAINING", "UNAVAILABLE", "CANCELLED"}
    assert storm.watchers.interruptions["DRAINING"] > 0
