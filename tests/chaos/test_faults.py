"""One fault each, in the middle of 2,000 jobs under load and with watchers on some of them.

After every fault: what was acknowledged is stored, histories are legal and gapless, each watcher
saw every event once and in order, results are those of the payloads, nothing is owed or left over,
and all has ended within the bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobsvc.core.states import EventType, JobState
from jobsvc.store.tables import job_events
from tests.checker import Report
from tests.harness import Load, Process, Service, Watchers, until
from tests.harness.load import assert_pure, mixed
from tests.harness.service import LEASE_SECONDS, PATIENCE, REAP_SECONDS
from tests.services import RabbitmqNode

pytestmark = pytest.mark.timeout(150)

JOBS = 2_000
SLEEPS = 16  # long enough that the fault finds some of them running
SLEEP_SECONDS = 1.5
WATCHERS_MIN = 40
ACKNOWLEDGED_BEFORE = 600  # of the jobs, when the fault comes

REQUEUE_SECONDS_MAX = (LEASE_SECONDS + REAP_SECONDS) * PATIENCE
END_SECONDS_MAX = 75.0


class Storm:
    """Load and watchers on a service that is about to be hurt."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.load = Load(service.channel, mixed(JOBS, sleeps=SLEEPS, seconds=SLEEP_SECONDS))
        self.watchers = Watchers(service, channels=2)

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


@pytest.fixture
def own_broker() -> Iterator[RabbitmqNode]:
    with RabbitmqNode() as node:
        yield node


@pytest.fixture
def on_own_broker(own_broker: RabbitmqNode, database_url: str, tmp_path: Path) -> Iterator[Service]:
    made = Service(database_url, own_broker.url, tmp_path)
    yield made
    made.close()


def started_by(service: Service, worker: Process) -> int:
    """How many attempts a worker has begun."""
    worker_id = worker.wait_ready()["worker_id"]
    return len(
        service.events(job_events.c.type == EventType.STARTED, job_events.c.worker_id == worker_id)
    )


def test_killed_worker(service: Service, begin: Begin) -> None:
    storm = begin(service)
    victim = service.workers[0]
    running = service.running(victim.wait_ready()["worker_id"])
    victim.kill()
    killed = time.time()
    report = storm.calm()
    lost = service.errors("WORKER_LOST")
    assert lost, "it was to be killed with jobs running"
    assert len(lost) <= running + 100
    late = max(event.event_time.timestamp() for event in lost) - killed
    assert late <= REQUEUE_SECONDS_MAX
    assert report.event_types[EventType.ATTEMPT_FAILED] >= len(lost)
    assert not storm.watchers.interruptions


def test_killed_server(service: Service, begin: Begin) -> None:
    storm = begin(service, servers=2)
    service.servers[0].kill()
    storm.calm()
    assert storm.watchers.interruptions, "some watched on the server that was killed"
    assert not service.errors("WORKER_LOST")


def test_killed_broker(on_own_broker: Service, own_broker: RabbitmqNode, begin: Begin) -> None:
    storm = begin(on_own_broker)
    own_broker.kill()
    own_broker.start()
    storm.calm()
    assert not storm.watchers.interruptions
    assert not on_own_broker.errors("WORKER_LOST")


def test_wiped_broker(on_own_broker: Service, own_broker: RabbitmqNode, begin: Begin) -> None:
    storm = begin(on_own_broker)
    own_broker.wipe()
    own_broker.start()
    storm.calm()
    assert not storm.watchers.interruptions
    assert not on_own_broker.errors("WORKER_LOST")


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
        lambda: any(
            record["event"] in ("attempt stopped", "outcome dropped: the lease was lost")
            for record in victim.records()
        ),
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


def test_terminated_server(service: Service, begin: Begin) -> None:
    storm = begin(service, servers=2)
    victim = service.servers[0]
    victim.terminate()
    assert victim.wait() == 0
    storm.calm()
    # A stream that comes when all has been said finds nobody listening.
    assert set(storm.watchers.interruptions) <= {"DRAINING", "UNAVAILABLE"}
    assert storm.watchers.interruptions["DRAINING"] > 0
