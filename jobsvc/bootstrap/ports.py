"""A port held for processes that share it by SO_REUSEPORT, and for nobody else.

That option alone lets any process of the same user share it, another service by accident. So the
port is first bound as one that is not shared, and the option is set on what has been bound: from
then on sockets that have it too may bind and listen; all others find the port taken. A socket that
is bound and does not listen gets no connections.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from jobsvc.errors import CannotStart
from jobsvc.settings import split_address

Address = tuple[socket.AddressFamily, str]

_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - looked for, not bound
_LOOPBACK: tuple[Address, ...] = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
# A name may lead to addresses that this machine does not have, without IPv6 say.
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@contextmanager
def held(listen: str) -> Iterator[str]:
    """Holds HOST:PORT on every address of the host; yields it with the port that was found where it
    was 0. Raises CannotStart where somebody else has it."""
    host, port = split_address(listen)
    with ExitStack() as sockets:
        try:
            port = _hold_all(_addresses(host), port, sockets)
        except OSError as error:
            raise CannotStart(f"cannot listen on {listen}: is it taken?") from error
        yield f"{listen.rpartition(':')[0]}:{port}"


def _addresses(host: str) -> Sequence[Address]:
    """As gRPC reads the host: either wildcard means both families, and so does localhost."""
    if host in _WILDCARDS and socket.has_dualstack_ipv6():
        return [(socket.AF_INET6, "::")]
    if host == "localhost":
        return _LOOPBACK
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [(family, str(address[0])) for family, *_, address in found]


def _hold_all(addresses: Sequence[Address], port: int, sockets: ExitStack) -> int:
    """The port, the same on all addresses that this machine has."""
    absent: OSError | None = None
    held = False
    for family, address in addresses:
        try:
            each = sockets.enter_context(_hold(family, address, port))
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            absent = error
        else:
            held, port = True, each.getsockname()[1]
    if absent is not None and not held:
        raise absent
    return port


def _hold(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    try:
        each = _bound(family, address, port, reuse_address=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # By a listening socket, or only by connections of a server that has just ended: those
        # alone give way to this option.
        each = _bound(family, address, port, reuse_address=True)
    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return each


def _bound(
    family: socket.AddressFamily, address: str, port: int, *, reuse_address: bool
) -> socket.socket:
    each = socket.socket(family, socket.SOCK_STREAM)
    try:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
        if family == socket.AF_INET6:
            only_v6 = address not in _WILDCARDS
            each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_v6)
        each.bind((address, port))
    except BaseException:
        each.close()
        raise
    return each
