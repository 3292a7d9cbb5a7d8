"""One connection to a server: calls that are made again, streams that are watched, pages."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from jobsvc.client.clock import Clock, Watchdog
from jobsvc.client.errors import CallFailed, call_failed
from jobsvc.client.retry import Backoff, Outage
from jobsvc.settings import is_loopback, split_address
from jobsvc.tls import read_ca, read_pair

HEARTBEATS_MISSED_MAX = 3
# Servers end a stream after 33 minutes at the latest.
STREAM_SECONDS_MAX = 40 * 60.0

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)


class _Paged(Protocol):
    page_token: str


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


_PagedRequest = TypeVar("_PagedRequest", bound=_Paged)
_PageResponse = TypeVar("_PageResponse", bound=_Page)


class Calls:
    """May be shared by threads. Each call has `timeout` seconds for all its tries together; a
    stream that was up may be down for `outage` seconds."""

    def __init__(
        self,
        channel: grpc.Channel,
        token: str | None,
        *,
        timeout: float,
        outage: float,
        clock: Clock,
        random: Callable[[], float],
    ) -> None:
        self.channel = channel
        self.timeout = timeout
        self.clock = clock
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._outage = outage
        self._random = random

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        wait: float = 0.0,
        prepare: Callable[[float], None] | None = None,
        *,
        repeat: bool = True,
    ) -> _Response:
        """The answer to a call, which is made again when it fails in passing unless `repeat` is
        False. It has `wait` seconds more than others; `prepare` is told before each try how many
        are left."""
        deadline = self.clock.time() + self.timeout + wait
        backoff = Backoff(self._random)
        while True:
            left = deadline - self.clock.time()
            if prepare is not None:
                prepare(left)
            try:
                return method(request, timeout=left, metadata=self._metadata)
            except grpc.RpcError as error:
                failed = call_failed(error)
                delay = backoff.next(failed)
                if not (repeat and failed.transient) or self.clock.time() + delay >= deadline:
                    raise failed from error
            self.clock.sleep_for(delay)

    def pages(
        self,
        method: Callable[[_PagedRequest], _PageResponse],
        request: _PagedRequest,
    ) -> Iterator[_PageResponse]:
        """Every page of a list, each read when it is asked for."""
        while True:
            page = method(request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def stream(
        self,
        method: grpc.UnaryStreamMultiCallable[_Request, _Response],
        request: _Request,
        heartbeat_interval: float,
    ) -> Generator[_Response, None, None]:
        """The messages of one stream. Raises CallFailed when it breaks, and UNAVAILABLE when it
        is silent for too long."""
        call = method(request, timeout=STREAM_SECONDS_MAX, metadata=self._metadata)
        watchdog = Watchdog(self.clock, call.cancel)
        limit = self.timeout  # of the first message, which comes at once
        try:
            while True:
                watchdog.start(limit)
                message = next(call, None)
                # The caller may now take its time; that is not the stream's silence.
                watchdog.pause()
                if message is None:
                    return
                limit = HEARTBEATS_MISSED_MAX * heartbeat_interval
                yield message
        except grpc.RpcError as error:
            if watchdog.fired:
                raise CallFailed("UNAVAILABLE", f"nothing heard for {limit:g} s") from error
            raise call_failed(error) from error
        finally:
            watchdog.stop()
            call.cancel()

    def outage(self) -> Outage:
        return Outage(self.clock, self._random, self.timeout, self._outage)


def is_local(address: str) -> bool:
    try:
        return is_loopback(split_address(address)[0])
    except ValueError:  # another of gRPC's forms
        return address.startswith("unix:")


def credentials(
    tls_ca: str | None,
    client_cert: str | None,
    client_key: str | None,
    tls_server_name: str | None,
) -> grpc.ChannelCredentials | None:
    """None without TLS. Raises ValueError."""
    if bool(client_cert) != bool(client_key):
        raise ValueError("a client's certificate and its key go together")
    if not tls_ca:
        if client_cert or tls_server_name:
            raise ValueError("without a CA (JOBSVC_TLS_CA) there is no TLS")
        return None
    root = read_ca(tls_ca)
    if not client_cert or not client_key:
        return grpc.ssl_channel_credentials(root)
    key, chain = read_pair(client_cert, client_key)
    return grpc.ssl_channel_credentials(root, key, chain)


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None, tls_server_name: str | None
) -> grpc.Channel:
    options: list[tuple[str, int | str]] = [
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # also the time that one connect may take
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ]
    if is_local(address):
        options.append(("grpc.enable_http_proxy", 0))
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    if tls_server_name:
        options.append(("grpc.ssl_target_name_override", tls_server_name))
    return grpc.secure_channel(address, credentials, options=options)
