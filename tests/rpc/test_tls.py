"""TLS and mutual TLS, from a client of ours and with certificates in files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobsvc.client import CallFailed, Client
from jobsvc.rpc.access import Access
from jobsvc.rpc.certificates import server_credentials
from jobsvc.rpc.interceptors import CallBoundary
from tests.pem import Authority
from tests.rpc.conftest import running_world


@dataclass(frozen=True)
class House:
    """A server on 127.0.0.1, whose certificate is for `localhost` alone."""

    directory: Path
    authority: Authority
    address: str

    def issue(self, authority: Authority) -> None:
        """A new certificate in the place of the server's."""
        authority.issue("server", "localhost")

    async def health(self, **options: Any) -> str:
        """As a new connection hears it."""
        options = {"tls_ca": self.authority.path, "tls_server_name": "localhost", **options}

        def ask() -> str:
            with Client(self.address, timeout=5, **options) as client:
                return client.health()

        return await asyncio.to_thread(ask)

    async def refuses(self, **options: Any) -> bool:
        with pytest.raises(CallFailed) as caught:
            await self.health(**options)
        return caught.value.code == "UNAVAILABLE"


@asynccontextmanager
async def serving(directory: Path, client_ca: str = "") -> AsyncIterator[House]:
    authority = Authority(directory, "ca")
    certificate, key = authority.issue("server", "localhost")
    credentials = server_credentials(certificate, key, client_ca)
    async with running_world(directory, CallBoundary(Access(None)), credentials) as world:
        yield House(directory, authority, world.server.address)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with serving(tmp_path) as made:
        yield made


@pytest.fixture
def clients(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "clients")


@pytest.fixture
async def mutual(tmp_path: Path, clients: Authority) -> AsyncIterator[House]:
    async with serving(tmp_path, clients.path) as made:
        yield made


async def test_a_server_with_tls_answers_those_who_trust_it(house: House) -> None:
    assert await house.health() == "SERVING"
    assert await house.refuses(tls_ca=None, tls_server_name=None)
    assert await house.refuses(tls_ca=Authority(house.directory, "other").path)
    assert await house.refuses(tls_server_name=None)  # it is not the certificate of an address


async def test_calls_and_streams_go_through_tls(house: House) -> None:
    def run() -> list[str]:
        with Client(
            house.address,
            token="t0ken",  # of no account without tokens, and may be shown to it
            tls_ca=house.authority.path,
            tls_server_name="localhost",
        ) as client:
            job = client.submit("demo").job
            client.cancel(job.job_id)
            return [event.actor for event in client.watch(job.job_id)]

    assert await asyncio.to_thread(run) == ["anonymous", "anonymous"]


async def test_a_new_certificate_is_used_from_the_next_connection_on(house: House) -> None:
    assert await house.health() == "SERVING"
    successor = Authority(house.directory, "successor")
    house.issue(successor)
    assert await house.health(tls_ca=successor.path) == "SERVING"
    assert await house.refuses()


async def test_a_bad_pair_leaves_the_old_one(house: House) -> None:
    successor = Authority(house.directory, "successor")
    key = house.directory / "server.key"
    old = key.read_bytes()
    house.issue(successor)
    new = key.read_bytes()
    key.write_bytes(old)  # as in the middle of an exchange
    with capture_logs() as records:
        assert await house.health() == "SERVING"
        assert await house.health() == "SERVING"
    (error,) = [each for each in records if each["log_level"] == "error"]
    assert (error["what"], "server.key" in error["reason"]) == ("certificates", True)
    key.write_bytes(new)
    assert await house.health(tls_ca=successor.path) == "SERVING"


def test_a_bad_pair_is_an_error_at_first(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    certificate, _ = authority.issue("server", "localhost")
    _, other = authority.issue("other", "localhost")
    with pytest.raises(ValueError, match="are not a certificate and its key"):
        server_credentials(certificate, other, "")


async def test_mutual_tls_asks_for_a_certificate(mutual: House, clients: Authority) -> None:
    assert await mutual.refuses()
    certificate, key = clients.issue("client", "client.internal")
    assert await mutual.health(client_cert=certificate, client_key=key) == "SERVING"
    stranger, its_key = Authority(mutual.directory, "strangers").issue("stranger", "x.internal")
    assert await mutual.refuses(client_cert=stranger, client_key=its_key)


async def test_another_client_ca_is_used_from_the_next_connection_on(
    mutual: House, clients: Authority
) -> None:
    certificate, key = clients.issue("client", "client.internal")
    others = Authority(mutual.directory, "clients")  # in its place
    assert await mutual.refuses(client_cert=certificate, client_key=key)
    certificate, key = others.issue("client", "client.internal")
    assert await mutual.health(client_cert=certificate, client_key=key) == "SERVING"
