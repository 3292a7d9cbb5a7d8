"""Of the bare echo of this service's messages."""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop

from generated.jobsvc.v1 import job_service_pb2 as pb
from scripts.benchmarks.clients.loops import submit_for
from scripts.benchmarks.clients.service import (
    TALK_LINES,
    WATCH_CHANNELS,
    new_channel,
    plain_request,
    read_all,
)
from scripts.benchmarks.echo_server import METHOD, REPEAT
from scripts.benchmarks.orders import Order, go, tell

EVENT_BYTES = 150  # of a WatchJobs message, about


def main(order: Order) -> None:
    uvloop.run(_submit(order) if order.kind == "submit" else _read(order))


async def _submit(order: Order) -> None:
    """Sends a submit's request, and takes the answer apart."""
    request = plain_request()
    async with new_channel(order.address) as channel:
        echo: Any = channel.unary_unary(
            METHOD, pb.SubmitJobRequest.SerializeToString, pb.SubmitJobRequest.FromString
        )
        await submit_for(order, lambda: echo(request))


async def _read(order: Order) -> None:
    """As many messages as a fanout or a fleet has, of the same size, that nobody had to find."""
    streams = order.count if order.kind == "fanout" else 1
    each = TALK_LINES if order.kind == "fanout" else order.count
    channels = [new_channel(order.address) for _ in range(min(WATCH_CHANNELS, streams))]
    done = go()
    stubs: list[Any] = [channel.unary_stream(REPEAT) for channel in channels]
    wanted = f"{each} {EVENT_BYTES}".encode()
    calls = [stubs[number % len(stubs)](wanted) for number in range(streams)]
    done.count = sum(await asyncio.gather(*map(read_all, calls)))
    tell(done)
