"""grpc.health.v1. The library's own writes to a watcher under the lock that each change needs: one
that does not read would hold up all others, and the server's end."""

# ruff: noqa: N802 - the proto names the methods

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeAlias

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jobsvc.errors import ServiceUnknown

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Response: TypeAlias = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # has no types
    """For one event loop."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._draining = False

    def set(self, services: tuple[str, ...], *, serving: bool) -> None:
        """Without effect once it drains."""
        if self._draining:
            return
        self._statuses |= dict.fromkeys(
            services, Response.SERVING if serving else Response.NOT_SERVING
        )
        self._tell()

    def drain(self) -> None:
        """From now on nothing is served."""
        self.set(tuple(self._statuses), serving=False)
        self._draining = True

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Response:
        status = self._statuses.get(request.service)
        if status is None:
            raise ServiceUnknown
        return Response(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[Response]:
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, Response.SERVICE_UNKNOWN)
            if status != told:
                told = status
                yield Response(status=status)
            else:
                await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
