"""Which calls are made again, when, and until when."""

from __future__ import annotations

import grpc
import pytest

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1.job_pb2 import Job
from generated.jobsvc.v1.job_service_pb2 import (
    CancelJobResponse,
    GetJobResponse,
    GetResultResponse,
    ListJobEventsResponse,
    SubmitJobResponse,
    SubmitJobsResponse,
)
from jobsvc.client import CallFailed, Client, new_job
from jobsvc.client.retry import Backoff
from jobsvc.errors import Violation
from tests.unit.client.fakes import JOB_ID, FakeClock, Server, event, start

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def client(server: Server, clock: FakeClock) -> Client:
    return Client(channel=server.channel, clock=clock, random=lambda: 1.0, token="t0ken")


def test_backoff_doubles_from_a_tenth_of_a_second_to_ten() -> None:
    backoff = Backoff(lambda: 1.0)
    failed = CallFailed("UNAVAILABLE", "")
    waits = [backoff.next(failed) for _ in range(9)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10])
    backoff.reset()
    assert backoff.next(failed) == pytest.approx(0.1)
    assert Backoff(lambda: 0.0).next(failed) == 0.0
    assert Backoff(lambda: 0.5).next(CallFailed("UNAVAILABLE", "", retry_after=3)) == 3.05


def test_a_read_is_tried_again_until_it_is_answered(
    server: Server, client: Client, clock: FakeClock
) -> None:
    got = start(lambda: client.get(JOB_ID))
    server.refuse("GetJob", UNAVAILABLE, reason="DRAINING", retry=1.5)
    server.refuse("GetJob", grpc.StatusCode.CANCELLED)
    server.refuse("GetJob", grpc.StatusCode.RESOURCE_EXHAUSTED, reason="LIMIT_REACHED", retry=2)
    request = server.answer("GetJob", GetJobResponse(job=Job(job_id=JOB_ID)))
    assert got.result(10).job_id == request.job_id == JOB_ID
    assert clock.slept == pytest.approx([1.6, 0.2, 2.4])


def test_the_trailer_says_when(server: Server, client: Client, clock: FakeClock) -> None:
    got = start(lambda: client.get(JOB_ID))
    server.refuse("GetJob", UNAVAILABLE, reason="DRAINING", retry=9, pushback="500")
    server.answer("GetJob", GetJobResponse())
    got.result(10)
    assert clock.slept == pytest.approx([0.6])


@pytest.mark.parametrize("pushback", ["-1", "soon"])
def test_the_trailer_can_say_never(
    server: Server, client: Client, clock: FakeClock, pushback: str
) -> None:
    got = start(lambda: client.get(JOB_ID))
    server.refuse("GetJob", UNAVAILABLE, pushback=pushback)
    with pytest.raises(CallFailed):
        got.result(10)
    assert clock.slept == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.NOT_FOUND, "JOB_UNKNOWN"),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE"),
        (grpc.StatusCode.INTERNAL, "INTERNAL"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ""),
        (grpc.StatusCode.UNIMPLEMENTED, ""),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
    ],
)
def test_an_answer_that_will_not_change_is_final(
    server: Server, client: Client, clock: FakeClock, code: grpc.StatusCode, reason: str
) -> None:
    got = start(lambda: client.get(JOB_ID))
    server.refuse("GetJob", code, reason=reason)
    with pytest.raises(CallFailed) as caught:
        got.result(10)
    assert (caught.value.code, caught.value.reason) == (code.name, reason)
    assert clock.slept == []


def test_the_error_says_all_that_the_service_said(server: Server, client: Client) -> None:
    got = start(lambda: client.submit("x", {}))
    server.refuse(
        "SubmitJob",
        grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_FIELD",
        metadata={"k": "v"},
        violations={"queue": "too long", 'labels["x"]': "empty"},
    )
    with pytest.raises(CallFailed) as caught:
        got.result(10)
    failed = caught.value
    assert str(failed) == "INVALID_ARGUMENT INVALID_FIELD: no"
    assert failed.message == "no"
    assert failed.metadata == {"k": "v"}
    assert failed.violations == (Violation("queue", "too long"), Violation('labels["x"]', "empty"))


def test_all_tries_together_keep_the_deadline(
    server: Server, client: Client, clock: FakeClock
) -> None:
    got = start(lambda: client.get(JOB_ID))
    for _ in range(7):  # 0.1 + 0.2 + ... + 3.2 = 6.3 s; 6.4 s more would be too late
        server.refuse("GetJob", UNAVAILABLE)
    with pytest.raises(CallFailed, match="UNAVAILABLE"):
        got.result(10)
    assert clock.now - 1000 == pytest.approx(6.3)


def test_a_submit_is_the_same_submit_however_often_it_is_sent(
    server: Server, client: Client
) -> None:
    got = start(lambda: client.submit("x", {"a": 1}))
    first = server.refuse("SubmitJob", UNAVAILABLE)
    metadata, second, rpc = server.take("SubmitJob")
    job = Job(job_id=JOB_ID, idempotency_key=second.idempotency_key)
    rpc.terminate(SubmitJobResponse(job=job, already_existed=True), (), grpc.StatusCode.OK, "")
    answer = got.result(10)
    assert first == second
    assert len(first.idempotency_key) == 36
    assert ("authorization", "Bearer t0ken") in metadata
    assert answer.job.job_id == JOB_ID
    assert not answer.already_existed  # the earlier try was our own


def test_the_callers_key_is_kept(server: Server, client: Client) -> None:
    got = start(lambda: client.submit("x", {}, idempotency_key="mine"))
    answer = SubmitJobResponse(job=Job(idempotency_key="mine"), already_existed=True)
    assert server.answer("SubmitJob", answer).idempotency_key == "mine"
    assert got.result(10).already_existed


def test_two_submits_are_two_jobs(server: Server, client: Client) -> None:
    keys = set()
    for _ in range(2):
        got = start(lambda: client.submit("x"))
        keys.add(server.answer("SubmitJob", SubmitJobResponse()).idempotency_key)
        got.result(10)
    assert len(keys) == 2


def test_each_of_many_has_a_key(server: Server, client: Client) -> None:
    requests = [new_job("x"), new_job("x", idempotency_key="mine"), new_job("x")]
    got = start(lambda: client.submit_many(requests))
    server.refuse("SubmitJobs", UNAVAILABLE)
    _, sent, rpc = server.take("SubmitJobs")
    keys = [request.idempotency_key for request in sent.requests]
    answers = [
        SubmitJobResponse(job=Job(idempotency_key=key), already_existed=True) for key in keys
    ]
    rpc.terminate(SubmitJobsResponse(responses=answers), (), grpc.StatusCode.OK, "")
    assert [answer.already_existed for answer in got.result(10)] == [False, True, False]
    assert len(set(keys)) == 3
    assert keys[1] == "mine"
    assert requests[0].idempotency_key == ""


def test_a_cancel_is_tried_again(server: Server, client: Client) -> None:
    got = start(lambda: client.cancel(JOB_ID, "why"))
    server.refuse("CancelJob", UNAVAILABLE)
    request = server.answer("CancelJob", CancelJobResponse(job=Job(job_id=JOB_ID)))
    assert (request.job_id, request.reason) == (JOB_ID, "why")
    assert got.result(10).job_id == JOB_ID


def test_a_second_try_waits_for_what_is_left(
    server: Server, client: Client, clock: FakeClock
) -> None:
    got = start(lambda: client.result(JOB_ID, wait=50))
    _, request, rpc = server.take("GetResult")
    assert request.wait.seconds == 50
    clock.now += 45
    rpc.terminate(None, (), UNAVAILABLE, "no")
    request = server.answer("GetResult", GetResultResponse(state=job_pb2.JOB_STATE_RUNNING))
    assert request.wait.ToTimedelta().total_seconds() == pytest.approx(4.9)
    assert got.result(10).state == job_pb2.JOB_STATE_RUNNING


def test_waiting_goes_on_until_the_end(server: Server, client: Client) -> None:
    got = start(lambda: client.wait(JOB_ID))
    running = GetResultResponse(state=job_pb2.JOB_STATE_RUNNING)
    assert server.answer("GetResult", running).wait.seconds == 50
    server.answer("GetResult", GetResultResponse(state=job_pb2.JOB_STATE_FAILED))
    assert got.result(10).state == job_pb2.JOB_STATE_FAILED


def test_waiting_has_an_end(server: Server, client: Client, clock: FakeClock) -> None:
    got = start(lambda: client.wait(JOB_ID, timeout=60))
    running = GetResultResponse(state=job_pb2.JOB_STATE_RUNNING)
    for expected in (50, 10):
        _, request, rpc = server.take("GetResult")
        assert request.wait.seconds == expected
        clock.now += expected
        rpc.terminate(running, (), grpc.StatusCode.OK, "")
    with pytest.raises(TimeoutError):
        got.result(10)


def test_a_history_is_read_page_by_page(server: Server, client: Client) -> None:
    got = start(lambda: [e.sequence for e in client.events(JOB_ID, 2)])
    page = ListJobEventsResponse(events=[event(3), event(4)], next_after_sequence=4)
    assert server.answer("ListJobEvents", page).after_sequence == 2
    rest = ListJobEventsResponse(events=[event(5)])
    assert server.answer("ListJobEvents", rest).after_sequence == 4
    assert got.result(10) == [3, 4, 5]
