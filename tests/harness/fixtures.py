"""Fixtures for the tests that start processes; their conftest imports them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.service import Service
from tests.services import VHOSTS, RabbitmqNode, vhost_url

BRITTLE_VHOSTS = 6  # as many as tests that break their broker


@pytest.fixture
def service(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Service]:
    """On a database and a vhost of its own; nothing is started yet."""
    made = Service(database_url, broker_url, tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def brittle_vhosts() -> Iterator[tuple[RabbitmqNode, Iterator[str]]]:
    names = VHOSTS[:BRITTLE_VHOSTS]
    with RabbitmqNode(vhosts=names) as node:
        yield node, iter(names)


@pytest.fixture
def brittle_broker(brittle_vhosts: tuple[RabbitmqNode, Iterator[str]]) -> RabbitmqNode:
    """A broker to kill, apart from that of the other tests. To be left running."""
    return brittle_vhosts[0]


@pytest.fixture
def brittle_service(
    brittle_vhosts: tuple[RabbitmqNode, Iterator[str]], database_url: str, tmp_path: Path
) -> Iterator[Service]:
    """As `service`, on the broker that is killed."""
    node, vhosts = brittle_vhosts
    made = Service(database_url, vhost_url(node.url, next(vhosts)), tmp_path)
    yield made
    made.close()
