"""Private PostgreSQL and RabbitMQ nodes for tests, on loopback ports that were free.

    with PostgresNode(machine_bin() or wheel_bin()) as database, RabbitmqNode() as broker:
        ...                     # database.url, broker.url
        broker.kill()           # SIGKILL, or pause() and resume(), or wipe()
        broker.start()          # on the same port, with what it had stored

`python -m tests.services run -- COMMAND` runs a command with the addresses of fresh nodes in its
environment, and starts them meanwhile; the fixtures in `tests/conftest.py` wait for those, or start
their own where there are none.
"""

from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from tests.services import postgres, rabbitmq
from tests.services.node import Node, NodeError, free_port, wait_for
from tests.services.postgres import PostgresNode, fresh_database, machine_bin, wheel_bin
from tests.services.rabbitmq import VHOSTS, RabbitmqNode, vhost_url

# The nodes of a test run, each by the environment variable that says where it is.
STANDARD_NODES: Mapping[str, Callable[[], Node]] = {
    "JOBSVC_TEST_DATABASE_URL": lambda: PostgresNode(machine_bin() or wheel_bin()),
    "JOBSVC_TEST_DATABASE18_URL": lambda: PostgresNode(wheel_bin()),
    "JOBSVC_TEST_BROKER_URL": RabbitmqNode,
}

_PROBES: Mapping[str, Callable[[str], None]] = {
    "postgresql+psycopg2": postgres.probe,
    "amqp": rabbitmq.probe,
}


def wait_served(url: str) -> None:
    """Returns once the node at the URL serves, which may be starting still. Raises NodeError."""
    wait_for(lambda: _PROBES[urlsplit(url).scheme](url))


__all__ = [
    "STANDARD_NODES",
    "VHOSTS",
    "Node",
    "NodeError",
    "PostgresNode",
    "RabbitmqNode",
    "free_port",
    "fresh_database",
    "machine_bin",
    "vhost_url",
    "wait_served",
    "wheel_bin",
]
