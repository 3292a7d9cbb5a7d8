"""The gRPC server: what it serves, its limits, its health, and how it stops."""

from __future__ import annotations

import asyncio
import logging
from typing import cast

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from generated.jobsvc.v1 import (
    admin_service_pb2_grpc,
    job_service_pb2_grpc,
    schedule_service_pb2_grpc,
)
from jobsvc.rpc.admin_service import AdminService
from jobsvc.rpc.health import Health
from jobsvc.rpc.interceptors import CallBoundary
from jobsvc.rpc.job_service import JobService
from jobsvc.rpc.paging import Pages
from jobsvc.rpc.schedule_service import ScheduleService
from jobsvc.rpc.signing import Signer
from jobsvc.rpc.tasks import know_calls
from jobsvc.rpc.validate import MESSAGE_BYTES_MAX
from jobsvc.services.assembly import Services
from jobsvc.telemetry import get_logger

log = get_logger(__name__)

SERVICES = (
    "jobsvc.v1.JobService",
    "jobsvc.v1.ScheduleService",
    "jobsvc.v1.AdminService",
)
# What the last answers get to reach their clients, after their calls have ended here.
FLUSH_SECONDS = 0.5
CONNECTIONS_MAX = 10_000
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

OPTIONS: tuple[tuple[str, int], ...] = (
    # The slack lets a request that is just over the limit get our own answer, which names it.
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX + 64 * 1024),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # Far above what watches take on one connection: full, it would hold up unary calls too.
    ("grpc.max_concurrent_streams", 10_000),
    # Calls that have come and that the event loop has not looked at yet. Beyond 1,000, by default,
    # some would be cancelled without a word: an honest crowd comes at once.
    ("grpc.server.max_pending_requests", 6_000),
    ("grpc.server.max_pending_requests_hard_limit", 8_000),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
    # What a stream may send before it is read. The probe would widen it by the megabyte, for each
    # stream of whoever sends fast, read or not.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 64 * 1024),
    # Who connects and says nothing is not to be waited for.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Finds connections whose other end is gone; their watches would live on for ever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # What clients may choose goes down to a second (.NET; 10 s in Go and Java), and a ping may
    # catch up with the one before it. By default it is five minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
)
TLS_OPTIONS: tuple[tuple[str, int], ...] = (
    # A client whose certificate has expired, or has lost its CA, does not stay connected for ever.
    # The grace is longer than any stream may last.
    ("grpc.max_connection_age_ms", 30 * 60_000),
    ("grpc.max_connection_age_grace_ms", 40 * 60_000),
)


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether gRPC tells of more than a caller's metadata, which are no UTF-8: with all of what was
    sent, a traceback, and as often as any stranger likes."""
    return not record.exc_info or record.exc_info[0] is not UnicodeDecodeError


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)


class Server:
    """To be made, used and stopped in one running event loop."""

    def __init__(
        self,
        listen: str,
        services: Services,
        boundary: CallBoundary,
        credentials: grpc.ServerCredentials | None = None,
        *,
        share_port: bool = False,
    ) -> None:
        """`listen`: HOST:PORT; port 0 takes a free one. Plaintext without credentials. The system
        shares connections out between all that `share_port`; for others a taken port is an error.
        Raises RuntimeError where it cannot be bound."""
        self._hub = services.hub
        self._fleet = services.fleet
        self._boundary = boundary
        self._health = Health()
        self._following: list[asyncio.Task[None]] = []
        options = (*OPTIONS, ("grpc.so_reuseport", int(share_port)))
        if credentials is not None:
            options += TLS_OPTIONS
        self._server = grpc.aio.server(interceptors=[boundary], options=options)
        pages = Pages(Signer(services.identity.secret))
        by_path = cast("grpc.aio.Server", _ByPath(self._server))
        job_service_pb2_grpc.add_JobServiceServicer_to_server(JobService(services, pages), by_path)
        schedule_service_pb2_grpc.add_ScheduleServiceServicer_to_server(
            ScheduleService(services, pages), by_path
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminService(services, pages), by_path
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, by_path)
        _add_reflection(self._server)
        if credentials is None:
            port = self._server.add_insecure_port(listen)
        else:
            port = self._server.add_secure_port(listen, credentials)
        self.address = f"{listen.rpartition(':')[0]}:{port}"

    async def start(self) -> None:
        know_calls(asyncio.get_running_loop())
        self.set_serving(True)
        self._following = [
            asyncio.create_task(self._boundary.access.follow(), name="tokens"),
            asyncio.create_task(self._boundary.follow(), name="boundary"),
        ]
        await self._server.start()

    def set_serving(self, serving: bool) -> None:
        """What health tells of every service; a drain overrules it."""
        self._health.set(("", *SERVICES), serving=serving)

    async def stop(self, grace_seconds: float) -> None:
        """Drains: health first, so that balancers look elsewhere; new calls and streams are sent
        away; what has begun is finished, unless it takes longer than the grace."""
        self._health.drain()
        self._boundary.refuse_calls()
        self._hub.drain()
        self._fleet.drain()
        await self._boundary.wait_idle(grace_seconds)
        for task in self._following:
            task.cancel()
        await self._server.stop(FLUSH_SECONDS)


class _ByPath:
    """What generated code adds services to, so that their methods are found by their path alone.

    It would register each method by itself, too. For each of those grpc.aio awaits a call of its
    own, and with every call that comes it begins to wait for all of them anew: with some thirty
    methods that was a quarter of what the event loop did for a call.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """The same handlers come by `add_generic_rpc_handlers`."""


def _add_reflection(server: grpc.aio.Server) -> None:
    """Under both names: clients ask for v1, or v1alpha, or the one after the other. The messages
    are the same on the wire."""
    _describe_reflection_v1()
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
    servicer = reflection.aio.ReflectionServicer(names)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": method}
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(name, handlers)
            for name in (reflection.SERVICE_NAME, REFLECTION_V1)
        )
    )


def _describe_reflection_v1() -> None:
    """Makes v1 itself describable: the library knows v1alpha alone."""
    alpha = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    text = text_format.MessageToString(alpha)
    text = text.replace("grpc.reflection.v1alpha", "grpc.reflection.v1")
    text = text.replace("grpc_reflection/v1alpha", "grpc/reflection/v1")
    descriptor_pool.Default().AddSerializedFile(
        text_format.Parse(text, FileDescriptorProto()).SerializeToString()
    )
