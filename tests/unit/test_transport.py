"""How frames of AMQP are read off the socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from jobsvc.broker.transport import AHEAD_BYTES, _TcpTransport


def frame(payload: bytes) -> bytes:
    return struct.pack(">BHI", 1, 0, len(payload)) + payload + b"\xce"


@pytest.fixture
def pair() -> Iterator[tuple[_TcpTransport, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        transport = _TcpTransport(f"127.0.0.1:{server.getsockname()[1]}", 5)
        transport.connect()
        broker, _ = server.accept()
        with broker:
            yield transport, broker
            transport.close()


def receive(transport: _TcpTransport, frames: int) -> None:
    """Returns when so many bytes have come that these frames can be read."""
    transport.sock.settimeout(5)
    sizes = frames * len(frame(b"x"))
    while len(transport.sock.recv(sizes, socket.MSG_PEEK)) < sizes:
        pass


def test_frames_that_came_together_take_one_call(
    pair: tuple[_TcpTransport, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, broker = pair
    asked: list[int] = []
    receive_ahead = transport._quick_recv

    def counted(size: int) -> bytes:
        asked.append(size)
        return receive_ahead(size)

    monkeypatch.setattr(transport, "_quick_recv", counted)
    broker.sendall(frame(b"x") * 3)
    receive(transport, 3)
    assert [transport.read_frame()[2] for _ in range(3)] == [b"x"] * 3
    assert len(asked) == 1


def test_it_says_what_the_socket_does_not(pair: tuple[_TcpTransport, socket.socket]) -> None:
    """A reader that waits for the socket alone would leave the second frame where it is."""
    transport, broker = pair
    seen = [transport.unread]
    broker.sendall(frame(b"x") * 2)
    receive(transport, 2)
    transport.read_frame()
    seen.append(transport.unread)
    transport.read_frame()
    transport.sock.settimeout(0)
    with pytest.raises(TimeoutError):
        transport.read_frame()
    assert [*seen, transport.unread] == [False, True, False]


def test_part_of_a_frame_is_nothing_to_read_yet(
    pair: tuple[_TcpTransport, socket.socket],
) -> None:
    transport, broker = pair
    whole = frame(b"x" * (AHEAD_BYTES + 1))
    broker.sendall(whole[:4])
    transport.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        transport.read_frame()
    assert not transport.unread
    broker.sendall(whole[4:])
    transport.sock.settimeout(5)
    assert transport.read_frame()[2] == b"x" * (AHEAD_BYTES + 1)
