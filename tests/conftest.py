"""Addresses of the services that tests run on, and the order of the tests.

A service that is missing fails the tests that need it; it never skips them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import STANDARD_NODES, VHOSTS, fresh_database, vhost_url

# What is quick to fail comes first; a directory that is not named here comes last.
_ORDER = ("unit", "services", "store", "rpc", "e2e", "docs", "chaos")
_unused_vhosts = iter(VHOSTS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests by directory, and leaves them as they are within it."""
    here = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        directory = item.path.relative_to(here).parts[0]
        return _ORDER.index(directory) if directory in _ORDER else len(_ORDER)

    items.sort(key=rank)


def _address(variable: str) -> Iterator[str]:
    """The URL in the variable; where it is not set, that of a node which lives meanwhile."""
    if url := os.environ.get(variable):
        yield url
        return
    with STANDARD_NODES[variable]() as node:
        yield node.url


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The machine's PostgreSQL: a database to make others from, by `fresh_database`."""
    yield from _address("JOBSVC_TEST_DATABASE_URL")


@pytest.fixture(scope="session")
def postgres18_url() -> Iterator[str]:
    """PostgreSQL 18, as `postgres_url`."""
    yield from _address("JOBSVC_TEST_DATABASE18_URL")


@pytest.fixture(scope="session")
def rabbitmq_url() -> Iterator[str]:
    """The vhost `/` of RabbitMQ; a test that declares anything takes `broker_url` instead."""
    yield from _address("JOBSVC_TEST_BROKER_URL")


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """An empty PostgreSQL database for this test alone."""
    with fresh_database(postgres_url) as url:
        yield url


@pytest.fixture
def broker_url(rabbitmq_url: str) -> str:
    """An empty vhost of RabbitMQ for this test alone."""
    vhost = next(_unused_vhosts, None)
    assert vhost is not None, "more tests with a broker than tests.services.rabbitmq.VHOSTS"
    return vhost_url(rabbitmq_url, vhost)
