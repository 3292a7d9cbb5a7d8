"""Addresses of the services that tests run on, and what runs when.

A service that is missing fails the tests that need it; it never skips them.

With `-n` (pytest-xdist) several workers share the tests out among them. Each has fixtures of its
own; a test that loads the machine by itself is marked `alone`, and runs while no other does.
"""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import structlog
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.services import STANDARD_NODES, VHOSTS, fresh_database, vhost_url, wait_served

# What is quick to fail comes first; in the end what is shared out test by test, so that all workers
# come to theirs at the same time. A directory that is not named here comes last.
_ORDER = (
    *("unit", "services", "broker", "conformance", "docs"),
    *("deploy", "e2e", "chaos", "rpc", "store"),
)
# What needs much before its first test: a worker gets a file of these as a whole.
_WHOLE = ("broker", "conformance", "docs", "e2e/test_door.py", "e2e/test_jobs.py", "services")
_WHOLE_PREFIXES = tuple(f"tests/{place}" for place in _WHOLE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests by directory, and leaves them as they are within it."""
    here = Path(__file__).parent

    def rank(item: pytest.Item) -> tuple[bool, int]:
        directory = item.path.relative_to(here).parts[0]
        place = _ORDER.index(directory) if directory in _ORDER else len(_ORDER)
        return item.get_closest_marker("alone") is not None, place

    items.sort(key=rank)


class _Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Test by test in their order, but for the files that stay whole."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("::")[0] if nodeid.startswith(_WHOLE_PREFIXES) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return _Scheduling(config, log)


def _common_directory(config: pytest.Config) -> Path | None:
    """What the workers of this run have in common; None without workers."""
    own = config.option.basetemp
    return Path(own).parent if "PYTEST_XDIST_WORKER" in os.environ else None


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around the timeout, too
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Lets a test that is marked `alone` wait for those of the other workers, and them for it."""
    directory = _common_directory(item.config)
    if directory is None:
        return (yield)
    with (directory / "turn").open("w") as turn:
        alone = item.get_closest_marker("alone")
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        return (yield)


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """A command that is run in this process says how its logs are written; the next test has none
    of it, whichever that is."""
    yield
    if structlog.is_configured():
        structlog.reset_defaults()


def _address(variable: str) -> Iterator[str]:
    """The URL in the variable; where it is not set, that of a node which lives meanwhile."""
    if url := os.environ.get(variable):
        wait_served(url)
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


@pytest.fixture(scope="session")
def unused_vhosts(request: pytest.FixtureRequest) -> Iterator[str]:
    """Empty vhosts of RabbitMQ, each for whoever takes it with `next` and for no one else."""
    directory = _common_directory(request.config)

    def is_taken(vhost: str) -> bool:
        if directory:
            try:
                (directory / f"vhost-{vhost}").touch(exist_ok=False)
            except FileExistsError:
                return True
        return False

    return itertools.filterfalse(is_taken, VHOSTS)


@pytest.fixture
def broker_url(rabbitmq_url: str, unused_vhosts: Iterator[str]) -> str:
    """An empty vhost of RabbitMQ for this test alone."""
    vhost = next(unused_vhosts, None)
    assert vhost is not None, "more tests with a broker than tests.services.rabbitmq.VHOSTS"
    return vhost_url(rabbitmq_url, vhost)
