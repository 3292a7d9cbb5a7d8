"""Publishing: persistent, mandatory, confirmed; and the fan-out of hints and control messages.

Confirms are pipelined and matched by their tags here. py-amqp's own waiting does not look at tags:
after one time-out, the late ack of message A satisfies the wait for message B. So a time-out
always ends the connection (jobsvc closes it and publishes again on a new one).
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import kombu

from jobsvc import telemetry
from jobsvc.broker.topology import (
    CONTROL,
    DEAD,
    HINT,
    JOBS,
    UNROUTABLE,
    Broker,
    BrokerBlocked,
    BrokerUnavailable,
    QueuesTaken,
    abandon,
    broker_errors,
    queue_name,
    queue_of,
)
from jobsvc.core.model import Change, Dispatch

CONFIRM_TIMEOUT_SECONDS = 10.0
CORK: int | None = getattr(socket, "TCP_CORK", None)
HINT_PAIRS_MAX = 200
REFUSED_TOLD_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Message:
    exchange: str
    routing_key: str
    body: bytes
    priority: int = 0
    outbox_id: int = 0


def job_message(dispatch: Dispatch, generation: int) -> Message:
    body = f'{{"v": 1, "job_id": "{dispatch.job_id}"}}'.encode()
    name = queue_name(dispatch.queue, generation)
    return Message(JOBS.name, name, body, dispatch.priority, dispatch.outbox_id)


def dead_message(dispatch: Dispatch) -> Message:
    body = {
        "v": 1,
        "job_id": dispatch.job_id,
        "job_type": dispatch.job_type,
        "queue": dispatch.queue,
        "attempt": dispatch.attempt,
        "error_type": dispatch.error_type,
    }
    return Message(DEAD.name, "", json.dumps(body).encode(), outbox_id=dispatch.outbox_id)


def poison_message(body: bytes) -> Message:
    return Message(UNROUTABLE.name, "", body)


class Publisher:
    """One connection to publish on, apart from any that consumes: a broker that runs out of memory
    or disk blocks those that publish. For one thread; connects when first used."""

    def __init__(
        self,
        broker: Broker,
        generations: Callable[[Iterable[str]], Mapping[str, int]],
        leave_behind: Callable[[str, int], None] = lambda name, generation: None,
        on_new_broker: Callable[[], None] | None = None,
    ) -> None:
        """`generations` makes the queues that it is given known and answers all that are known
        (name -> generation); `leave_behind` has the next one of a queue used. `on_new_broker` is
        called before anything is declared on a broker that has lost what it held; without it this
        publisher leaves that to others."""
        self.broker = broker
        self._generations_of = generations
        self._leave_behind = leave_behind
        self._on_new_broker = on_new_broker
        self._generations: Mapping[str, int] = {}
        self._lost: set[str] = set()  # queues to be declared again
        self._connection: kombu.Connection | None = None
        self._channel: Any = None
        self._tag = 0
        self._unconfirmed: dict[int, Message] = {}  # by tag, in order
        self._refused: list[Message] = []
        self._returned: set[tuple[str, str]] = set()  # exchange and key of what no queue took
        self._refusal_told = float("-inf")
        self._blocked = ""
        self._log = telemetry.get_logger("publisher")

    @property
    def connected(self) -> bool:
        """Whether the broker is there, and takes messages as far as it has said."""
        return self._connection is not None and not self._blocked

    def connect(self) -> kombu.Connection:
        """Raises BrokerUnavailable, and BrokerBlocked while the broker takes no messages: it does
        not even read what is asked then."""
        if self._connection is None:
            self._connection = self._connect()
        elif self._blocked:
            self.keep_alive()
        self._check_blocked()
        return self._connection

    def _check_blocked(self) -> None:
        if self._blocked:
            raise BrokerBlocked(self._blocked)

    def _connect(self) -> kombu.Connection:
        connection = self.broker.connection()
        try:
            connection.connect()
            if self._on_new_broker and not self.broker.remembers(connection):
                self._on_new_broker()
            self._declare(connection, self._generations_of(()))
            if self._on_new_broker:
                self.broker.declare_dead(connection)
            self._channel = connection.channel()
            if not self.broker.memory:
                self._listen(connection.connection, self._channel)
        except broker_errors(connection) as error:
            abandon(connection)
            raise BrokerUnavailable(f"cannot connect to the broker: {error}") from error
        except BaseException:
            abandon(connection)
            raise
        return connection

    def _declare(self, connection: kombu.Connection, queues: Mapping[str, int]) -> None:
        """Those that are there with other arguments are left behind for their next generation."""
        while True:
            try:
                self.broker.declare(connection, queues)
            except QueuesTaken as taken:
                self._log.warning("queues left behind", queues=taken.queues, reason=str(taken))
                for name, generation in taken.queues.items():
                    self._leave_behind(name, generation)
                known = self._generations_of(())
                next_ones = {name: known[name] for name in queues}
                if next_ones == queues:
                    raise
                queues = next_ones
            else:
                self._generations = {**self._generations, **queues}
                self._lost -= queues.keys()
                return

    def publish(self, dispatches: Sequence[Dispatch]) -> frozenset[int]:
        """Returns once the broker has answered for all; answers the outbox rows of those that it
        refused. Raises BrokerUnavailable: any of them may or may not be there."""
        self.send(dispatches)
        return self.settle()

    def send(self, dispatches: Sequence[Dispatch]) -> None:
        """The same without waiting: nothing is known of them until `settle` returns, which may be
        called once for many. Raises BrokerUnavailable, for all that was sent since."""
        with self._connected() as connection:
            self._declare_missing(connection, {d.queue for d in dispatches if d.kind == "job"})
            self._send([self._message(d) for d in dispatches])

    def settle(self) -> frozenset[int]:
        """Returns once the broker has answered for all that was sent; answers the outbox rows of
        what it refused, or had no queue for: that holds up nothing else. Raises
        BrokerUnavailable."""
        with self._connected() as connection:
            self._await_confirms()
            refused, self._refused = self._refused, []
            if refused:
                self._tell_refused(refused)
            self._mend(connection)
        return frozenset(message.outbox_id for message in refused)

    def _tell_refused(self, refused: Sequence[Message]) -> None:
        """Once in a while: they are sent again and again."""
        if time.monotonic() - self._refusal_told >= REFUSED_TOLD_SECONDS:
            self._refusal_told = time.monotonic()
            names = Counter(message.routing_key or message.exchange for message in refused)
            self._log.warning("the broker took no messages for some queues", queues=dict(names))

    def _mend(self, connection: kombu.Connection) -> None:
        """What had no queue gets one before it is sent again."""
        returned, self._returned = self._returned, set()
        for exchange, routing_key in returned:
            if exchange == JOBS.name:
                self._lost.add(queue_of(routing_key))
            elif exchange == DEAD.name and self._on_new_broker:
                self.broker.declare_dead(connection)

    def publish_poison(self, body: bytes) -> None:
        """Puts away what could not be read. Raises BrokerUnavailable."""
        with self._connected():
            self._send([poison_message(body)])
        if self.settle():
            raise BrokerUnavailable("the broker has no place for it")

    @contextmanager
    def _connected(self) -> Iterator[kombu.Connection]:
        connection = self.connect()
        try:
            yield connection
        except BrokerBlocked:
            raise
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
            self._hint(pairs)

    def announce(self) -> None:
        """A hint of nothing: tells servers of other services that we are here too. Raises
        BrokerUnavailable."""
        self._hint([])

    def _hint(self, pairs: Sequence[Sequence[object]]) -> None:
        body = {"v": 1, "service": self.broker.service, "changes": pairs}
        self._fan_out(HINT.name, body)

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
        self._blocked = ""
        self._unconfirmed.clear()
        self._refused.clear()
        self._returned.clear()
        if connection is not None:
            abandon(connection)

    def _message(self, dispatch: Dispatch) -> Message:
        if dispatch.kind == "dead":
            return dead_message(dispatch)
        return job_message(dispatch, self._generations[dispatch.queue])

    def _declare_missing(self, connection: kombu.Connection, names: set[str]) -> None:
        if missing := (names - self._generations.keys()) | (names & self._lost):
            known = self._generations_of(missing)
            self._declare(connection, {name: known[name] for name in missing})

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
            self._unconfirmed[self._tag] = message
        self._channel.basic_publish(
            prepared,
            exchange=message.exchange,
            routing_key=message.routing_key,
            mandatory=mandatory,
        )

    def _listen(self, connection: Any, channel: Any) -> None:
        connection.on_blocked = self._on_blocked
        connection.on_unblocked = self._on_unblocked
        channel.confirm_select()
        channel.events["basic_ack"].add(self._on_ack)
        channel.events["basic_nack"].add(self._on_nack)
        channel.events["basic_return"].add(self._on_return)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        """A broker confirms what no queue took as well, right after it has returned it."""
        for message in self._answered(tag, multiple):
            if self._returned and (message.exchange, message.routing_key) in self._returned:
                self._refused.append(message)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused += self._answered(tag, multiple)

    def _answered(self, tag: int, multiple: bool) -> list[Message]:
        tags = list(takewhile(tag.__ge__, self._unconfirmed)) if multiple else [tag]
        found = (self._unconfirmed.pop(each, None) for each in tags)
        return [message for message in found if message is not None]

    def _on_return(self, _error: Exception, exchange: str, routing_key: str, _: Any) -> None:
        self._returned.add((exchange, routing_key))

    def _on_blocked(self, reason: str) -> None:
        self._blocked = "the broker is short of memory or disk and takes no messages"

    def _on_unblocked(self) -> None:
        self._blocked = ""

    def _await_confirms(self) -> None:
        if self.broker.memory:
            self._unconfirmed.clear()
            return
        deadline = time.monotonic() + CONFIRM_TIMEOUT_SECONDS
        while self._unconfirmed:
            self._check_blocked()
            assert self._connection is not None
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("no confirmation in time")
            self._connection.drain_events(timeout=remaining)
