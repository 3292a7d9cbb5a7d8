"""Names on the broker and the arguments that go with them; both sides declare the same.

Arguments never change under one name (that is 406 PRECONDITION_FAILED): a queue of jobs that needs
others, or that cannot be repaired, takes the next generation, whose number is in the database.
What people only look at, and what only tells sooner, is used as it is found: an alert goes on to
read the queue that it reads, and no name but those that jobs go through can stop the work.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import kombu
from kombu.exceptions import ChannelError

from jobsvc import telemetry
from jobsvc.broker.transport import AmqpTransport
from jobsvc.errors import JobsvcError

PRIORITY_MAX = 9
DELIVERY_LIMIT = 20

JOBS = kombu.Exchange("jobs", "direct", durable=True)
DEAD = kombu.Exchange("jobs.dead", "fanout", durable=True)
UNROUTABLE = kombu.Exchange("jobs.unroutable", "fanout", durable=True)
HINT = kombu.Exchange("jobs.hint", "fanout", durable=True, delivery_mode="transient")
CONTROL = kombu.Exchange("jobs.control", "fanout", durable=True, delivery_mode="transient")
BESIDE_JOBS = (DEAD, UNROUTABLE, HINT, CONTROL)

NOT_FOUND = "404"
RESOURCE_LOCKED = "405"  # exclusive to a connection of somebody else
PRECONDITION_FAILED = "406"

CONNECT_TIMEOUT_SECONDS = 5.0
IO_TIMEOUT_SECONDS = 10.0
HEARTBEAT_SECONDS = 10


class BrokerUnavailable(JobsvcError):
    """The broker did not answer, refused, or lost the connection; nothing is known of what was
    under way."""


class BrokerBlocked(BrokerUnavailable):
    """The broker is short of memory or disk and takes no messages; the connection stays."""


class QueuesTaken(BrokerUnavailable):
    """Queues that jobs go through are there, but not as ours: `queues`, name -> generation."""

    def __init__(self, queues: Mapping[str, int], reason: str) -> None:
        super().__init__(reason)
        self.queues = queues


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is and what its queues are made of."""

    url: str
    queue_type: str = "classic"
    ca_path: str = ""  # of a PEM file, for amqps://; "": whom the system trusts
    service: str = ""  # whose it is: what tells one service from another on the same vhost

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
        """Exchanges, the poison queue and those of `queues`: name -> generation. Raises
        QueuesTaken, after it has looked at all of them."""
        with _channel(connection) as channel:
            JOBS(channel).declare()
        for exchange in BESIDE_JOBS:
            self._declare_exchange(connection, exchange)
        if not self.memory:  # nobody reads it there, and it would grow without bound
            self._declare_beside_jobs(connection, self.poison_queue)
        self._declare_queues(connection, queues)

    def _declare_queues(self, connection: kombu.Connection, queues: Mapping[str, int]) -> None:
        taken: dict[str, int] = {}
        reasons: list[str] = []
        channel = connection.channel()
        for name, generation in queues.items():
            try:
                self.queue(name, generation)(channel).declare()
            except ChannelError as error:
                if _code(error) not in {PRECONDITION_FAILED, RESOURCE_LOCKED}:
                    raise
                taken[name] = generation
                reasons.append(str(error))
                channel = connection.channel()  # the other one has ended
        channel.close()
        if taken:
            raise QueuesTaken(taken, "; ".join(reasons))

    def declare_dead(self, connection: kombu.Connection) -> None:
        """The dead-letter queue. Only servers declare it, and only one that has noted to re-create
        what a broker without it must have lost: its presence says that this broker remembers."""
        if not self.memory:
            self._declare_beside_jobs(connection, self.dead_queue)

    def _declare_exchange(self, connection: kombu.Connection, exchange: kombu.Exchange) -> None:
        """Of any type one serves: what we send and bind has no routing key."""
        try:
            with _channel(connection) as channel:
                exchange(channel).declare()
        except ChannelError as error:
            _used_as_found(exchange.name, error)

    def _declare_beside_jobs(self, connection: kombu.Connection, queue: kombu.Queue) -> None:
        try:
            with _channel(connection) as channel:
                queue(channel).queue_declare()
        except ChannelError as error:
            _used_as_found(queue.name, error)
        try:
            with _channel(connection) as channel:
                queue(channel).queue_bind()
        except ChannelError as error:
            telemetry.get_logger("broker").error(
                "cannot be bound, and gets nothing", name=queue.name, reason=str(error)
            )

    def listen(
        self,
        connection: kombu.Connection,
        exchange: kombu.Exchange,
        on_message: Callable[[Any], None],
        on_decode_error: Callable[[Any, Exception], None] | None = None,
    ) -> None:
        """Consumes what the exchange fans out, from a queue that ends with the connection."""
        self._declare_exchange(connection, exchange)
        channel = connection.channel()
        name = channel.queue_declare("", exclusive=True, auto_delete=True, durable=False).queue
        channel.queue_bind(name, exchange.name, "")
        kombu.Consumer(
            channel,
            [kombu.Queue(name, no_declare=True)],
            on_message=on_message,
            no_ack=True,
            auto_declare=False,
            on_decode_error=on_decode_error,
        ).consume()

    def remembers(self, connection: kombu.Connection) -> bool:
        """False where the broker is new, or lost its data."""
        if self.memory:
            return False
        try:
            return self._depth(connection, self.dead_queue) is not None
        except ChannelError:  # it is there, though not for us
            return True

    def depth(self, connection: kombu.Connection, name: str, generation: int) -> int | None:
        """Messages of a queue that are ready to be delivered; None where it does not exist."""
        return self._depth(connection, self.queue(name, generation))

    def _depth(self, connection: kombu.Connection, queue: kombu.Queue) -> int | None:
        try:
            with _channel(connection) as channel:
                declared = queue(channel).queue_declare(passive=True)
        except ChannelError as error:
            if _code(error) != NOT_FOUND:
                raise
            return None
        return int(declared.message_count)


def queue_name(name: str, generation: int = 1) -> str:
    return f"jobs.q.{name}" if generation == 1 else f"jobs.q.{name}@{generation}"


def queue_of(full_name: str) -> str:
    """The queue that the broker carries under this name, in whatever generation."""
    return full_name.removeprefix("jobs.q.").partition("@")[0]


@contextmanager
def _channel(connection: kombu.Connection) -> Iterator[Any]:
    """One of its own, as what the broker refuses ends it."""
    channel = connection.channel()
    try:
        yield channel
    finally:
        if getattr(channel, "is_open", True):  # a channel error has closed it already
            channel.close()


def _code(error: ChannelError) -> str:
    return str(getattr(error, "reply_code", ""))  # text on the memory transport


def _used_as_found(name: str, error: ChannelError) -> None:
    telemetry.get_logger("broker").warning(
        "not as we declare it, and used as it is", name=name, reason=str(error)
    )


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
