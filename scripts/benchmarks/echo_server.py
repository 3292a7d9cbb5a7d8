"""The echo side: as little of grpc.aio as answers a call, or feeds a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import uvloop

METHOD = "/bench.Echo/Echo"
REPEAT = "/bench.Echo/Repeat"


async def _echo(request: bytes, _: Any) -> bytes:
    return request


async def _repeat(request: bytes, _: Any) -> AsyncIterator[bytes]:
    """So many messages of so many bytes, as `COUNT SIZE` asks."""
    count, size = map(int, request.split())
    message = b"x" * size
    for _number in range(count):
        yield message


async def serve() -> None:
    """Says on its output where it listens; never returns."""
    server = grpc.aio.server()
    handlers: dict[str, Any] = {
        "Echo": grpc.unary_unary_rpc_method_handler(_echo),
        "Repeat": grpc.unary_stream_rpc_method_handler(_repeat),
    }
    service = grpc.method_handlers_generic_handler("bench.Echo", handlers)
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve())
