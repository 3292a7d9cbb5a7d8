"""Kombu's AMQP transport, reading ahead.

py-amqp reads each of a message's three frames by three calls of the operating system; at each of
them the interpreter is let go and asked for again. It keeps what it is given beyond what it asked
for, so it need only be given more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amqp.transport import SSLTransport, TCPTransport
from kombu.transport import pyamqp

# Each frame that is taken off copies what is left, so much more would cost more than it saves.
AHEAD_BYTES = 8192


class _ReadAhead:
    # There may be something to read although the socket has nothing: whoever waits for the socket
    # asks this first.
    unread = False
    _quick_recv: Callable[[int], bytes]

    def _setup_transport(self) -> None:
        super()._setup_transport()  # type: ignore[misc]
        receive = self._quick_recv

        def receive_ahead(size: int) -> bytes:
            self.unread = False  # only part of a frame is left, and the rest has yet to come
            received = receive(max(size, AHEAD_BYTES))
            self.unread = True
            return received

        self._quick_recv = receive_ahead


class _TcpTransport(_ReadAhead, TCPTransport):  # type: ignore[misc]
    pass


class _TlsTransport(_ReadAhead, SSLTransport):  # type: ignore[misc]
    pass


class _Connection(pyamqp.Connection):  # type: ignore[misc]
    def Transport(  # noqa: N802 - py-amqp's name
        self,
        host: str,
        connect_timeout: float,
        ssl: Any = False,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
        **options: Any,
    ) -> Any:
        transport = _TlsTransport if ssl else _TcpTransport
        return transport(
            host,
            connect_timeout,
            read_timeout=read_timeout,
            write_timeout=write_timeout,
            ssl=ssl,
            **options,
        )


class AmqpTransport(pyamqp.Transport):  # type: ignore[misc]
    Connection = _Connection
