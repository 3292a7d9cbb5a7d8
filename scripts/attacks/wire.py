"""One HTTP/2 connection of a client without manners: it reads or does not, it sends or stops.

Only what the attacks need. Headers are literals without compression; what the server says in its
own headers is not decoded, so that of an answer nothing is known but how its stream ended.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, cast

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
INITIAL_WINDOW = 4  # the number of the setting
WINDOW = 65_535
FRAME_BYTES_MAX = 16_384


@dataclass(slots=True)
class _Stream:
    window: int
    unsent: list[memoryview] = field(default_factory=list)
    ends: bool = False


class Wire(asyncio.Protocol):
    def __init__(self, authority: str, *, window: int = WINDOW, reads: bool = True) -> None:
        """`window`: what each stream may send us; one that never `reads` grants no more."""
        self._authority = authority
        self._window = window
        self._reads = reads
        self._received = bytearray()
        self._streams: dict[int, _Stream] = {}
        self._next = 1
        self._connection_window = WINDOW
        self._initial_window = WINDOW
        self._transport: asyncio.Transport | None = None
        self.ready = asyncio.Event()
        self.closed = asyncio.Event()
        self.ended: Counter[str] = Counter()

    @classmethod
    async def open(cls, address: str, *, window: int = WINDOW, reads: bool = True) -> Self:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(
            lambda: cls(address, window=window, reads=reads), host, int(port)
        )
        await wire.ready.wait()
        return wire

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    def call(
        self,
        path: str,
        message: bytes | None = None,
        *,
        token: str = "",
        keep_back: int = 0,
        deadline_seconds: int = 0,
    ) -> int:
        """Begins a call and sends `message`, but its last `keep_back` bytes, as far as the server
        takes it; without a message nothing but the headers. The stream is left open then."""
        number, self._next = self._next, self._next + 2
        stream = self._streams[number] = _Stream(self._initial_window)
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        if token:
            headers.append(("authorization", f"Bearer {token}"))
        if deadline_seconds:
            headers.append(("grpc-timeout", f"{deadline_seconds}S"))
        self._send(HEADERS, END_HEADERS, number, _headers(headers))
        if message is not None:
            data = b"\x00" + struct.pack(">I", len(message)) + message
            stream.ends = not keep_back
            stream.unsent.append(memoryview(data)[: len(data) - keep_back])
            self._flush(number, stream)
        return number

    def reset(self, number: int) -> None:
        self._streams.pop(number, None)
        self._send(RST_STREAM, 0, number, struct.pack(">I", 8))

    def hang_up(self) -> None:
        assert self._transport is not None
        self._transport.abort()

    # Of asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(PREFACE)
        self._send(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, self._window))

    def data_received(self, data: bytes) -> None:
        self._received += data
        at = 0
        while len(self._received) - at >= 9:
            length = int.from_bytes(self._received[at : at + 3])
            if len(self._received) - at < 9 + length:
                break
            kind, flags = self._received[at + 3], self._received[at + 4]
            number = int.from_bytes(self._received[at + 5 : at + 9]) & 0x7FFFFFFF
            self._take(kind, flags, number, bytes(self._received[at + 9 : at + 9 + length]))
            at += 9 + length
        del self._received[:at]

    def connection_lost(self, error: Exception | None) -> None:
        self.ended["connection lost"] += len(self._streams)
        self._streams.clear()
        self.ready.set()
        self.closed.set()

    # Frames.

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self._settle(payload)
            self._send(SETTINGS, ACK, 0, b"")
            self.ready.set()
        elif kind == PING and not flags & ACK:
            self._send(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE:
            self._widen(number, int.from_bytes(payload))
        elif kind == DATA and self._reads and payload:
            for each in (0, number):
                self._send(WINDOW_UPDATE, 0, each, struct.pack(">I", len(payload)))
        elif kind == RST_STREAM:
            self._end(number, f"reset {int.from_bytes(payload)}")
        elif kind == GOAWAY:
            self.ended[f"goaway {int.from_bytes(payload[4:8])}"] += 1
        if kind in (DATA, HEADERS) and flags & END_STREAM:
            self._end(number, "answered")

    def _settle(self, payload: bytes) -> None:
        for at in range(0, len(payload), 6):
            name, value = struct.unpack(">HI", payload[at : at + 6])
            if name == INITIAL_WINDOW:
                for stream in self._streams.values():
                    stream.window += value - self._initial_window
                self._initial_window = value

    def _widen(self, number: int, count: int) -> None:
        if number == 0:
            self._connection_window += count
            for each, stream in list(self._streams.items()):
                self._flush(each, stream)
        elif number in self._streams:
            self._streams[number].window += count
            self._flush(number, self._streams[number])

    def _end(self, number: int, how: str) -> None:
        if self._streams.pop(number, None) is not None:
            self.ended[how] += 1

    def _flush(self, number: int, stream: _Stream) -> None:
        while stream.unsent:
            data = stream.unsent[0]
            count = min(len(data), stream.window, self._connection_window, FRAME_BYTES_MAX)
            if count <= 0:
                return
            rest = data[count:]
            flags = END_STREAM if stream.ends and not rest else 0
            self._send(DATA, flags, number, bytes(data[:count]))
            stream.window -= count
            self._connection_window -= count
            if rest:
                stream.unsent[0] = rest
            else:
                stream.unsent.pop(0)

    def _send(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        assert self._transport is not None
        head = len(payload).to_bytes(3) + bytes([kind, flags]) + number.to_bytes(4)
        self._transport.write(head + payload)


def _headers(pairs: Sequence[tuple[str, str]]) -> bytes:
    """HPACK literals that are not indexed."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in pairs)


def _text(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, length = len(data) - 127, bytearray([127])
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    length.append(rest)
    return bytes(length) + data
