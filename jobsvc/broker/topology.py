"""Names on the broker and the arguments that go with them; both sides declare the same.

Arguments never change under one name (that is 406 PRECONDITION_FAILED): a queue that needs others,
or that cannot be repaired, takes the next generation, whose number is in the database.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import kombu
from kombu.exceptions import ChannelError

from jobsvc.broker.transport import AmqpTransport
from jobsvc.errors import JobsvcError

PRIORITY_MAX = 9
DELIVERY_LIMIT = 20

JOBS = kombu.Exchange("jobs", "direct", durable=True)
DEAD = kombu.Exchange("jobs.dead", "fanout", durable=True)
UNROUTABLE = kombu.Exchange("jobs.unroutable", "fanout", durable=True)
HINT = kombu.Exchange("jobs.hint", "fanout", durable=True, delivery_mode="transient")
CONTROL = kombu.Exchange("jobs.control", "fanout", durable=True, delivery_mode="transient")
EXCHANGES = (JOBS, DEAD, UNROUTABLE, HINT, CONTROL)

CONNECT_TIMEOUT_SECONDS = 5.0
IO_TIMEOUT_SECONDS = 10.0
HEARTBEAT_SECONDS = 10


class BrokerUnavailable(JobsvcError):
    """The broker did not answer, refused, or lost the connection; nothing is known of what was
    under way."""


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is and what its queues are made of."""

    url: str
    queue_type: str = "classic"
    ca_path: str = ""  # of a PEM file, for amqps://; "": whom the system trusts

    @property
    def memory(self) -> bool:
        """Kombu's in-process transport: no confirms, no limits, gone with the process."""
        return self.url.startswith("memory:")

    def connection(self) -> kombu.Connection:
        """Not connected yet. For one thread only."""
        if self.memory:
            return kombu.Connection(self.url, transport_options={"polling_interval": 0.01})
        return kombu.Connection(
            self.url,
            transport=AmqpTransport,
            heartbeat=HEARTBEAT_SECONDS,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            ssl=self._ssl(),
            transport_options={
                # Of an answer that is waited for; where none is due, whoever reads says how long.
                "read_timeout": IO_TIMEOUT_SECONDS,
                "write_timeout": IO_TIMEOUT_SECONDS,
            },
        )

    def _ssl(self) -> dict[str, Any] | None:
        """By itself Kombu would take any certificate."""
        parts = urlsplit(self.url)
        if parts.scheme != "amqps":
            return None
        return {
            "cert_reqs": ssl.CERT_REQUIRED,
            "ca_certs": self.ca_path or None,
            "server_hostname": parts.hostname or "localhost",
        }

    def queue(self, name: str, generation: int = 1) -> kombu.Queue:
        arguments: dict[str, Any] = {
            "x-queue-type": self.queue_type,
            "x-dead-letter-exchange": UNROUTABLE.name,
        }
        if self.queue_type == "quorum":
            arguments["x-delivery-limit"] = DELIVERY_LIMIT
        else:
            arguments["x-max-priority"] = PRIORITY_MAX
        full = queue_name(name, generation)
        return kombu.Queue(full, JOBS, routing_key=full, durable=True, queue_arguments=arguments)

    @property
    def poison_queue(self) -> kombu.Queue:
        return self._plain_queue("jobs.poison", UNROUTABLE)

    @property
    def dead_queue(self) -> kombu.Queue:
        return self._plain_queue("jobs.dead", DEAD)

    def _plain_queue(self, name: str, exchange: kombu.Exchange) -> kombu.Queue:
        arguments = {"x-queue-type": self.queue_type}
        return kombu.Queue(name, exchange, durable=True, queue_arguments=arguments)

    def declare(self, connection: kombu.Connection, queues: Mapping[str, int]) -> None:
        """Exchanges, the poison queue and those of `queues`: name -> generation."""
        channel = connection.channel()
        try:
            for exchange in EXCHANGES:
                exchange(channel).declare()
            for name, generation in queues.items():
                self.queue(name, generation)(channel).declare()
            if not self.memory:  # nobody reads it there, and it would grow without bound
                self.poison_queue(channel).declare()
        finally:
            _close(channel)

    def declare_dead(self, connection: kombu.Connection) -> None:
        """The dead-letter queue. Only servers declare it, after they have re-created what a
        broker without it must have lost: its presence says that this broker remembers."""
        if self.memory:
            return
        channel = connection.channel()
        try:
            self.dead_queue(channel).declare()
        finally:
            _close(channel)

    def remembers(self, connection: kombu.Connection) -> bool:
        """False where the broker is new, or lost its data."""
        return not self.memory and self._depth(connection, self.dead_queue) is not None

    def depth(self, connection: kombu.Connection, name: str, generation: int) -> int | None:
        """Messages of a queue that are ready to be delivered; None where it does not exist."""
        return self._depth(connection, self.queue(name, generation))

    def _depth(self, connection: kombu.Connection, queue: kombu.Queue) -> int | None:
        channel = connection.channel()
        try:
            declared = queue(channel).queue_declare(passive=True)
        except ChannelError as error:
            if str(getattr(error, "reply_code", "")) != "404":  # text on the memory transport
                raise
            return None
        finally:
            _close(channel)
        return int(declared.message_count)


def queue_name(name: str, generation: int = 1) -> str:
    return f"jobs.q.{name}" if generation == 1 else f"jobs.q.{name}@{generation}"


def queue_of(full_name: str) -> str:
    """The queue that the broker carries under this name, in whatever generation."""
    return full_name.removeprefix("jobs.q.").partition("@")[0]


def _close(channel: Any) -> None:
    # A channel error (404, 406) has closed it already.
    if getattr(channel, "is_open", True):
        channel.close()


def broker_errors(connection: kombu.Connection) -> tuple[type[Exception], ...]:
    """What a broken connection or channel raises, time limits of the socket included."""
    return (
        *connection.connection_errors,
        *connection.channel_errors,
        BrokerUnavailable,
        TimeoutError,
        OSError,
    )


def abandon(connection: kombu.Connection) -> None:
    """Closes the socket without a goodbye, for which a frozen broker would let us wait for ever."""
    if connection.connected:
        if connection.transport_cls == "memory":
            connection.release()
        else:
            connection.connection.transport.sock.settimeout(0)  # TLS waits for an answer to its own
            connection.connection.collect()
