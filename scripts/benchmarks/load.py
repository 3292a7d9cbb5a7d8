"""A client in a process of its own: `python -m scripts.benchmarks.load ORDER`, an Order as JSON.

It connects and warms up, writes `up`, waits for a line, does what was ordered, writes a Done as
JSON, and stays until its input is closed. Times are CLOCK_MONOTONIC, the same in all processes.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import grpc.aio
import uvloop
from google.protobuf import text_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from generated.jobsvc.v1 import job_service_pb2 as pb
from generated.jobsvc.v1.job_pb2 import JOB_EVENT_TYPE_STARTED, JOB_EVENT_TYPE_SUCCEEDED, JobFilter
from generated.jobsvc.v1.job_service_pb2_grpc import JobServiceStub
from jobsvc.client import new_job
from scripts.benchmarks.echo import METHOD, REPEAT

PAYLOAD = {"to": "somebody@example.com", "subject": "A benchmark", "number": 42, "text": "x" * 100}
JOB_TYPE = "demo.echo"
WARM_UP_SECONDS = 0.5
WATCH_CHANNELS = 10
TALK_LINES = 30
BULK = 500
EVENT_BYTES = 150  # of a WatchJobs message, about
# How often a Celery client asks the database; it would by default every 500 ms.
CELERY_POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Order:
    """`kind`: submit (for `seconds`, `bulk` jobs a call), latency (`count` jobs one after the
    other), watchers (`count` of idle jobs), fanout (`count` watchers of one job that has much to
    say), fleet (one watcher of `count` jobs), or list (`count` pages by `filter`, a JobFilter in
    text form). `side`: jobsvc, echo or celery."""

    kind: str
    side: str
    address: str = ""
    in_flight: int = 1
    bulk: int = 1
    seconds: float = 1.0
    count: int = 0
    filter: str = ""


@dataclass(slots=True)
class Done:
    warmed_up: int = 0  # jobs before the start
    count: int = 0
    began: float = 0.0
    ended: float = 0.0
    cpu_seconds: float = 0.0
    to_start: list[float] = field(default_factory=list)  # seconds, of each job
    to_done: list[float] = field(default_factory=list)


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    if order.side == "celery":
        _celery(order)
    else:
        uvloop.run(_grpc(order))


def _go(warmed_up: int = 0) -> Done:
    """Returns when all clients are to begin."""
    print("up", flush=True)
    sys.stdin.readline()
    return Done(warmed_up, began=time.monotonic(), cpu_seconds=-_cpu_seconds())


def _tell(done: Done) -> None:
    done.ended = time.monotonic()
    done.cpu_seconds += _cpu_seconds()
    print(json.dumps(asdict(done)), flush=True)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# gRPC: an event loop with so many tasks.


async def _grpc(order: Order) -> None:
    async with _channel(order.address) as channel:
        if order.kind == "submit":
            await _submit_for(order, _caller(order, channel))
        elif order.side == "echo":
            await _read_echoes(order, channel)
        else:
            await KINDS[order.kind](order, JobServiceStub(channel))


def _channel(address: str) -> grpc.aio.Channel:
    """With a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    return grpc.aio.insecure_channel(address, options=options)


def _caller(order: Order, channel: grpc.aio.Channel) -> Callable[[], Awaitable[Any]]:
    """Makes one call, and takes its answer apart."""
    request = new_job(JOB_TYPE, PAYLOAD)
    if order.side == "echo":
        echo: Any = channel.unary_unary(
            METHOD, pb.SubmitJobRequest.SerializeToString, pb.SubmitJobRequest.FromString
        )
        return lambda: echo(request)
    stub: Any = JobServiceStub(channel)
    if order.bulk == 1:
        return lambda: stub.SubmitJob(request)
    many = pb.SubmitJobsRequest(requests=[request] * order.bulk)
    return lambda: stub.SubmitJobs(many)


async def _submit_for(order: Order, call: Callable[[], Awaitable[Any]]) -> None:
    async def repeat(until: float) -> int:
        count = 0
        while time.monotonic() < until:
            await call()
            count += order.bulk
        return count

    async def all_for(seconds: float) -> int:
        until = time.monotonic() + seconds
        return sum(await asyncio.gather(*(repeat(until) for _ in range(order.in_flight))))

    done = _go(await all_for(WARM_UP_SECONDS))
    done.count = await all_for(order.seconds)
    _tell(done)


async def _run_jobs(order: Order, stub: Any) -> None:
    request = pb.RunJobRequest(request=new_job(JOB_TYPE, PAYLOAD))

    async def run(done: Done) -> None:
        began = time.monotonic()
        async for message in stub.RunJob(request):
            if message.event.type == JOB_EVENT_TYPE_STARTED:
                done.to_start.append(time.monotonic() - began)
            elif message.event.type == JOB_EVENT_TYPE_SUCCEEDED:
                done.to_done.append(time.monotonic() - began)

    for _ in range(10):
        await run(Done())
    done = _go()
    for _ in range(order.count):
        await run(done)
        await asyncio.sleep(0.01)
    _tell(done)


async def _watch(order: Order, stub: Any) -> None:
    """A tenth of the watchers comes before the start, so that what is paid once is paid then."""
    before = order.count // 10
    request = new_job(JOB_TYPE, PAYLOAD)
    request.delay.CopyFrom(Duration(seconds=3600))
    ids: list[str] = []
    while len(ids) < before + order.count:
        answer = await stub.SubmitJobs(pb.SubmitJobsRequest(requests=[request] * 100))
        ids += [response.job.job_id for response in answer.responses]
    channels = [_channel(order.address) for _ in range(WATCH_CHANNELS)]
    stubs: list[Any] = [JobServiceStub(channel) for channel in channels]
    calls = []

    async def begin(number: int) -> None:
        call = stubs[number % WATCH_CHANNELS].WatchJob(pb.WatchJobRequest(job_id=ids[number]))
        await call.read()
        calls.append(call)

    await asyncio.gather(*map(begin, range(before)))
    done = _go()
    await asyncio.gather(*map(begin, range(before, before + order.count)))
    done.count = order.count
    _tell(done)
    await asyncio.to_thread(sys.stdin.read)


async def _fan_out(order: Order, stub: Any) -> None:
    """All watch one job that waits; then it is let go, and tells all of them everything."""
    request = new_job("bench.talk", {"lines": TALK_LINES})
    request.delay.CopyFrom(Duration(seconds=3600))
    job_id = (await stub.SubmitJob(request)).job.job_id
    channels = [_channel(order.address) for _ in range(WATCH_CHANNELS)]
    stubs: list[Any] = [JobServiceStub(channel) for channel in channels]
    calls = [
        stubs[number % WATCH_CHANNELS].WatchJob(pb.WatchJobRequest(job_id=job_id))
        for number in range(order.count)
    ]
    for call in calls:
        await call.read()  # SUBMITTED
    done = _go()
    let_go = pb.UpdateJobRequest(job_id=job_id, schedule_time=Timestamp())
    let_go.update_mask.paths.append("schedule_time")
    await stub.UpdateJob(let_go)
    done.count = sum(await asyncio.gather(*map(_read_all, calls)))
    _tell(done)


async def _read_all(call: Any) -> int:
    count = 0
    while await call.read() is not grpc.aio.EOF:
        count += 1
    return count


async def _follow_fleet(order: Order, stub: Any) -> None:
    """The events of jobs that were submitted while the watcher was away."""
    watch = stub.WatchJobs(pb.WatchJobsRequest())
    token = (await watch.read()).resume_token
    watch.cancel()
    many = pb.SubmitJobsRequest(requests=[new_job(JOB_TYPE, PAYLOAD)] * BULK)
    for _ in range(0, order.count, BULK):
        await stub.SubmitJobs(many)
    done = _go()
    watch = stub.WatchJobs(pb.WatchJobsRequest(resume_token=token))
    while done.count < order.count:
        done.count += (await watch.read()).HasField("event")
    watch.cancel()
    _tell(done)


async def _read_echoes(order: Order, channel: grpc.aio.Channel) -> None:
    """The same count of messages, of the same size, that nobody had to find."""
    streams = order.count if order.kind == "fanout" else 1
    each = TALK_LINES if order.kind == "fanout" else order.count
    channels = [_channel(order.address) for _ in range(min(WATCH_CHANNELS, streams))]
    done = _go()
    stubs: list[Any] = [channel.unary_stream(REPEAT) for channel in channels]
    wanted = f"{each} {EVENT_BYTES}".encode()
    calls = [stubs[number % len(stubs)](wanted) for number in range(streams)]
    done.count = sum(await asyncio.gather(*map(_read_all, calls)))
    _tell(done)


async def _list(order: Order, stub: Any) -> None:
    wanted = text_format.Parse(order.filter, JobFilter())
    request = pb.ListJobsRequest(filter=wanted)
    await stub.ListJobs(request)
    done = _go()
    for _ in range(order.count):
        began = time.monotonic()
        page = await stub.ListJobs(request)
        done.to_done.append(time.monotonic() - began)
        done.count += len(page.jobs)
    _tell(done)


KINDS: Mapping[str, Callable[[Order, Any], Awaitable[None]]] = {
    "latency": _run_jobs,
    "watchers": _watch,
    "fanout": _fan_out,
    "fleet": _follow_fleet,
    "list": _list,
}


# Celery: so many threads.


def _celery(order: Order) -> None:
    from scripts.benchmarks.celery_app import app, echo

    if order.kind == "latency":
        _run_tasks(order, echo)
    else:
        _publish_for(order, app, echo)


def _publish_for(order: Order, app: Any, echo: Any) -> None:
    def publish() -> None:
        if order.bulk == 1:
            echo.apply_async((PAYLOAD,))
            return
        with app.producer_pool.acquire(block=True) as producer:
            for _ in range(order.bulk):
                echo.apply_async((PAYLOAD,), producer=producer)

    def all_for(seconds: float) -> int:
        until = time.monotonic() + seconds
        counts = [0] * order.in_flight

        def repeat(number: int) -> None:
            while time.monotonic() < until:
                publish()
                counts[number] += order.bulk

        list(pool.map(repeat, range(order.in_flight)))
        return sum(counts)

    # The same threads for all: Celery makes its result backend anew in each, which is slow.
    pool = ThreadPoolExecutor(order.in_flight)
    done = _go(all_for(WARM_UP_SECONDS))
    done.count = all_for(order.seconds)
    _tell(done)


def _run_tasks(order: Order, echo: Any) -> None:
    def run(done: Done) -> None:
        began = time.monotonic()
        result = echo.apply_async((PAYLOAD,))
        while result.state == "PENDING":
            time.sleep(CELERY_POLL_SECONDS)
        done.to_start.append(time.monotonic() - began)
        result.get(interval=CELERY_POLL_SECONDS)
        done.to_done.append(time.monotonic() - began)

    for _ in range(10):
        run(Done())
    done = _go()
    for _ in range(order.count):
        run(done)
        time.sleep(0.01)
    _tell(done)


if __name__ == "__main__":
    main()
