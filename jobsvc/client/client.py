"""The client itself."""

from __future__ import annotations

import math
import random
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import Self, Unpack

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from generated.jobsvc.v1 import job_pb2, job_service_pb2_grpc
from generated.jobsvc.v1.job_pb2 import Job, JobEvent, JobType
from generated.jobsvc.v1.job_service_pb2 import (
    CancelJobRequest,
    DeleteJobRequest,
    ExplainJobRequest,
    ExplainJobResponse,
    GetJobRequest,
    GetResultRequest,
    GetResultResponse,
    ListJobEventsRequest,
    ListJobsRequest,
    ListJobTypesRequest,
    RetryJobRequest,
    RunJobRequest,
    SubmitJobRequest,
    SubmitJobResponse,
    SubmitJobsRequest,
    UpdateJobRequest,
    WatchJobRequest,
    WatchJobsRequest,
)
from jobsvc.client.admin import Admin
from jobsvc.client.calls import Calls, credentials, is_local, open_channel
from jobsvc.client.clock import Clock, SystemClock
from jobsvc.client.convert import (
    FilterOptions,
    JobChanges,
    JobOptions,
    Payload,
    Span,
    is_terminal,
    new_filter,
    new_job,
    to_duration,
    to_seconds,
    to_timestamp,
)
from jobsvc.client.errors import CallFailed, call_failed
from jobsvc.client.keywords import known_keywords
from jobsvc.client.schedules import Schedules

WAIT_SECONDS_MAX = 50.0  # of one GetResult
HEARTBEAT_SECONDS = 15.0
_TOKEN = re.compile(r"[!-~]+")  # anything else cannot be in a header, or is cut off it


class Client:
    """One connection to the service; may be shared by threads. Close it, or use it in a `with`.

    `tls_ca` is the path of a PEM file, and turns TLS on; `client_cert` and `client_key` are for a
    server that asks for them, `tls_server_name` is for one whose certificate has another name than
    its address. A token goes unencrypted over the loopback only, unless `insecure`. A `channel`
    that is given is used in place of an own one and stays its giver's to close. Each call has
    `timeout` seconds for all its tries together; a stream that was up may be down for `outage`
    seconds. Every method raises CallFailed.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        tls_ca: str | None = None,
        client_cert: str | None = None,
        client_key: str | None = None,
        tls_server_name: str | None = None,
        insecure: bool = False,
        channel: grpc.Channel | None = None,
        timeout: float = 10.0,
        outage: float = 300.0,
        clock: Clock | None = None,
        random: Callable[[], float] = random.random,
    ) -> None:
        """Connects to nothing yet. Raises ValueError for options that do not go together, and for
        files that are not what they should be."""
        if token and not _TOKEN.fullmatch(token):
            raise ValueError(
                "the token has a character that no token has: a space, or the end of a line (\\r)?"
            )
        self._own_channel = channel is None
        if channel is None:
            if token and not (tls_ca or insecure or is_local(address)):
                raise ValueError(
                    f"the token would go to {address} unencrypted: give the CA of its certificate "
                    "(JOBSVC_TLS_CA), or say that the network is private (JOBSVC_INSECURE=1)"
                )
            channel = open_channel(
                address,
                credentials(tls_ca, client_cert, client_key, tls_server_name),
                tls_server_name,
            )
        self._channel = channel
        self._stub = job_service_pb2_grpc.JobServiceStub(channel)
        self._timeout = timeout
        self._clock = clock or SystemClock()
        self._calls = Calls(
            channel, token, timeout=timeout, outage=outage, clock=self._clock, random=random
        )
        self.schedules = Schedules(self._calls)
        self.admin = Admin(self._calls)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the calls that are still open, on whatever thread."""
        if self._own_channel:
            self._channel.close()

    @known_keywords
    def submit(
        self, job_type: str, payload: Payload | None = None, **options: Unpack[JobOptions]
    ) -> SubmitJobResponse:
        """Submits a job; when this returns it is durable. It is submitted once, however often the
        call had to be made: without an `idempotency_key` it gets one of its own."""
        request = new_job(job_type, payload, **options)
        made = _ensure_key(request)
        return _own(self._calls.call(self._stub.SubmitJob, request), made)

    def submit_many(self, requests: Iterable[SubmitJobRequest]) -> list[SubmitJobResponse]:
        """Submits 1 to 1,000 jobs (see `new_job`), all or none; the answers are in their order.
        The requests that have no `idempotency_key` get one, in copies."""
        call = SubmitJobsRequest(requests=requests)
        made = [_ensure_key(request) for request in call.requests]
        answer = self._calls.call(self._stub.SubmitJobs, call)
        return [_own(one, key) for one, key in zip(answer.responses, made, strict=True)]

    def get(self, job_id: str) -> Job:
        return self._calls.call(self._stub.GetJob, GetJobRequest(job_id=job_id)).job

    @known_keywords
    def jobs(
        self, *, full: bool = False, page_size: int = 0, **wanted: Unpack[FilterOptions]
    ) -> Iterator[Job]:
        """The jobs that match, newest first, read page by page; with `full` each has its payload
        and traceback."""
        request = ListJobsRequest(
            filter=new_filter(**wanted),
            view=job_pb2.JOB_VIEW_FULL if full else job_pb2.JOB_VIEW_BASIC,
            page_size=page_size,
        )
        for page in self._calls.pages(partial(self._calls.call, self._stub.ListJobs), request):
            yield from page.jobs

    def retry(self, job_id: str) -> Job:
        """Takes a failed or cancelled job back to QUEUED, with a fresh budget of attempts."""
        return self._calls.call(self._stub.RetryJob, RetryJobRequest(job_id=job_id)).job

    @known_keywords
    def update(self, job_id: str, **changes: Unpack[JobChanges]) -> Job:
        """Changes a waiting job; what is not given stays as it is."""
        request = UpdateJobRequest(job_id=job_id, update_mask=FieldMask(paths=sorted(changes)))
        if "priority" in changes:
            request.priority = changes["priority"]
        if "schedule_time" in changes:
            request.schedule_time.CopyFrom(to_timestamp(changes["schedule_time"]))
        if "labels" in changes:
            request.labels.update(changes["labels"])
        return self._calls.call(self._stub.UpdateJob, request).job

    def delete(self, job_id: str) -> None:
        """Deletes an ended job with its events and result."""
        self._calls.call(self._stub.DeleteJob, DeleteJobRequest(job_id=job_id))

    def explain(self, job_id: str) -> ExplainJobResponse:
        """Why the job is not running."""
        return self._calls.call(self._stub.ExplainJob, ExplainJobRequest(job_id=job_id))

    def job_types(self) -> Iterator[JobType]:
        """What can be submitted here."""
        list_types = partial(self._calls.call, self._stub.ListJobTypes)
        for page in self._calls.pages(list_types, ListJobTypesRequest()):
            yield from page.job_types

    def cancel(self, job_id: str, reason: str = "") -> Job:
        """Cancels a waiting job at once, and asks a running one to stop."""
        return self._calls.call(
            self._stub.CancelJob, CancelJobRequest(job_id=job_id, reason=reason)
        ).job

    def result(self, job_id: str, wait: Span = 0.0) -> GetResultResponse:
        """How the job ended, or its state alone if it has not after `wait` (0 to 50 seconds). What
        its handler returned is `from_value(answer.result)`, which raises where there is none."""
        request = GetResultRequest(job_id=job_id)
        longest = to_seconds(wait)

        def shorten(left: float) -> None:
            # A second try is not to wait longer than what the first has left.
            seconds = max(0.0, min(longest, left - self._timeout))
            request.wait.CopyFrom(to_duration(seconds))

        prepare = shorten if longest else None
        return self._calls.call(self._stub.GetResult, request, longest, prepare)

    def wait(self, job_id: str, timeout: Span | None = None) -> GetResultResponse:
        """How the job ended, once it has. Raises TimeoutError if that takes `timeout`."""
        longest = math.inf if timeout is None else to_seconds(timeout)
        deadline = self._clock.time() + longest
        while True:
            left = deadline - self._clock.time()
            answer = self.result(job_id, wait=min(WAIT_SECONDS_MAX, max(0.0, left)))
            if is_terminal(answer.state):
                return answer
            if self._clock.time() >= deadline:
                raise TimeoutError(f"job {job_id} has not ended after {longest:g} s")

    def events(
        self, job_id: str, after_sequence: int = 0, page_size: int = 0
    ) -> Iterator[JobEvent]:
        """The job's history so far, read page by page."""
        while True:
            request = ListJobEventsRequest(
                job_id=job_id, after_sequence=after_sequence, page_size=page_size
            )
            page = self._calls.call(self._stub.ListJobEvents, request)
            yield from page.events
            if not page.next_after_sequence:
                return
            after_sequence = page.next_after_sequence

    def watch(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        heartbeat_interval: Span = HEARTBEAT_SECONDS,
    ) -> Iterator[JobEvent]:
        """Every event after `after_sequence`, once and in order, as they happen, until the job has
        ended. Resumes by itself when the stream breaks or falls silent."""
        interval = to_seconds(heartbeat_interval)
        outage = self._calls.outage()
        while True:
            request = WatchJobRequest(
                job_id=job_id,
                after_sequence=after_sequence,
                heartbeat_interval=to_duration(interval),
            )
            ended = True  # holds for a stream without events: the last one was seen already
            try:
                messages = self._calls.stream(self._stub.WatchJob, request, interval)
                with closing(messages):
                    for message in messages:
                        outage.heard()
                        if message.WhichOneof("message") != "event":
                            continue
                        event = message.event
                        if not _follows(event, after_sequence):
                            continue
                        after_sequence = event.sequence
                        ended = is_terminal(event.state)
                        outage.progressed()
                        yield event
            except CallFailed as failed:
                outage.wait(failed)
                continue
            if ended:
                return
            outage.wait(_cut_short())

    @known_keywords
    def watch_jobs(
        self,
        resume_token: str = "",
        *,
        heartbeat_interval: Span = HEARTBEAT_SECONDS,
        **wanted: Unpack[FilterOptions],
    ) -> Iterator[tuple[JobEvent | None, str]]:
        """The events of every job that matches, as they happen and without an end: from now on,
        or from where a `resume_token` stood. Each comes with the token that stands behind it;
        None in place of an event says that the stream is alive, and has moved on. Resumes by
        itself when the stream breaks or falls silent."""
        interval = to_seconds(heartbeat_interval)
        outage = self._calls.outage()
        request = WatchJobsRequest(
            filter=new_filter(**wanted),
            resume_token=resume_token,
            heartbeat_interval=to_duration(interval),
        )
        while True:
            try:
                messages = self._calls.stream(self._stub.WatchJobs, request, interval)
                with closing(messages):
                    for message in messages:
                        outage.heard()
                        outage.progressed()
                        request.resume_token = message.resume_token
                        is_event = message.WhichOneof("message") == "event"
                        yield (message.event if is_event else None), message.resume_token
            except CallFailed as failed:
                outage.wait(failed)
                continue
            outage.wait(_cut_short())

    @known_keywords
    def run(
        self, job_type: str, payload: Payload | None = None, **options: Unpack[JobOptions]
    ) -> Iterator[JobEvent | GetResultResponse]:
        """Submits a job and follows it: each of its events, and last how it ended. Submits once
        and resumes by itself. Nothing is submitted before the first `next`; leaving off early
        leaves the job running."""
        request = RunJobRequest(
            request=new_job(job_type, payload, **options),
            heartbeat_interval=to_duration(HEARTBEAT_SECONDS),
        )
        _ensure_key(request.request)
        outage = self._calls.outage()
        job_id, sequence = "", 0
        while not job_id:
            try:
                messages = self._calls.stream(self._stub.RunJob, request, HEARTBEAT_SECONDS)
                with closing(messages):
                    for message in messages:
                        outage.heard()
                        kind = message.WhichOneof("message")
                        if kind == "result":
                            yield message.result
                            return
                        if kind == "event" and _follows(message.event, sequence):
                            job_id, sequence = message.event.job_id, message.event.sequence
                            yield message.event
            except CallFailed as failed:
                outage.wait(failed)
                continue
            outage.wait(_cut_short())
        yield from self.watch(job_id, sequence)
        yield self.wait(job_id)

    def health(self) -> str:
        """What the server says of itself: `SERVING` or another name of grpc.health.v1. Asks
        once."""
        # Not needed by any other call, and every command of the command line pays for imports.
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout)
        except grpc.RpcError as error:
            raise call_failed(error) from error
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _ensure_key(request: SubmitJobRequest) -> str:
    """Gives the request a key if it has none, and returns it then."""
    if request.idempotency_key:
        return ""
    request.idempotency_key = str(uuid.uuid4())
    return request.idempotency_key


def _own(response: SubmitJobResponse, made_key: str) -> SubmitJobResponse:
    # Nobody else can have used a key that was made for this call: if its job exists already, then
    # by an earlier try of the same call.
    if made_key and response.job.idempotency_key == made_key:
        response.already_existed = False
    return response


def _follows(event: JobEvent, sequence: int) -> bool:
    """False for an event that was seen already; raises CallFailed if some are missing before."""
    if event.sequence > sequence + 1:
        raise CallFailed(
            "DATA_LOSS", f"event {event.sequence} of job {event.job_id} came after {sequence}"
        )
    return event.sequence == sequence + 1


def _cut_short() -> CallFailed:
    return CallFailed("UNAVAILABLE", "the stream ended before the job did")
