"""Publishing: persistent, mandatory, confirmed; and the fan-out of hints and control messages.

Confirms are pipelined and matched by their tags here. py-amqp's own waiting does not look at tags:
after one time-out, the late ack of message A satisfies the wait for message B. So a time-out
always ends the connection (jobsvc closes it and publishes again on a new one).
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import kombu

from jobsvc.broker.topology import (
    CONTROL,
    DEAD,
    HINT,
    JOBS,
    UNROUTABLE,
    Broker,
    BrokerUnavailable,
    abandon,
    broker_errors,
    queue_name,
)
from jobsvc.core.model import Change, Dispatch

CONFIRM_TIMEOUT_SECONDS = 10.0
CORK: int | None = getattr(socket, "TCP_CORK", None)
HINT_PAIRS_MAX = 200


@dataclass(frozen=True, slots=True)
class Message:
    exchange: str
    routing_key: str
    body: bytes
    priority: int = 0


def job_message(job_id: str, queue: str, generation: int, priority: int) -> Message:
    body = f'{{"v": 1, "job_id": "{job_id}"}}'.encode()
    return Message(JOBS.name, queue_name(queue, generation), body, priority)


def dead_message(dispatch: Dispatch) -> Message:
    body = {
        "v": 1,
        "job_id": dispatch.job_id,
        "job_type": dispatch.job_type,
        "queue": dispatch.queue,
        "attempt": dispatch.attempt,
        "error_type": dispatch.error_type,
    }
    return Message(DEAD.name, "", json.dumps(body).encode())


def poison_message(body: bytes) -> Message:
    return Message(UNROUTABLE.name, "", body)


class Publisher:
    """One connection to publish on, apart from any that consumes: a broker that runs out of memory
    or disk blocks those that publish. For one thread; connects when first used."""

    def __init__(
        self,
        broker: Broker,
        generations: Callable[[Iterable[str]], Mapping[str, int]],
        on_new_broker: Callable[[], None] | None = None,
    ) -> None:
        """`generations` makes the queues that it is given known and answers all that are known
        (name -> generation). `on_new_broker` is called before anything is declared on a broker
        that has lost what it held; without it this publisher leaves that to others."""
        self.broker = broker
        self._generations_of = generations
        self._on_new_broker = on_new_broker
        self._generations: Mapping[str, int] = {}
        self._connection: kombu.Connection | None = None
        self._channel: Any = None
        self._tag = 0
        self._unconfirmed: set[int] = set()
        self._trouble = ""

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def connect(self) -> kombu.Connection:
        """Raises BrokerUnavailable."""
        if self._connection is not None:
            return self._connection
        connection = self.broker.connection()
        try:
            connection.connect()
            if self._on_new_broker and not self.broker.remembers(connection):
                self._on_new_broker()
            self._generations = self._generations_of(())
            self.broker.declare(connection, self._generations)
            if self._on_new_broker:
                self.broker.declare_dead(connection)
            self._channel = connection.channel()
            if not self.broker.memory:
                self._listen(self._channel)
        except broker_errors(connection) as error:
            abandon(connection)
            raise BrokerUnavailable(f"cannot connect to the broker: {error}") from error
        except BaseException:
            abandon(connection)
            raise
        self._connection = connection
        return connection

    def publish(self, dispatches: Sequence[Dispatch]) -> None:
        """Returns once the broker has confirmed all. Raises BrokerUnavailable: any of them may or
        may not be there, and the connection is closed."""
        self.send(dispatches)
        self.settle()

    def send(self, dispatches: Sequence[Dispatch]) -> None:
        """The same without waiting: nothing is known of them until `settle` returns, which may be
        called once for many. Raises BrokerUnavailable, for all that was sent since."""
        with self._connected():
            self._declare_missing({d.queue for d in dispatches if d.kind == "job"})
            self._send([self._message(d) for d in dispatches])

    def settle(self) -> None:
        """Returns once the broker has confirmed all that was sent. Raises BrokerUnavailable."""
        with self._connected():
            self._await_confirms()

    def publish_poison(self, body: bytes) -> None:
        """Puts away what could not be read. Raises BrokerUnavailable."""
        self._publish([poison_message(body)])

    def _publish(self, messages: Sequence[Message]) -> None:
        with self._connected():
            self._send(messages)
            self._await_confirms()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        connection = self.connect()
        try:
            yield
        except broker_errors(connection) as error:
            self.close()
            raise BrokerUnavailable(f"lost the broker while publishing: {error}") from error

    def _send(self, messages: Sequence[Message]) -> None:
        with self._together():
            for message in messages:
                self._put(message, mandatory=True)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What is sent meanwhile goes out in as few packets as it fills: each costs the broker, and
        this process, nearly as much as a message. Linux alone knows how."""
        assert self._connection is not None
        if self.broker.memory or CORK is None:
            yield
            return
        sock = self._connection.connection.transport.sock
        sock.setsockopt(socket.IPPROTO_TCP, CORK, 1)
        yield
        sock.setsockopt(socket.IPPROTO_TCP, CORK, 0)  # where sending failed, the connection is over

    def hint(self, changes: Sequence[Change]) -> None:
        """Tells every server that these jobs changed. Raises BrokerUnavailable."""
        for start in range(0, len(changes), HINT_PAIRS_MAX):
            pairs = [[c.job_id, c.last_sequence] for c in changes[start : start + HINT_PAIRS_MAX]]
            self._fan_out(HINT.name, {"v": 1, "changes": pairs})

    def control(self, body: Mapping[str, Any]) -> None:
        """Tells every worker. Raises BrokerUnavailable."""
        self._fan_out(CONTROL.name, {"v": 1, **body})

    def keep_alive(self) -> None:
        """To be called at least every few seconds: sends and checks AMQP heartbeats. Raises
        BrokerUnavailable when the broker has been silent for too long."""
        connection = self._connection
        if connection is None or self.broker.memory:
            return
        try:
            connection.heartbeat_check()
            try:
                while True:
                    connection.drain_events(timeout=0.001)
            except TimeoutError:
                pass  # nothing more to read
        except broker_errors(connection) as error:
            self.close()
            raise BrokerUnavailable(f"lost the broker: {error}") from error

    def follow(self) -> None:
        """Starts over if a queue that is published to was left behind for its next generation.
        Raises BrokerUnavailable."""
        in_use = self._generations_of(())
        if any(in_use[name] != number for name, number in self._generations.items()):
            self.close()
            self.connect()

    def depth(self, queue: str) -> int | None:
        connection = self.connect()
        try:
            return self.broker.depth(connection, queue, self._generations.get(queue, 1))
        except broker_errors(connection) as error:
            self.close()
            raise BrokerUnavailable(f"lost the broker: {error}") from error

    def close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        self._tag = 0
        self._trouble = ""
        self._unconfirmed.clear()
        if connection is not None:
            abandon(connection)

    def _message(self, dispatch: Dispatch) -> Message:
        if dispatch.kind == "dead":
            return dead_message(dispatch)
        generation = self._generations[dispatch.queue]
        return job_message(dispatch.job_id, dispatch.queue, generation, dispatch.priority)

    def _declare_missing(self, names: set[str]) -> None:
        if missing := names - self._generations.keys():
            assert self._connection is not None
            self._generations = self._generations_of(missing)
            self.broker.declare(self._connection, {n: self._generations[n] for n in missing})

    def _fan_out(self, exchange: str, body: Mapping[str, Any]) -> None:
        encoded = json.dumps(body, separators=(",", ":")).encode()
        with self._connected():
            self._put(Message(exchange, "", encoded), mandatory=False, transient=True)

    def _put(self, message: Message, *, mandatory: bool, transient: bool = False) -> None:
        prepared = self._channel.prepare_message(
            message.body,
            priority=message.priority,
            content_type="application/json",
            content_encoding="utf-8",
            properties={"delivery_mode": 1 if transient else 2},
        )
        self._tag += 1
        if mandatory:
            self._unconfirmed.add(self._tag)
        self._channel.basic_publish(
            prepared,
            exchange=message.exchange,
            routing_key=message.routing_key,
            mandatory=mandatory,
        )

    def _listen(self, channel: Any) -> None:
        channel.confirm_select()
        channel.events["basic_ack"].add(self._on_ack)
        channel.events["basic_nack"].add(self._on_nack)
        channel.events["basic_return"].add(self._on_return)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._unconfirmed -= {t for t in self._unconfirmed if t <= tag}
        else:
            self._unconfirmed.discard(tag)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._trouble = "the broker refused a message"
        self._on_ack(tag, multiple)

    def _on_return(self, _error: Exception, exchange: str, routing_key: str, _: Any) -> None:
        self._trouble = f"no queue takes {routing_key or exchange}"

    def _await_confirms(self) -> None:
        if self.broker.memory:
            self._unconfirmed.clear()
            return
        deadline = time.monotonic() + CONFIRM_TIMEOUT_SECONDS
        while self._unconfirmed:
            assert self._connection is not None
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("no confirmation in time")
            self._connection.drain_events(timeout=remaining)
        if trouble := self._trouble:
            self.close()
            raise BrokerUnavailable(trouble)
