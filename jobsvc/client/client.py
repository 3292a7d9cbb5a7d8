"""The client itself."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from generated.jobsvc.v1 import job_service_pb2_grpc
from generated.jobsvc.v1.job_pb2 import Job, JobEvent
from generated.jobsvc.v1.job_service_pb2 import (
    CancelJobRequest,
    GetJobRequest,
    GetResultRequest,
    GetResultResponse,
    ListJobEventsRequest,
    RunJobRequest,
    SubmitJobRequest,
    SubmitJobResponse,
    SubmitJobsRequest,
    WatchJobRequest,
)
from jobsvc.client.clock import Clock, SystemClock, Watchdog
from jobsvc.client.convert import JobOptions, Payload, is_terminal, new_job, to_duration
from jobsvc.client.errors import CallFailed, call_failed
from jobsvc.client.retry import Backoff, Outage
from jobsvc.settings import is_loopback, split_address
from jobsvc.tls import read_ca, read_pair

WAIT_SECONDS_MAX = 50.0  # of one GetResult
HEARTBEAT_SECONDS = 15.0
HEARTBEATS_MISSED_MAX = 3
# Servers end a stream after 33 minutes at the latest.
STREAM_SECONDS_MAX = 40 * 60.0

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)


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
        self._own_channel = channel is None
        if channel is None:
            if token and not (tls_ca or insecure or _is_local(address)):
                raise ValueError(
                    f"the token would go to {address} unencrypted: give the CA of its certificate "
                    "(JOBSVC_TLS_CA), or say that the network is private (JOBSVC_INSECURE=1)"
                )
            credentials = _credentials(tls_ca, client_cert, client_key, tls_server_name)
            channel = _open(address, credentials, tls_server_name)
        self._channel = channel
        self._stub = job_service_pb2_grpc.JobServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout = timeout
        self._outage = outage
        self._clock = clock or SystemClock()
        self._random = random

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

    def submit(
        self, job_type: str, payload: Payload | None = None, **options: Unpack[JobOptions]
    ) -> SubmitJobResponse:
        """Submits a job; when this returns it is durable. It is submitted once, however often the
        call had to be made: without an `idempotency_key` it gets one of its own."""
        request = new_job(job_type, payload, **options)
        made = _ensure_key(request)
        return _own(self._call(self._stub.SubmitJob, request), made)

    def submit_many(self, requests: Iterable[SubmitJobRequest]) -> list[SubmitJobResponse]:
        """Submits 1 to 1,000 jobs (see `new_job`), all or none; the answers are in their order.
        The requests that have no `idempotency_key` get one, in copies."""
        call = SubmitJobsRequest(requests=requests)
        made = [_ensure_key(request) for request in call.requests]
        answer = self._call(self._stub.SubmitJobs, call)
        return [_own(one, key) for one, key in zip(answer.responses, made, strict=True)]

    def get(self, job_id: str) -> Job:
        return self._call(self._stub.GetJob, GetJobRequest(job_id=job_id)).job

    def cancel(self, job_id: str, reason: str = "") -> Job:
        """Cancels a waiting job at once, and asks a running one to stop."""
        return self._call(self._stub.CancelJob, CancelJobRequest(job_id=job_id, reason=reason)).job

    def result(self, job_id: str, wait: float = 0.0) -> GetResultResponse:
        """How the job ended, or its state alone if it has not after `wait` (0 to 50) seconds."""
        request = GetResultRequest(job_id=job_id)

        def shorten(left: float) -> None:
            # A second try is not to wait longer than what the first has left.
            seconds = max(0.0, min(wait, left - self._timeout))
            request.wait.CopyFrom(to_duration(seconds))

        return self._call(self._stub.GetResult, request, wait, shorten if wait else None)

    def wait(self, job_id: str, timeout: float | None = None) -> GetResultResponse:
        """How the job ended, once it has. Raises TimeoutError if that takes `timeout` seconds."""
        deadline = None if timeout is None else self._clock.time() + timeout
        while True:
            left = WAIT_SECONDS_MAX if deadline is None else deadline - self._clock.time()
            answer = self.result(job_id, wait=min(WAIT_SECONDS_MAX, max(0.0, left)))
            if is_terminal(answer.state):
                return answer
            if deadline is not None and self._clock.time() >= deadline:
                raise TimeoutError(f"job {job_id} has not ended after {timeout} s")

    def events(
        self, job_id: str, after_sequence: int = 0, page_size: int = 0
    ) -> Iterator[JobEvent]:
        """The job's history so far, read page by page."""
        while True:
            request = ListJobEventsRequest(
                job_id=job_id, after_sequence=after_sequence, page_size=page_size
            )
            page = self._call(self._stub.ListJobEvents, request)
            yield from page.events
            if not page.next_after_sequence:
                return
            after_sequence = page.next_after_sequence

    def watch(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        heartbeat_interval: float = HEARTBEAT_SECONDS,
    ) -> Iterator[JobEvent]:
        """Every event after `after_sequence`, once and in order, as they happen, until the job has
        ended. Resumes by itself when the stream breaks or falls silent."""
        outage = self._new_outage()
        while True:
            request = WatchJobRequest(
                job_id=job_id,
                after_sequence=after_sequence,
                heartbeat_interval=to_duration(heartbeat_interval),
            )
            ended = True  # holds for a stream without events: the last one was seen already
            try:
                messages = self._stream(self._stub.WatchJob, request, heartbeat_interval)
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
        outage = self._new_outage()
        job_id, sequence = "", 0
        while not job_id:
            try:
                messages = self._stream(self._stub.RunJob, request, HEARTBEAT_SECONDS)
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

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        wait: float = 0.0,
        prepare: Callable[[float], None] | None = None,
    ) -> _Response:
        """The answer to a call that may be repeated. It has `wait` seconds more than others;
        `prepare` is told before each try how many are left."""
        deadline = self._clock.time() + self._timeout + wait
        backoff = Backoff(self._random)
        while True:
            left = deadline - self._clock.time()
            if prepare is not None:
                prepare(left)
            try:
                return method(request, timeout=left, metadata=self._metadata)
            except grpc.RpcError as error:
                failed = call_failed(error)
                delay = backoff.next(failed)
                if not failed.transient or self._clock.time() + delay >= deadline:
                    raise failed from error
            self._clock.sleep_for(delay)

    def _stream(
        self,
        method: grpc.UnaryStreamMultiCallable[_Request, _Response],
        request: _Request,
        heartbeat_interval: float,
    ) -> Generator[_Response, None, None]:
        """The messages of one stream. Raises CallFailed when it breaks, and UNAVAILABLE when it
        is silent for too long."""
        call = method(request, timeout=STREAM_SECONDS_MAX, metadata=self._metadata)
        watchdog = Watchdog(self._clock, call.cancel)
        limit = self._timeout  # of the first message, which comes at once
        try:
            while True:
                watchdog.start(limit)
                message = next(call, None)
                # The caller may now take its time; that is not the stream's silence.
                watchdog.pause()
                if message is None:
                    return
                limit = HEARTBEATS_MISSED_MAX * heartbeat_interval
                yield message
        except grpc.RpcError as error:
            if watchdog.fired:
                raise CallFailed("UNAVAILABLE", f"nothing heard for {limit:g} s") from error
            raise call_failed(error) from error
        finally:
            watchdog.stop()
            call.cancel()

    def _new_outage(self) -> Outage:
        return Outage(self._clock, self._random, self._timeout, self._outage)


def _is_local(address: str) -> bool:
    try:
        return is_loopback(split_address(address)[0])
    except ValueError:  # another of gRPC's forms
        return address.startswith("unix:")


def _credentials(
    tls_ca: str | None,
    client_cert: str | None,
    client_key: str | None,
    tls_server_name: str | None,
) -> grpc.ChannelCredentials | None:
    """None without TLS. Raises ValueError."""
    if bool(client_cert) != bool(client_key):
        raise ValueError("a client's certificate and its key go together")
    if not tls_ca:
        if client_cert or tls_server_name:
            raise ValueError("without a CA (JOBSVC_TLS_CA) there is no TLS")
        return None
    root = read_ca(tls_ca)
    if not client_cert or not client_key:
        return grpc.ssl_channel_credentials(root)
    key, chain = read_pair(client_cert, client_key)
    return grpc.ssl_channel_credentials(root, key, chain)


def _open(
    address: str, credentials: grpc.ChannelCredentials | None, tls_server_name: str | None
) -> grpc.Channel:
    options: list[tuple[str, int | str]] = [
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # also the time that one connect may take
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ]
    if _is_local(address):
        options.append(("grpc.enable_http_proxy", 0))
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    if tls_server_name:
        options.append(("grpc.ssl_target_name_override", tls_server_name))
    return grpc.secure_channel(address, credentials, options=options)


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
