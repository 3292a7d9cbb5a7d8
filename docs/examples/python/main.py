"""Submits a job once, follows it over every broken connection, and prints how it ended.

  pip install grpcio grpcio-tools
  python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. protos/jobsvc/v1/*.proto
  python main.py demo.sleep '{"seconds": 5, "steps": 5}' order-17

Where this repository is installed, `jobsvc.client.Client` does all of this and more.
"""

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from jobsvc.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc

ADDRESS = os.environ.get("JOBSVC_ADDRESS", "127.0.0.1:50051")
TOKEN = os.environ.get("JOBSVC_TOKEN")
TLS_CA = os.environ.get("JOBSVC_TLS_CA")  # a PEM file; turns TLS on
HEARTBEAT_SECONDS = int(os.environ.get("HEARTBEAT_SECONDS", "15"))

METADATA = [("authorization", f"Bearer {TOKEN}")] if TOKEN else []
# The server went away, sent us away for reading too slowly, stopped, or did not answer in time.
TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


def open_channel() -> grpc.aio.Channel:
    options = [("grpc.max_reconnect_backoff_ms", 10_000)]
    if TLS_CA:
        credentials = grpc.ssl_channel_credentials(Path(TLS_CA).read_bytes())
        return grpc.aio.secure_channel(ADDRESS, credentials, options)
    return grpc.aio.insecure_channel(ADDRESS, options)


def backoff() -> Iterator[float]:
    """Seconds to wait: random, up to a bound that doubles from 0.2 s to 10 s."""
    bound = 0.2
    while True:
        yield random.uniform(0, bound)
        bound = min(2 * bound, 10)


async def insist(call: Callable[..., Awaitable[Any]], request: Any) -> Any:
    """Calls until there is an answer. SubmitJob too: its key makes that safe."""
    waits = backoff()
    while True:
        try:
            return await call(request, timeout=10, metadata=METADATA)
        except grpc.aio.AioRpcError as error:
            if error.code() not in TRANSIENT:
                raise
            print(f"{error.details()}; trying again", file=sys.stderr)
        await asyncio.sleep(next(waits))


async def watch(stub: Any, job_id: str) -> AsyncIterator[Any]:
    """Every event once and in order, until the job has ended."""
    request = job_service_pb2.WatchJobRequest(job_id=job_id)
    request.heartbeat_interval.FromSeconds(HEARTBEAT_SECONDS)
    waits = backoff()
    while True:
        call = stub.WatchJob(request, metadata=METADATA)
        try:
            while True:
                message = await asyncio.wait_for(call.read(), 3 * HEARTBEAT_SECONDS)
                if message is grpc.aio.EOF:
                    return
                if message.WhichOneof("message") == "event":
                    request.after_sequence = message.event.sequence
                    waits = backoff()
                    yield message.event
        except grpc.aio.AioRpcError as error:
            if error.code() not in TRANSIENT:
                raise
            why = error.details()
        except TimeoutError:
            why = "not even a heartbeat"
        finally:
            call.cancel()
        print(f"{why}; resuming after {request.after_sequence}", file=sys.stderr)
        await asyncio.sleep(next(waits))


def short(enum: Any, number: int) -> str:
    """JOB_STATE_RUNNING is RUNNING; a number that this program does not know stays one."""
    prefix = {job_pb2.JobState: "JOB_STATE_", job_pb2.JobEventType: "JOB_EVENT_TYPE_"}[enum]
    return enum.Name(number).removeprefix(prefix) if number in enum.values() else str(number)


async def main(job_type: str, payload: str, key: str) -> None:
    async with open_channel() as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        # A key says what the job is for, so that whoever asks again gets the same job.
        submit = job_service_pb2.SubmitJobRequest(job_type=job_type, idempotency_key=key)
        json_format.Parse(payload, submit.payload)
        job = (await insist(stub.SubmitJob, submit)).job
        print("job", job.job_id, flush=True)
        async for event in watch(stub, job.job_id):
            kind = short(job_pb2.JobEventType, event.type)
            print(event.sequence, kind, short(job_pb2.JobState, event.state), flush=True)
        request = job_service_pb2.GetResultRequest(job_id=job.job_id)
        answer = await insist(stub.GetResult, request)
        outcome = answer.WhichOneof("outcome")
        print(outcome, json_format.MessageToJson(getattr(answer, outcome), indent=None))
        sys.exit(0 if answer.state == job_pb2.JOB_STATE_SUCCEEDED else 1)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: main.py JOB_TYPE PAYLOAD KEY")
    try:
        asyncio.run(main(*sys.argv[1:]))
    except grpc.aio.AioRpcError as error:
        sys.exit(f"{error.code().name}: {error.details()}")
