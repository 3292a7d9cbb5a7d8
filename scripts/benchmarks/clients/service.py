"""Of this service, and of the bare echo of its messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
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
from scripts.benchmarks.clients.loops import obey
from scripts.benchmarks.orders import PAYLOAD, Done, Order, go, tell

JOB_TYPE = "demo.echo"
WATCH_CHANNELS = 10
TALK_LINES = 30
FLEET_BULK = 500


def main(order: Order) -> None:
    uvloop.run(_run(order))


async def _run(order: Order) -> None:
    async with new_channel(order.address) as channel:
        stub: Any = JobServiceStub(channel)
        if kind := _KINDS.get(order.kind):
            await kind(order, stub)
        else:
            await obey(order, _Client(stub))


def new_channel(address: str) -> grpc.aio.Channel:
    """With a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    return grpc.aio.insecure_channel(address, options=options)


def plain_request() -> pb.SubmitJobRequest:
    return new_job(JOB_TYPE, PAYLOAD)


class _Client:
    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self._request = plain_request()
        self._many = pb.SubmitJobsRequest()

    async def submit(self) -> str:
        return str((await self._stub.SubmitJob(self._request)).job.job_id)

    async def submit_bulk(self, count: int) -> None:
        if len(self._many.requests) != count:
            self._many = pb.SubmitJobsRequest(requests=[self._request] * count)
        await self._stub.SubmitJobs(self._many)

    async def follow(self, done: Done) -> None:
        began = time.monotonic()
        async for message in self._stub.RunJob(pb.RunJobRequest(request=self._request)):
            if message.event.type == JOB_EVENT_TYPE_STARTED:
                done.to_start.append(time.monotonic() - began)
            elif message.event.type == JOB_EVENT_TYPE_SUCCEEDED:
                done.to_done.append(time.monotonic() - began)


async def _watch(order: Order, stub: Any) -> None:
    """A tenth of the watchers comes before the start, so that what is paid once is paid then."""
    before = order.count // 10
    request = plain_request()
    request.delay.CopyFrom(Duration(seconds=3600))
    ids: list[str] = []
    while len(ids) < before + order.count:
        answer = await stub.SubmitJobs(pb.SubmitJobsRequest(requests=[request] * 100))
        ids += [response.job.job_id for response in answer.responses]
    channels = [new_channel(order.address) for _ in range(WATCH_CHANNELS)]
    stubs: list[Any] = [JobServiceStub(channel) for channel in channels]
    calls = []

    async def begin(number: int) -> None:
        call = stubs[number % WATCH_CHANNELS].WatchJob(pb.WatchJobRequest(job_id=ids[number]))
        await call.read()
        calls.append(call)

    await asyncio.gather(*map(begin, range(before)))
    done = go()
    await asyncio.gather(*map(begin, range(before, before + order.count)))
    done.count = order.count
    await asyncio.to_thread(tell, done)


async def _fan_out(order: Order, stub: Any) -> None:
    """All watch one job that waits; then it is let go, and tells all of them everything."""
    request = new_job("bench.talk", {"lines": TALK_LINES})
    request.delay.CopyFrom(Duration(seconds=3600))
    job_id = (await stub.SubmitJob(request)).job.job_id
    channels = [new_channel(order.address) for _ in range(WATCH_CHANNELS)]
    stubs: list[Any] = [JobServiceStub(channel) for channel in channels]
    calls = [
        stubs[number % WATCH_CHANNELS].WatchJob(pb.WatchJobRequest(job_id=job_id))
        for number in range(order.count)
    ]
    for call in calls:
        await call.read()  # SUBMITTED
    done = go()
    let_go = pb.UpdateJobRequest(job_id=job_id, schedule_time=Timestamp())
    let_go.update_mask.paths.append("schedule_time")
    await stub.UpdateJob(let_go)
    done.count = sum(await asyncio.gather(*map(read_all, calls)))
    tell(done)


async def read_all(call: Any) -> int:
    count = 0
    while await call.read() is not grpc.aio.EOF:
        count += 1
    return count


async def _follow_fleet(order: Order, stub: Any) -> None:
    """The events of jobs that were submitted while the watcher was away."""
    watch = stub.WatchJobs(pb.WatchJobsRequest())
    token = (await watch.read()).resume_token
    watch.cancel()
    many = pb.SubmitJobsRequest(requests=[plain_request()] * FLEET_BULK)
    for _ in range(0, order.count, FLEET_BULK):
        await stub.SubmitJobs(many)
    done = go()
    watch = stub.WatchJobs(pb.WatchJobsRequest(resume_token=token))
    with suppress(TimeoutError):
        async with asyncio.timeout(order.seconds):
            while done.count < order.count:
                done.count += (await watch.read()).HasField("event")
    watch.cancel()
    tell(done)


async def _list(order: Order, stub: Any) -> None:
    wanted = text_format.Parse(order.filter, JobFilter())
    request = pb.ListJobsRequest(filter=wanted)
    await stub.ListJobs(request)
    done = go()
    for _ in range(order.count):
        began = time.monotonic()
        await stub.ListJobs(request)
        done.to_done.append(time.monotonic() - began)
    done.count = order.count
    tell(done)


_KINDS: Mapping[str, Callable[[Order, Any], Awaitable[None]]] = {
    "watchers": _watch,
    "fanout": _fan_out,
    "fleet": _follow_fleet,
    "list": _list,
}
