"""The two homes that the scenarios run against, with all that they need."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import pytest

from tests.conformance.runner import QUEUE_PREFIX, Home
from tests.harness import Process, Service
from tests.harness.service import SETTINGS
from tests.services import fresh_database, vhost_url

QUEUES = tuple(f"{QUEUE_PREFIX}{number}" for number in range(1, 5))
TOKENS: Mapping[str, str] = {
    scope: f"conformance-token-{scope}" for scope in ("admin", "submit", "read", "cancel")
}
# A lease that no busy machine loses: losing one is not what is tested here.
SLOTS: Mapping[str, str] = {
    "queues": ",".join(("default", *QUEUES)),
    "concurrency": "8",
    "lease": "15s",
    "heartbeat": "1s",
}


@pytest.fixture(scope="session")
def postgresql_home(
    postgres_url: str,
    rabbitmq_url: str,
    unused_vhosts: Iterator[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Home]:
    """A server and a worker on PostgreSQL and RabbitMQ, behind tokens."""
    lines = [
        f"{scope}er {hashlib.sha256(token.encode()).hexdigest()} {scope}"
        for scope, token in TOKENS.items()
    ]
    with fresh_database(postgres_url) as database_url:
        service = Service(
            database_url,
            vhost_url(rabbitmq_url, next(unused_vhosts)),
            tmp_path_factory.mktemp("conformance"),
            tokens="\n".join(lines),
            **SLOTS,
        )
        try:
            service.start()
            yield Home(service.addresses[0], TOKENS, QUEUES)
        finally:
            service.close()


@pytest.fixture(scope="session")
def dev_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """`jobsvc dev`, open to everybody."""
    directory = tmp_path_factory.mktemp("conformance")
    settings = {**SETTINGS, **{f"JOBSVC_{name.upper()}": value for name, value in SLOTS.items()}}
    arguments = ["dev", "--data-dir", str(directory / "data"), "--listen", "127.0.0.1:0"]
    process = Process("dev", arguments, settings, directory)
    try:
        yield Home(str(process.wait_ready()["address"]), {}, QUEUES)
    finally:
        process.close()
