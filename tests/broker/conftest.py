"""Against a real RabbitMQ: what Kombu's memory transport cannot do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import kombu
import pytest

from jobsvc.broker.publisher import Message, Publisher
from jobsvc.broker.topology import Broker
from jobsvc.core.model import Dispatch
from tests.store.house import new_id
from worker.runtime.consumer import Consumer, Delivery

SECONDS_MAX = 15.0


class Generations:
    """Which queues are known, as a database would; serves publishers and consumers."""

    def __init__(self, **known: int) -> None:
        self.known: dict[str, int] = dict(known)

    def __call__(self, names: Iterable[str]) -> Mapping[str, int]:
        for name in names:
            self.known.setdefault(name, 1)
        return dict(self.known)

    def generations(self, names: Sequence[str]) -> Mapping[str, int]:
        return {name: self(names)[name] for name in names}

    def leave_behind(self, name: str, broken: int) -> None:
        if self.known[name] == broken:
            self.known[name] += 1


class Inbox:
    """A receiver that keeps what comes, and that tests wait on."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.deliveries: list[Delivery] = []
        self.cancels: list[str] = []
        self.lost: list[int] = []
        self.open = True
        self.on_arrival: Callable[[Delivery], None] = lambda delivery: None

    def on_deliveries(self, deliveries: Sequence[Delivery]) -> bool:
        if not self.open:
            return False
        for delivery in deliveries:
            self.on_arrival(delivery)
        with self.changed:
            self.deliveries += deliveries
            self.changed.notify_all()
        return True

    def on_channel_lost(self, epoch: int) -> None:
        with self.changed:
            self.lost.append(epoch)
            self.changed.notify_all()

    def on_cancel_told(self, job_id: str) -> None:
        with self.changed:
            self.cancels.append(job_id)
            self.changed.notify_all()

    @property
    def ids(self) -> list[str]:
        return [delivery.job_id for delivery in self.deliveries]

    def wait(self, condition: Callable[[], bool], seconds: float = SECONDS_MAX) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, seconds), "it never came"

    def wait_for(self, *job_ids: str) -> None:
        self.wait(lambda: set(job_ids) <= set(self.ids))


class Hands:
    """Does to a broker what is none of our code's business; a connection for each thing."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def do(self, body: Callable[[Any], Any]) -> Any:
        with self.broker.connection() as connection:
            return body(connection.default_channel)

    def declare(self, name: str, **arguments: object) -> None:
        self.do(
            lambda channel: channel.queue_declare(
                name, durable=True, auto_delete=False, arguments=arguments
            )
        )

    def delete(self, name: str) -> None:
        self.do(lambda channel: channel.queue_delete(name))

    def put(self, exchange: str, key: str, body: bytes, **options: Any) -> None:
        def publish(channel: Any) -> None:
            channel.confirm_select()
            message = channel.prepare_message(body, **options)
            channel.basic_publish_confirm(message, exchange=exchange, routing_key=key)

        self.do(publish)

    def take_all(self, name: str) -> list[Any]:
        """All messages that are ready."""

        def take(channel: Any) -> list[Any]:
            found = []
            while message := channel.basic_get(name, no_ack=True):
                found.append(message)
            return found

        return list(self.do(take))

    def bodies(self, name: str) -> list[str]:
        return [bytes_of(message).decode(errors="replace") for message in self.take_all(name)]

    def depth(self, name: str) -> int | None:
        with self.broker.connection() as connection:
            return self.broker._depth(connection, kombu.Queue(name))


def bytes_of(message: Any) -> bytes:
    body = message.body
    return body.encode() if isinstance(body, str) else bytes(body)


def dispatch(queue: str, job_id: str | None = None, **fields: Any) -> Dispatch:
    values: dict[str, Any] = {
        "outbox_id": 1,
        "kind": "job",
        "job_id": job_id or new_id(),
        "job_type": "demo",
        "queue": queue,
        "priority": 0,
        "attempt": 0,
    }
    return Dispatch(**(values | fields))


def put(publisher: Publisher, *messages: Message) -> frozenset[int]:
    """Answers which of them were refused."""
    publisher.connect()
    publisher._send(messages)
    return publisher.settle()


@pytest.fixture
def broker(broker_url: str) -> Broker:
    return Broker(broker_url)


@pytest.fixture
def hands(broker: Broker) -> Hands:
    return Hands(broker)


@pytest.fixture
def known() -> Generations:
    return Generations(default=1)


@pytest.fixture
def publisher(broker: Broker, known: Generations) -> Iterator[Publisher]:
    made = Publisher(broker, known, known.leave_behind)
    yield made
    made.close()


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


StartConsumer = Callable[..., Consumer]


@pytest.fixture
def start_consumer(broker: Broker, inbox: Inbox, known: Generations) -> Iterator[StartConsumer]:
    started: list[Consumer] = []

    def start(
        *queues: str,
        prefetch: int = 10,
        receiver: Inbox = inbox,
        on: Broker = broker,
        wait: bool = True,
    ) -> Consumer:
        consumer = Consumer(on, queues or ("default",), receiver, known, prefetch)
        consumer.start()
        started.append(consumer)
        if wait:
            assert consumer.wait_consuming(SECONDS_MAX)
        return consumer

    yield start
    for consumer in started:
        if consumer._thread.is_alive():
            consumer.stop()
