"""One trace from the client's call through the server to the worker, and its id in each log."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from generated.jobsvc.v1.job_service_pb2_grpc import JobServiceStub
from jobsvc.client import new_job
from tests.harness import Process, Service
from tests.harness.load import QUICK_RETRY

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
EXPORTED_SECONDS_MAX = 20.0
# What tells of a step in a job's life.
SUBMITTED = {"job submitted"}
RAN = {"job started", "attempt failed", "attempt succeeded"}


class Collector(TraceServiceServicer):
    """Takes in what processes export, as (name of the service, span)."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Span]] = []
        self._changed = threading.Condition()

    def Export(  # noqa: N802 - gRPC's name
        self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> ExportTraceServiceResponse:
        with self._changed:
            for resource in request.resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self._spans += [(names["service.name"], span) for span in scope.spans]
            self._changed.notify_all()
        return ExportTraceServiceResponse()

    def wait_for(self, count: int, wanted: Callable[[str, Span], bool]) -> list[Span]:
        """So many spans, in the order of their start, once there are that many."""

        def found() -> list[Span]:
            return [span for service, span in self._spans if wanted(service, span)]

        with self._changed:
            done = self._changed.wait_for(lambda: len(found()) >= count, EXPORTED_SECONDS_MAX)
            names = [(service, span.name) for service, span in self._spans]
            assert done, f"exported so far: {names}"
            return sorted(found(), key=lambda span: span.start_time_unix_nano)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where processes that start from now on export to."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]  # has no types
        collector, server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield collector
    server.stop(None).wait()


def submit(service: Service, *metadata: tuple[str, str]) -> str:
    """A job that fails once."""
    request = new_job("demo.fail", {"times": 1}, retry_policy=QUICK_RETRY)
    stub = JobServiceStub(service.channel())
    return str(stub.SubmitJob(request, metadata=metadata, timeout=10).job.job_id)


def traces_in_log(process: Process, job_id: str) -> set[tuple[str, str]]:
    """(event, trace id) of all that its log says of the job."""
    return {
        (record["event"], record.get("trace_id", "none"))
        for record in process.records()
        if record.get("job_id") == job_id
    }


def each(events: set[str], trace: str) -> set[tuple[str, str]]:
    return {(event, trace) for event in events}


def test_one_trace_leads_from_the_client_to_the_worker(
    collector: Collector, service: Service
) -> None:
    service.start()
    job_id = submit(service, ("traceparent", f"00-{TRACE}-{CALLER}-01"))
    client = service.client()
    client.wait(job_id, timeout=20)
    assert client.get(job_id).trace_id == TRACE

    (call,) = collector.wait_for(
        1, lambda service, span: service == "jobsvc-server" and span.name.endswith("/SubmitJob")
    )
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, CALLER)
    assert call.kind == Span.SPAN_KIND_SERVER
    attempts = collector.wait_for(2, lambda service, span: service == "jobsvc-worker")
    for number, attempt in enumerate(attempts, 1):
        assert attempt.name == "run demo.fail"
        assert attempt.trace_id == call.trace_id
        assert attempt.parent_span_id == call.span_id
        assert [link.span_id for link in attempt.links] == [call.span_id]
        told = {pair.key: pair.value for pair in attempt.attributes}
        assert told["jobsvc.job_id"].string_value == job_id
        assert told["jobsvc.attempt"].int_value == number
    assert [attempt.status.code for attempt in attempts] == [
        Status.STATUS_CODE_ERROR,
        Status.STATUS_CODE_UNSET,
    ]

    (server,), (worker,) = service.servers, service.workers
    worker.wait_record("attempt succeeded", 10, job_id=job_id)
    assert traces_in_log(server, job_id) == each(SUBMITTED, TRACE)
    assert traces_in_log(worker, job_id) == each(RAN, TRACE)
    worker_id = worker.wait_ready()["worker_id"]
    ran = [record for record in worker.records() if record.get("job_id") == job_id]
    assert {record["worker_id"] for record in ran} == {worker_id}
    assert [record["attempt"] for record in ran] == [1, 1, 2, 2]


def test_without_a_collector_the_trace_is_in_every_log_all_the_same(service: Service) -> None:
    service.start(log_level="debug")
    given = submit(service, ("traceparent", f"00-{TRACE}-{CALLER}-01"))
    made = submit(service)
    client = service.client()
    for job_id in (given, made):
        client.wait(job_id, timeout=20)
    own = client.get(made).trace_id
    assert own not in ("", TRACE)
    (server,), (worker,) = service.servers, service.workers
    for job_id, trace in ((given, TRACE), (made, own)):
        worker.wait_record("attempt succeeded", 10, job_id=job_id)
        assert traces_in_log(server, job_id) == each(SUBMITTED, trace)
        assert traces_in_log(worker, job_id) == each(RAN, trace)
        server.wait_record("call", 10, method="JobService/SubmitJob", trace_id=trace)
