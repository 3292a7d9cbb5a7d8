"""Streams that break, fall silent and are resumed."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import grpc
import pytest

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1.job_pb2 import Heartbeat, JobEvent
from generated.jobsvc.v1.job_service_pb2 import (
    GetResultResponse,
    RunJobResponse,
    WatchJobResponse,
)
from jobsvc.client import CallFailed, Client
from jobsvc.client.clock import Watchdog
from tests.unit.client.fakes import JOB_ID, FakeClock, Server, break_off, event, last, start

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
HEARTBEAT = WatchJobResponse(heartbeat=Heartbeat(last_sequence=1))


class Follower:
    """Reads a stream on a thread: `heard` fills as it goes."""

    def __init__(self, messages: Iterator[Any]) -> None:
        self.heard: queue.Queue[Any] = queue.Queue()
        self.sequences: list[int] = []
        self.end = start(lambda: self._read(messages))

    def _read(self, messages: Iterator[Any]) -> list[int]:
        for message in messages:
            if isinstance(message, JobEvent):
                self.sequences.append(message.sequence)
            self.heard.put(message)
        return self.sequences


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def client(server: Server, clock: FakeClock) -> Client:
    return Client(channel=server.channel, clock=clock, random=lambda: 1.0, outage=60)


def send(rpc: Any, *events: JobEvent) -> None:
    for one in events:
        rpc.send_response(WatchJobResponse(event=one))


def end(rpc: Any) -> None:
    rpc.terminate((), grpc.StatusCode.OK, "")


def deliver(follower: Follower, rpc: Any, *events: JobEvent) -> None:
    """Sends events and waits until the client has handed them on: the fake channel forgets what
    is unread when a stream breaks."""
    for one in events:
        send(rpc, one)
        assert follower.heard.get(timeout=10) == one


def test_a_stream_is_followed_to_its_end(server: Server, client: Client) -> None:
    follower = Follower(client.watch(JOB_ID, heartbeat_interval=2))
    request, rpc = server.take_stream("WatchJob")
    assert (request.job_id, request.after_sequence) == (JOB_ID, 0)
    assert request.heartbeat_interval.seconds == 2
    send(rpc, event(1), event(2))
    rpc.send_response(HEARTBEAT)
    rpc.send_response(WatchJobResponse())  # of a kind that a later release knows
    send(rpc, last(3))
    end(rpc)
    assert follower.end.result(10) == [1, 2, 3]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (UNAVAILABLE, "STREAM_EXPIRED"),
        (UNAVAILABLE, ""),
        (grpc.StatusCode.ABORTED, "WATCHER_TOO_SLOW"),
        (grpc.StatusCode.INTERNAL, ""),
        (grpc.StatusCode.UNKNOWN, ""),
        (grpc.StatusCode.CANCELLED, ""),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ""),
    ],
)
def test_a_broken_stream_goes_on_where_it_stood(
    server: Server, client: Client, clock: FakeClock, code: grpc.StatusCode, reason: str
) -> None:
    follower = Follower(client.watch(JOB_ID, 4))
    request, rpc = server.take_stream("WatchJob")
    assert request.after_sequence == 4
    deliver(follower, rpc, event(5), event(6))
    break_off(rpc, code, reason=reason)
    request, rpc = server.take_stream("WatchJob")
    assert request.after_sequence == 6
    send(rpc, event(7), last(8))
    end(rpc)
    assert follower.end.result(10) == [5, 6, 7, 8]
    assert clock.slept == pytest.approx([0.1])


def test_the_server_says_when_to_come_back(
    server: Server, client: Client, clock: FakeClock
) -> None:
    follower = Follower(client.watch(JOB_ID))
    _, rpc = server.take_stream("WatchJob")
    break_off(rpc, grpc.StatusCode.RESOURCE_EXHAUSTED, reason="LIMIT_REACHED", retry=3)
    _, rpc = server.take_stream("WatchJob")
    send(rpc, last(1))
    end(rpc)
    assert follower.end.result(10) == [1]
    assert clock.slept == pytest.approx([3.1])


def test_what_was_seen_is_not_told_twice(server: Server, client: Client) -> None:
    follower = Follower(client.watch(JOB_ID))
    _, rpc = server.take_stream("WatchJob")
    send(rpc, event(1), event(1), event(2), event(1), event(2), last(3), last(3))
    end(rpc)
    assert follower.end.result(10) == [1, 2, 3]


def test_a_gap_is_an_error_and_no_gap(server: Server, client: Client) -> None:
    follower = Follower(client.watch(JOB_ID))
    _, rpc = server.take_stream("WatchJob")
    send(rpc, event(1), event(3))
    with pytest.raises(CallFailed, match="DATA_LOSS: event 3"):
        follower.end.result(10)
    assert follower.sequences == [1]
    rpc.cancelled()


def test_a_stream_that_ends_too_soon_is_resumed(server: Server, client: Client) -> None:
    follower = Follower(client.watch(JOB_ID))
    _, rpc = server.take_stream("WatchJob")
    send(rpc, event(1))
    end(rpc)
    request, rpc = server.take_stream("WatchJob")
    assert request.after_sequence == 1
    send(rpc, last(2))
    end(rpc)
    assert follower.end.result(10) == [1, 2]


def test_nothing_to_tell_is_an_end(server: Server, client: Client) -> None:
    follower = Follower(client.watch(JOB_ID, 3))
    _, rpc = server.take_stream("WatchJob")
    end(rpc)
    assert follower.end.result(10) == []


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OUT_OF_RANGE])
def test_what_cannot_be_resumed_is_an_error(
    server: Server, client: Client, clock: FakeClock, code: grpc.StatusCode
) -> None:
    follower = Follower(client.watch(JOB_ID))
    _, rpc = server.take_stream("WatchJob")
    deliver(follower, rpc, event(1))
    break_off(rpc, code, reason="R")
    with pytest.raises(CallFailed, match=code.name):
        follower.end.result(10)
    assert clock.slept == []


def test_an_address_where_nobody_answers_is_soon_reported(
    server: Server, client: Client, clock: FakeClock
) -> None:
    follower = Follower(client.watch(JOB_ID))
    for _ in range(7):
        break_off(server.take_stream("WatchJob")[1], UNAVAILABLE)
    with pytest.raises(CallFailed):
        follower.end.result(10)
    assert clock.now - 1000 == pytest.approx(6.3)


def test_an_outage_is_ridden_out_up_to_its_limit(
    server: Server, client: Client, clock: FakeClock
) -> None:
    follower = Follower(client.watch(JOB_ID))
    _, rpc = server.take_stream("WatchJob")
    deliver(follower, rpc, event(1))
    break_off(rpc, UNAVAILABLE)
    # 0.1 + ... + 6.4 + 10 + 10 + 10 + 10 = 52.7 s; 10 s more would be over 60.
    for _ in range(11):
        break_off(server.take_stream("WatchJob")[1], UNAVAILABLE)
    with pytest.raises(CallFailed):
        follower.end.result(10)
    assert clock.now - 1000 == pytest.approx(52.7)


def test_a_stream_that_never_speaks_is_opened_again(
    server: Server, client: Client, clock: FakeClock
) -> None:
    follower = Follower(client.watch(JOB_ID))
    _, rpc = server.take_stream("WatchJob")
    clock.await_timer()
    clock.advance(9.8)
    assert not follower.end.done()
    send(rpc, event(1))  # in time
    assert follower.heard.get(timeout=10) == event(1)
    _fall_silent(clock, rpc)
    request, rpc = server.take_stream("WatchJob")
    assert request.after_sequence == 1
    send(rpc, last(2))
    end(rpc)
    assert follower.end.result(10) == [1, 2]


def _fall_silent(clock: FakeClock, rpc: Any) -> None:
    """Lets time go by until the client gives the stream up."""
    gone = start(rpc.cancelled)
    for _ in range(100):
        clock.advance(1)
        if wait([gone], timeout=0.02).done:
            return
    raise AssertionError("a silent stream was kept")


def test_silence_is_three_heartbeats_long() -> None:
    clock = FakeClock()
    cancelled: list[float] = []
    watchdog = Watchdog(clock, lambda: cancelled.append(clock.now))
    watchdog.start(45)
    clock.advance(44)
    watchdog.pause()
    watchdog.start(45)  # a heartbeat came
    clock.advance(44.5)
    assert cancelled == []
    assert len(clock.timers) == 1
    clock.advance(0.5)
    assert cancelled == [1089.0]
    assert watchdog.fired
    assert clock.timers == []


def test_a_slow_reader_is_no_silence() -> None:
    clock = FakeClock()
    watchdog = Watchdog(clock, lambda: pytest.fail("cancelled"))
    watchdog.start(1)
    watchdog.pause()
    clock.advance(100)
    watchdog.start(1)
    clock.advance(0.9)
    watchdog.stop()
    clock.advance(100)
    assert not watchdog.fired
    assert clock.timers == []


def test_a_stream_lives_on_while_its_reader_is_busy(
    server: Server, client: Client, clock: FakeClock
) -> None:
    messages = client.watch(JOB_ID)
    first = start(lambda: next(messages))
    _, rpc = server.take_stream("WatchJob")
    send(rpc, event(1))
    assert first.result(10) == event(1)
    clock.advance(1000)
    send(rpc, last(2))
    assert start(lambda: next(messages)).result(10) == last(2)
    assert clock.slept == []


def test_a_stream_that_got_on_starts_the_backoff_anew(
    server: Server, client: Client, clock: FakeClock
) -> None:
    follower = Follower(client.watch(JOB_ID))
    for sequence in (1, 2):
        break_off(server.take_stream("WatchJob")[1], UNAVAILABLE)
        _, rpc = server.take_stream("WatchJob")
        deliver(follower, rpc, event(sequence))
        break_off(rpc, UNAVAILABLE)
    _, rpc = server.take_stream("WatchJob")
    send(rpc, last(3))
    end(rpc)
    assert follower.end.result(10) == [1, 2, 3]
    assert clock.slept == pytest.approx([0.1, 0.1, 0.2, 0.1])


def test_leaving_off_ends_the_stream(server: Server, client: Client, clock: FakeClock) -> None:
    messages = client.watch(JOB_ID)
    first = start(lambda: next(iter(messages)))
    _, rpc = server.take_stream("WatchJob")
    send(rpc, event(1))
    assert first.result(10) == event(1)
    messages.close()  # type: ignore[attr-defined]
    rpc.cancelled()
    assert clock.timers == []


def run_event(one: JobEvent) -> RunJobResponse:
    return RunJobResponse(event=one)


def test_a_run_ends_with_its_result(server: Server, client: Client) -> None:
    follower = Follower(client.run("x", {"a": 1}, queue="q"))
    request, rpc = server.take_stream("RunJob")
    assert (request.request.job_type, request.request.queue) == ("x", "q")
    rpc.send_response(run_event(event(1)))
    rpc.send_response(RunJobResponse(heartbeat=Heartbeat()))
    rpc.send_response(run_event(last(2)))
    result = GetResultResponse(job_id=JOB_ID, state=job_pb2.JOB_STATE_SUCCEEDED)
    rpc.send_response(RunJobResponse(result=result))
    end(rpc)
    assert follower.end.result(10) == [1, 2]
    assert list(follower.heard.queue)[-1] == result


def test_a_run_that_broke_before_it_began_is_the_same_run(server: Server, client: Client) -> None:
    follower = Follower(client.run("x"))
    first, rpc = server.take_stream("RunJob")
    break_off(rpc, UNAVAILABLE)
    second, rpc = server.take_stream("RunJob")
    assert first == second
    assert first.request.idempotency_key
    rpc.send_response(RunJobResponse(result=GetResultResponse(job_id=JOB_ID)))
    end(rpc)
    assert follower.end.result(10) == []


def test_a_run_that_broke_is_followed_by_watching(server: Server, client: Client) -> None:
    follower = Follower(client.run("x"))
    _, rpc = server.take_stream("RunJob")
    rpc.send_response(run_event(event(1)))
    assert follower.heard.get(timeout=10) == event(1)
    break_off(rpc, UNAVAILABLE, reason="DRAINING")
    request, rpc = server.take_stream("WatchJob")
    assert (request.job_id, request.after_sequence) == (JOB_ID, 1)
    send(rpc, last(2))
    end(rpc)
    result = GetResultResponse(job_id=JOB_ID, state=job_pb2.JOB_STATE_SUCCEEDED)
    server.answer("GetResult", result)
    assert follower.end.result(10) == [1, 2]
    assert list(follower.heard.queue)[-1] == result
