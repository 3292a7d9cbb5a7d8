"""A held port is for those that share it, and for nobody else."""

from __future__ import annotations

import socket

import pytest

from jobsvc.bootstrap import ports
from jobsvc.errors import CannotStart
from jobsvc.settings import split_address

ADDRESSES = ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0", "localhost:0"]


def listener(listen: str, *, share: bool = False) -> socket.socket:
    """As gRPC listens: with SO_REUSEADDR, and with SO_REUSEPORT where it shares."""
    host, port = split_address(listen)
    host = {"localhost": "127.0.0.1"}.get(host, host)
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
    try:
        made.bind((host, port))
        made.listen()
    except OSError:
        made.close()
        raise
    return made


def refused(listen: str) -> str:
    with pytest.raises(CannotStart) as caught, ports.held(listen):
        pass
    return str(caught.value)


@pytest.mark.parametrize("listen", ADDRESSES)
def test_a_held_port_is_shared_with_those_that_share(listen: str) -> None:
    with ports.held(listen) as address:
        assert address.rpartition(":")[0] == listen.rpartition(":")[0]
        assert not address.endswith(":0")
        with pytest.raises(OSError, match="in use"):
            listener(address)
        with listener(address, share=True), listener(address, share=True):
            assert address in refused(address)
        assert address in refused(address)
    with listener(address):
        pass


@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared"])
def test_a_taken_port_is_refused(share: bool) -> None:
    with listener("127.0.0.1:0", share=share) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert refused(address) == f"cannot listen on {address}: is it taken?"
        assert refused(address.replace("127.0.0.1", "0.0.0.0"))
        assert refused(address.replace("127.0.0.1", "localhost"))


def test_all_connections_go_to_those_that_listen() -> None:
    with ports.held("127.0.0.1:0") as address, listener(address, share=True) as server:
        for _ in range(20):
            with socket.create_connection(split_address(address), timeout=5):
                server.settimeout(5)
                server.accept()[0].close()


@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared"])
def test_what_lingers_of_a_server_that_has_ended_keeps_nobody_away(share: bool) -> None:
    with listener("127.0.0.1:0", share=share) as server:
        where = server.getsockname()
        with socket.create_connection(where):
            server.accept()[0].close()  # the first to close has it in TIME_WAIT
    with pytest.raises(OSError, match="in use"), socket.socket() as plain:
        plain.bind(where)
    with ports.held(f"127.0.0.1:{where[1]}") as address, listener(address, share=True):
        assert refused(address)


def test_an_address_that_is_not_here_is_refused() -> None:
    assert "192.0.2.1:1" in refused("192.0.2.1:1")
    assert "nowhere.invalid:1" in refused("nowhere.invalid:1")
