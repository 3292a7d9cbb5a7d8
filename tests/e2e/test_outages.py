"""The broker or the database is away: what is promised meanwhile, and that all goes on then."""

from __future__ import annotations

from pathlib import Path

import pytest

from generated.jobsvc.v1.job_pb2 import WAIT_REASON_BROKER_UNAVAILABLE
from jobsvc.client import CallFailed, state_name
from jobsvc.core.states import JobState
from jobsvc.store.tables import jobs
from tests.harness import Load, Service, until
from tests.harness.load import mixed
from tests.harness.service import PATIENCE
from tests.services import PostgresNode, RabbitmqNode

SUBMIT_SECONDS_MAX = 1.0 * PATIENCE
RECONNECT_SECONDS_MAX = 5.0 * PATIENCE


def test_broker_down_fails_no_submit(
    brittle_service: Service, brittle_broker: RabbitmqNode
) -> None:
    service = brittle_service
    service.start()
    client = service.client(timeout=SUBMIT_SECONDS_MAX)
    first = client.submit("demo.echo").job.job_id
    client.wait(first, timeout=20)
    brittle_broker.kill()
    ids = [client.submit("demo.echo").job.job_id for _ in range(20)]
    assert client.health() == "SERVING"
    # A server that starts now takes jobs as well.
    service.server()
    late = service.client(timeout=SUBMIT_SECONDS_MAX)
    ids += [late.submit("demo.echo").job.job_id for _ in range(20)]
    assert service.count(jobs.c.state == JobState.QUEUED) == len(ids)
    brittle_broker.start()
    service.wait_ended(len(ids) + 1, RECONNECT_SECONDS_MAX)
    service.wait_idle()
    service.check([first, *ids], jobs_min=len(ids) + 1)


def test_broker_short_of_memory_is_said_and_recovered_from(
    brittle_service: Service, brittle_broker: RabbitmqNode
) -> None:
    service = brittle_service
    service.start()
    client = service.client()
    client.wait(client.submit("demo.echo").job.job_id, timeout=20)
    brittle_broker.ctl("set_vm_memory_high_watermark", "absolute", "1000")
    try:
        ids = [client.submit("demo.echo").job.job_id for _ in range(3)]
        until(
            lambda: client.explain(ids[0]).reason == WAIT_REASON_BROKER_UNAVAILABLE,
            20,
            "it is said",
        )
        assert client.explain(ids[0]).facts["broker_reachable"] == "false"
    finally:
        brittle_broker.ctl("set_vm_memory_high_watermark", "absolute", "512MB")
    service.wait_ended(len(ids) + 1, RECONNECT_SECONDS_MAX)
    service.wait_idle()
    assert "no confirmation in time" not in service.log_text()


def test_another_queue_type_on_a_broker_in_use(service: Service) -> None:
    """Also for queues that no worker consumes any more."""
    service.start()
    client = service.client()
    client.submit("demo.echo", queue="of-nobody")
    client.wait(client.submit("demo.echo").job.job_id, timeout=20)
    for process in (*service.workers, *service.servers):
        process.terminate()
        assert process.wait() == 0
    service.start(queue_type="quorum")
    client = service.client()
    answer = client.wait(client.submit("demo.echo").job.job_id, timeout=20)
    assert state_name(answer.state) == "SUCCEEDED"
    assert service.broker.depth("jobs.q.default@2") == 0


def test_database_down_is_said_and_recovered_from(
    own_database: PostgresNode, broker_url: str, tmp_path: Path
) -> None:
    service = Service(own_database.url, broker_url, tmp_path)
    try:
        service.start()
        client = service.client()
        load = Load(service.channel, mixed(4, sleeps=4, seconds=1.0))
        ids = load.join()
        until(lambda: "STARTED" in service.history(ids[0]), 20, "the jobs run")
        own_database.kill()
        impatient = service.client(timeout=SUBMIT_SECONDS_MAX)
        with pytest.raises(CallFailed) as caught:
            impatient.submit("demo.echo")
        assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
        assert caught.value.retry_after is not None
        until(lambda: client.health() == "NOT_SERVING", 10, "health says so")
        own_database.start()
        until(lambda: client.health() == "SERVING", RECONNECT_SECONDS_MAX, "health is back")
        ids += [client.submit("demo.echo").job.job_id for _ in range(20)]
        service.wait_ended(len(ids), 30)
        assert state_name(client.result(ids[-1]).state) == "SUCCEEDED"
        service.wait_idle()
        service.check(ids, jobs_min=len(ids))
        assert all(p.running for p in (*service.servers, *service.workers))
    finally:
        service.close()
