"""What `/metrics` counts is what happened, and the probes tell the truth."""

from __future__ import annotations

import http.client
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobsvc.client import Client, event_name, state_name
from jobsvc.core.states import JobState
from jobsvc.services.upkeep import MEASURE_INTERVAL_SECONDS
from jobsvc.store.tables import jobs
from tests.harness import Process, Service, until
from tests.harness.load import QUICK_RETRY
from tests.harness.service import LEASE_SECONDS, PATIENCE
from tests.services import PostgresNode, RabbitmqNode, vhost_url

ANY_PORT = "127.0.0.1:0"
MEASURED_SECONDS_MAX = MEASURE_INTERVAL_SECONDS * PATIENCE
NOTICED_SECONDS_MAX = 10.0 * PATIENCE


def fetch(process: Process, path: str) -> tuple[int, str]:
    address = process.wait_record("serving metrics", 10)["address"]
    connection = http.client.HTTPConnection(str(address), timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def status(process: Process, path: str) -> int:
    return fetch(process, path)[0]


class Scrape:
    """What a process told at one moment."""

    def __init__(self, process: Process) -> None:
        families = text_string_to_metric_families(fetch(process, "/metrics")[1])
        self._samples = [sample for family in families for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Over all label sets that have these labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def steps(self) -> Counter[tuple[str, str]]:
        """By type of event and the state it led to."""
        found: Counter[tuple[str, str]] = Counter()
        for sample in self._samples:
            if sample.name == "jobsvc_job_events_total":
                found[sample.labels["event"], sample.labels["state"]] += int(sample.value)
        return found


def scrapes(service: Service) -> list[Scrape]:
    return [Scrape(process) for process in (*service.servers, *service.workers)]


def total(service: Service, name: str, **labels: str) -> float:
    return sum(scrape.sum(name, **labels) for scrape in scrapes(service))


def events(service: Service, event: str, **labels: str) -> float:
    return total(service, "jobsvc_job_events_total", event=event, **labels)


def run_some(client: Client) -> None:
    """Three that succeed, one of them late; one that fails once, one that fails for good."""
    for _ in range(2):
        client.submit("demo.echo", {"a": 1})
    client.submit("demo.sleep", {"seconds": 0.3, "steps": 3})
    client.submit("demo.fail", {"times": 1}, retry_policy=QUICK_RETRY)
    client.submit("demo.fail", {"times": 5, "retryable": False})


def cancel_some(service: Service, client: Client) -> None:
    """One that runs and is watched, one that waits."""
    (server,), (worker,) = service.servers, service.workers
    job_id = client.submit("demo.sleep", {"seconds": 60, "steps": 1}).job.job_id
    stream = client.watch(job_id)
    assert [event_name(next(stream).type) for _ in range(2)] == ["SUBMITTED", "STARTED"]
    until(lambda: Scrape(worker).sum("jobsvc_running") == 1, 10, "the worker tells that it runs")
    assert Scrape(server).sum("jobsvc_watchers") == 1
    client.cancel(job_id)
    assert [event_name(event.type) for event in stream][-1] == "CANCELLED"
    client.cancel(client.submit("demo.echo", {}, delay=3600).job.job_id)


def test_the_numbers_are_right(service: Service) -> None:
    service.start(metrics_listen=ANY_PORT)
    (server,), (worker,) = service.servers, service.workers
    client = service.client()
    run_some(client)
    service.wait_ended(5, 20)
    cancel_some(service, client)
    service.wait_ended(7, 20)
    service.wait_idle()

    assert events(service, "SUBMITTED") == 7
    assert events(service, "STARTED") == 7
    assert events(service, "SUCCEEDED") == 4
    assert events(service, "SUCCEEDED", job_type="demo.echo", queue="default") == 2
    assert events(service, "ATTEMPT_FAILED", state="RETRYING", job_type="demo.fail") == 1
    assert events(service, "FAILED", job_type="demo.fail") == service.broker.depth("jobs.dead") == 1
    assert events(service, "CANCELLED", job_type="demo.sleep") == 1
    assert events(service, "CANCELLED", job_type="demo.echo") == 1
    stored = Counter((event.type, event.state) for event in service.events())
    assert sum((scrape.steps() for scrape in scrapes(service)), Counter()) == stored

    told = Scrape(worker)
    assert told.sum("jobsvc_wait_seconds_count") == told.sum("jobsvc_run_seconds_count") == 7
    assert told.sum("jobsvc_run_seconds_count", job_type="demo.fail", queue="default") == 3
    assert 0.3 <= told.sum("jobsvc_run_seconds_sum", job_type="demo.sleep") < 60
    assert told.sum("jobsvc_wait_seconds_bucket", le="30.0") == 7
    assert told.sum("jobsvc_running") == 0
    told = Scrape(server)
    assert told.sum("jobsvc_watchers") == 0
    assert told.sum("jobsvc_watch_lag_seconds_count") >= 1
    submits = {"method": "JobService/SubmitJob", "code": "OK"}
    assert told.sum("jobsvc_call_seconds_count", **submits) == 7
    for name in ("jobsvc_ready", "jobsvc_broker_up"):
        assert [scrape.sum(name) for scrape in scrapes(service)] == [1, 1]
    assert total(service, "jobsvc_leases_expired_total") == 0
    assert total(service, "jobsvc_leases_lost_total") == 0


def test_what_only_the_database_knows_is_told_by_each_server(service: Service) -> None:
    service.start(servers=2, metrics_listen=ANY_PORT)
    service.client().submit("demo.echo", {}, queue="nobody")

    def told() -> bool:
        return all(
            server.sum("jobsvc_oldest_queued_age_seconds", queue="nobody") > 1
            and server.sum("jobsvc_workers", queue="default") == 1
            for server in map(Scrape, service.servers)
        )

    until(told, MEASURED_SECONDS_MAX, "the servers have measured")
    for server in map(Scrape, service.servers):
        assert server.sum("jobsvc_oldest_queued_age_seconds", queue="default") == 0
        assert server.sum("jobsvc_oldest_queued_age_seconds") < 60
        assert server.sum("jobsvc_workers", queue="nobody") == 0
        assert server.sum("jobsvc_outbox_age_seconds") == 0


def test_a_lost_lease_is_told_by_whoever_noticed(service: Service) -> None:
    service.start(metrics_listen=ANY_PORT)
    (server,), (worker,) = service.servers, service.workers
    client = service.client()
    job_id = client.submit("demo.sleep", {"seconds": 60, "steps": 1}).job.job_id
    until(lambda: service.running() == 1, 10, "the job runs")
    worker.pause()
    expired = "jobsvc_leases_expired_total"
    until(lambda: Scrape(server).sum(expired) == 1, LEASE_SECONDS * 5, "the lease ran out")
    client.cancel(job_id)
    worker.resume()
    until(lambda: Scrape(worker).sum("jobsvc_leases_lost_total") == 1, 10, "the worker knows")
    service.wait_ended(1, 20)


@pytest.fixture
def all_brittle(
    own_database: PostgresNode,
    brittle_vhosts: tuple[RabbitmqNode, Iterator[str]],
    tmp_path: Path,
) -> Iterator[Service]:
    """On a database and a broker to kill."""
    node, vhosts = brittle_vhosts
    made = Service(own_database.url, vhost_url(node.url, next(vhosts)), tmp_path)
    yield made
    made.close()


@pytest.mark.timeout(180)
def test_the_probes_tell_what_is_away(
    all_brittle: Service, own_database: PostgresNode, brittle_broker: RabbitmqNode
) -> None:
    service = all_brittle
    service.start(metrics_listen=ANY_PORT)
    server = service.servers[0]
    both = (server, service.workers[0])

    def ready() -> list[int]:
        assert [status(process, "/livez") for process in both] == [200, 200]
        return [status(process, "/readyz") for process in both]

    def broker_up() -> list[float]:
        return [Scrape(process).sum("jobsvc_broker_up") for process in both]

    until(lambda: ready() == [200, 200], NOTICED_SECONDS_MAX, "both are ready")
    until(lambda: broker_up() == [1, 1], NOTICED_SECONDS_MAX, "both can publish")

    brittle_broker.kill()
    # Submits are taken all the same.
    until(lambda: ready() == [200, 503], NOTICED_SECONDS_MAX, "the worker consumes nothing")
    until(lambda: broker_up() == [0, 0], NOTICED_SECONDS_MAX, "neither can publish")
    late = service.client().submit("demo.echo").job.job_id
    assert service.count(jobs.c.state == JobState.QUEUED) == 1
    until(
        lambda: Scrape(server).sum("jobsvc_outbox_age_seconds") > 0,
        MEASURED_SECONDS_MAX,
        "the outbox has an age",
    )
    brittle_broker.start()
    until(lambda: ready() == [200, 200], NOTICED_SECONDS_MAX, "the worker consumes again")
    until(lambda: broker_up() == [1, 1], NOTICED_SECONDS_MAX, "both can publish again")
    assert state_name(service.client().wait(late, timeout=20).state) == "SUCCEEDED"

    own_database.kill()
    until(lambda: ready() == [503, 503], NOTICED_SECONDS_MAX, "neither reaches the database")
    assert [Scrape(process).sum("jobsvc_ready") for process in both] == [0, 0]
    own_database.start()
    until(lambda: ready() == [200, 200], NOTICED_SECONDS_MAX, "both reach it again")
    assert [Scrape(process).sum("jobsvc_ready") for process in both] == [1, 1]
