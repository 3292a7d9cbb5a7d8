"""A link that is cut, or goes silent, between processes that live on."""

from __future__ import annotations

import threading
from datetime import datetime
from pathlib import Path

import grpc
import pytest

from generated.jobsvc.v1.job_service_pb2_grpc import JobServiceStub
from jobsvc.client import from_value, new_job, state_name
from jobsvc.client.errors import call_failed
from jobsvc.core.states import EventType, JobState
from jobsvc.store.dialects.sockets import SILENCE_SECONDS_MAX
from jobsvc.store.tables import job_events
from tests.harness import Load, Process, Proxy, Service, until
from tests.harness.load import QUICK_RETRY, assert_pure, mixed

HANDLERS = "worker.handlers,tests.harness.handlers"
JOBS = 1_000
CUTS = 20
CUT_EVERY_SECONDS = 0.2


def gated(service: Service, gate: Path) -> str:
    """A job whose first attempt runs, until GATE.1 is there."""
    client = service.client()
    job = client.submit("test.gate", {"path": str(gate)}, retry_policy=QUICK_RETRY).job
    until(lambda: service.history(job.job_id)[-1] == "STARTED", 20, "the first attempt runs")
    return job.job_id


def told(worker: Process, event: str) -> bool:
    return any(record["event"] == event for record in worker.records())


def test_worker_cut_off_from_the_broker_finishes_its_job(service: Service, tmp_path: Path) -> None:
    service.server()
    with Proxy(service.broker.url) as link:
        worker = service.worker(broker_url=link.url, handlers=HANDLERS, log_level="debug")
        gate = tmp_path / "gate"
        job_id = gated(service, gate)
        assert link.cut() > 0
        # Its message comes again, and is of no use.
        until(lambda: told(worker, "message dropped"), 20, "the message came again")
        gate.with_suffix(".1").touch()
        client = service.client()
        assert from_value(client.wait(job_id, timeout=20).result) == {"attempt": 1}
        assert service.history(job_id) == ["SUBMITTED", "STARTED", "SUCCEEDED"]
        service.wait_idle()
    service.check([job_id], jobs_min=1)


def test_worker_cut_off_from_the_database_stops_before_others_start(
    service: Service, tmp_path: Path
) -> None:
    service.server()
    with Proxy(service.database_url) as link:
        settings = {"handlers": HANDLERS, "concurrency": "1", "lease": "6s", "heartbeat": "1s"}
        first = service.worker(database_url=link.url, **settings)
        gate = tmp_path / "gate"
        job_id = gated(service, gate)
        handlers_before = {child.pid for child in first.children()}
        with link.silence():
            stopped = first.wait_record("attempt stopped", 20, job_id=job_id)
            until(lambda: service.errors("WORKER_LOST"), 20, "its job is taken from it")
            (lost,) = service.errors("WORKER_LOST")
            assert datetime.fromisoformat(stopped["time"]) < lost.event_time
            assert not handlers_before & {child.pid for child in first.children()}
        gate.with_suffix(".2").touch()
        client = service.client()
        assert from_value(client.wait(job_id, timeout=30).result) == {"attempt": 2}
        service.wait_idle()
    service.check([job_id], jobs_min=1)


def test_silent_database_is_said_and_recovered_from(service: Service) -> None:
    with Proxy(service.database_url) as link:
        service.start(1, 1, database_url=link.url)
        client = service.client(timeout=3 * SILENCE_SECONDS_MAX)
        first = client.submit("demo.echo").job.job_id
        client.wait(first, timeout=20)
        stub = JobServiceStub(service.channel())
        with link.silence():
            with pytest.raises(grpc.RpcError) as caught:
                stub.SubmitJob(new_job("demo.echo"), timeout=3 * SILENCE_SECONDS_MAX)
            failed = call_failed(caught.value)
            assert (failed.code, failed.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
            until(lambda: client.health() == "NOT_SERVING", 20, "health says so")
        until(lambda: client.health() == "SERVING", 30, "health is back")
        second = client.submit("demo.echo").job.job_id
        assert state_name(client.wait(second, timeout=40).state) == "SUCCEEDED"
        service.wait_idle()
    service.check([first, second], jobs_min=2)


@pytest.mark.timeout(120)
@pytest.mark.alone
def test_database_connections_cut_in_the_middle_of_commits(service: Service) -> None:
    with Proxy(service.database_url) as link:
        service.start(1, 1, database_url=link.url, concurrency="4")
        load = Load(service.channel, mixed(JOBS))
        try:
            load.wait_acknowledged(50)
            pause = threading.Event()
            cuts = 0
            for _ in range(CUTS):
                cuts += link.cut()
                pause.wait(CUT_EVERY_SECONDS)
            assert cuts > CUTS
            ids = load.join()
        finally:
            load.stop()
        service.wait_ended(JOBS, 75)
        service.wait_idle()
        report = service.check(ids, jobs_min=JOBS)
        # Each key is one job, however often it was sent.
        assert report.jobs == len(set(ids)) == JOBS
        assert report.states == {JobState.SUCCEEDED: JOBS}
        assert_pure(service.results())
        keys = [event.job_id for event in service.events(job_events.c.type == EventType.SUCCEEDED)]
        assert len(keys) == len(set(keys)) == JOBS
