"""The thread that owns the connection to consume on.

It waits on the socket and on a pipe that whoever has an acknowledgement writes to, hands what it
receives on, and never blocks on anything else. Whatever goes wrong ends in a new connection with a
new channel and new consumers: one that the broker cancelled is connected, but deaf.
"""

from __future__ import annotations

import json
import os
import re
import select
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

import kombu

from jobsvc import telemetry, vital
from jobsvc.broker.publisher import Publisher
from jobsvc.broker.topology import (
    CONTROL,
    Broker,
    BrokerUnavailable,
    QueuesTaken,
    abandon,
    broker_errors,
)
from jobsvc.core.backoff import Backoff
from jobsvc.errors import DatabaseUnavailable
from worker.runtime.acknowledging import Unacknowledged

TICK_SECONDS = 1.0
MEMORY_TICK_SECONDS = 0.05
FRAMES_MAX = 1500  # three a message; then acknowledgements get their turn again
INTERNAL_ERROR = 541
# For how long an acknowledgement may wait to share a call with those before it.
SHARE_SECONDS = 0.01

# What our own publishers send; whatever else may be right is looked at with more care.
_job_message = re.compile(
    rb'\{"v": 1, "job_id": "([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"\}'
).fullmatch


class Delivery(NamedTuple):
    """A message that a worker holds. `tag` means something on the channel of `epoch` only."""

    job_id: str
    priority: int
    queue: str
    tag: int
    epoch: int
    received: float  # monotonic seconds


class Receiver(Protocol):
    """Called on the consumer's thread; must not block."""

    def on_deliveries(self, deliveries: Sequence[Delivery]) -> bool:
        """False: it takes no more, and these go back at once, for another worker to have."""

    def on_channel_lost(self, epoch: int) -> None:
        """Deliveries of this epoch and before will be delivered again."""

    def on_cancel_told(self, job_id: str) -> None:
        """Some server has requested the cancel of a running job."""


class Queues(Protocol):
    """Which generation of a queue is in use; both calls ask the database."""

    def generations(self, names: Sequence[str]) -> Mapping[str, int]: ...

    def leave_behind(self, name: str, broken: int) -> None: ...


class Consumer:
    def __init__(
        self,
        broker: Broker,
        queue_names: Sequence[str],
        receiver: Receiver,
        queues: Queues,
        prefetch: int,
    ) -> None:
        """`prefetch` 0: consume nothing."""
        self._broker = broker
        self._names = queue_names
        self._receiver = receiver
        self._queues = queues
        self._wanted = self._prefetch = prefetch
        self._acks: deque[tuple[Sequence[Delivery], bool]] = deque()
        self._unacknowledged = Unacknowledged()
        self._received: list[Delivery] = []  # in one read, to be handed on together
        self._stopping = threading.Event()
        self._resumed = threading.Event()
        self._resumed.set()
        self._epoch = 0
        self._generations: dict[str, int] = {}
        self._broken: dict[str, int] = {}
        self._channel: Any = None
        self._consumer_tags: list[str] = []
        self._consuming = threading.Event()
        self._poison = Publisher(broker, lambda _: {})
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._woken = False
        self._log = telemetry.get_logger("consumer")
        self._thread = vital.thread("consumer", self._run)

    def start(self) -> None:
        self._thread.start()

    def wait_consuming(self, seconds: float) -> bool:
        return self._consuming.wait(seconds)

    @property
    def consuming(self) -> bool:
        """Connected, and every queue has a consumer (or none is wanted just now)."""
        return self._consuming.is_set()

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """From any thread. Of a channel that is gone: forgotten, the message comes again."""
        if deliveries:
            self._acks.append((deliveries, True))
            self._wake()

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """From any thread. For another worker to have, at once."""
        if deliveries:
            self._acks.append((deliveries, False))
            self._wake()

    def set_prefetch(self, prefetch: int) -> None:
        """From any thread. How many unacknowledged messages to hold; 0 stops consuming and keeps
        the connection."""
        if prefetch != self._wanted:
            self._wanted = prefetch
            self._wake()

    def suspend(self) -> None:
        """From any thread. Lets go of all messages, for others to have, until `resume`."""
        self._resumed.clear()
        self._wake()

    def resume(self) -> None:
        self._resumed.set()

    def stop(self) -> None:
        """Sends the acknowledgements that wait and closes; what is unacknowledged comes again, to
        whoever consumes then."""
        self._stopping.set()
        self._resumed.set()
        self._wake()
        self._thread.join()
        self._poison.close()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _wake(self) -> None:
        if not self._woken:  # else it has not looked yet at what made others wake it
            self._woken = True
            with suppress(BlockingIOError):
                os.write(self._wake_out, b"w")

    def _run(self) -> None:
        backoff = Backoff()
        trouble: Exception | None = None
        while not self._stopping.is_set():
            self._resumed.wait()
            connection = self._broker.connection()
            try:
                if trouble is not None:
                    self._repair(trouble)
                    trouble = None
                self._open(connection)
                backoff.reset()
                self._consume(connection)
                continue
            except DatabaseUnavailable:  # which the database's own log has told
                pass
            except broker_errors(connection) as error:
                self._log.warning("consuming interrupted", reason=str(error))
                trouble = error
            except Exception:  # noqa: BLE001 - logged; a deaf worker is worse
                self._log.exception("consumer failed")
            finally:
                self._lose_channel()
                abandon(connection)
            self._stopping.wait(backoff.next())

    def _open(self, connection: kombu.Connection) -> None:
        self._generations = dict(self._queues.generations(self._names))
        connection.connect()
        self._broker.declare(connection, self._generations)
        self._channel = connection.channel()
        self._epoch += 1
        self._broker.listen(connection, CONTROL, self._receive_control, self._pass_over)
        self._subscribe()

    def _subscribe(self) -> None:
        self._prefetch = self._wanted
        if self._prefetch:
            # Kombu's memory transport knows no priorities: take all, the receiver sorts.
            if not self._broker.memory:
                self._channel.basic_qos(0, self._prefetch, False)
            for name, generation in self._generations.items():
                queue = self._broker.queue(name, generation)(self._channel)
                # Not Kombu's Consumer: it makes a message of its own of each, which costs as much
                # as all that follows.
                queue.consume(name, partial(self._receive, name), no_ack=False)
                self._consumer_tags.append(name)
        self._broken.clear()
        self._consuming.set()
        self._log.debug("consuming", queues=list(self._names), prefetch=self._prefetch)

    def _consume(self, connection: kombu.Connection) -> None:
        while self._resumed.is_set() and not self._stopping.is_set():
            self._send_acks()
            if self._wanted != self._prefetch:
                self._resubscribe()
            self._read(connection)
            connection.heartbeat_check()
        self._send_acks()

    def _resubscribe(self) -> None:
        for tag in self._consumer_tags:
            self._channel.basic_cancel(tag)
        self._consumer_tags.clear()
        self._subscribe()

    def _read(self, connection: kombu.Connection) -> None:
        if self._broker.memory:
            self._drain_memory(connection)
            return
        transport = connection.connection.transport
        wait = SHARE_SECONDS if self._unacknowledged.waiting else TICK_SECONDS
        unread = transport.unread
        ready, _, _ = select.select([transport.sock, self._wake_in], [], [], 0 if unread else wait)
        if self._wake_in in ready:
            with suppress(BlockingIOError):
                os.read(self._wake_in, 65536)
            self._woken = False
        if transport.sock in ready or unread:
            self._take_in(connection.connection)

    def _take_in(self, connection: Any) -> None:
        """All that has come, of py-amqp's connection: its own `drain_events` sets the socket's
        timeout, and back, for each of a message's three frames."""
        sock = connection.transport.sock
        before = sock.gettimeout()
        frames: list[Any] = []
        sock.settimeout(0)
        try:
            with suppress(TimeoutError):  # nothing more to read
                while len(frames) < FRAMES_MAX:
                    frames.append(connection.transport.read_frame())
        finally:
            sock.settimeout(before)
        # Only now: what a frame says may make py-amqp ask the broker something, and wait for it.
        try:
            for frame in frames:
                connection.on_inbound_frame(frame)
        finally:
            self._hand_on()

    def _drain_memory(self, connection: kombu.Connection) -> None:
        try:
            with suppress(TimeoutError):
                while not self._acks and not self._received:
                    connection.drain_events(timeout=MEMORY_TICK_SECONDS)
        finally:
            self._hand_on()

    def _hand_on(self) -> None:
        """What was received goes to the receiver in one call."""
        if received := self._received:
            self._received = []
            if not self._receiver.on_deliveries(received):
                self.give_back(received)

    def _send_acks(self) -> None:
        done: list[int] = []
        while self._acks:
            deliveries, is_done = self._acks.popleft()
            for delivery in deliveries:
                if delivery.epoch != self._epoch:
                    continue
                if is_done:
                    done.append(delivery.tag)
                else:
                    self._unacknowledged.remove(delivery.tag)
                    self._channel.basic_reject(delivery.tag, requeue=True)
        if self._broker.memory:  # it knows no acknowledgement of many
            singles = done
        elif done or self._unacknowledged.waiting:
            # What is kept takes up prefetch, so of a small one nothing is.
            up_to, singles = self._unacknowledged.take(done, self._prefetch // 8)
            if up_to is not None:
                self._channel.basic_ack(up_to, multiple=True)
        else:
            return
        for tag in singles:
            self._channel.basic_ack(tag)

    def _receive(self, queue: str, message: Any) -> None:
        try:
            job_id = _read_job_id(_bytes(message.body))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._put_away(message, error)
            return
        if not self._broker.memory:
            self._unacknowledged.add(message.delivery_tag)
        self._received.append(
            Delivery(
                job_id=job_id,
                priority=message.properties.get("priority") or 0,
                queue=queue,
                tag=message.delivery_tag,
                epoch=self._epoch,
                received=time.monotonic(),
            )
        )

    def _put_away(self, message: Any, error: Exception) -> None:
        self._log.error("unreadable message put away", reason=str(error)[:200])
        try:
            self._poison.publish_poison(_bytes(message.body))
        except BrokerUnavailable as refused:  # then it is the broker's to put away, if it can
            self._log.error("an unreadable message was not taken", reason=str(refused))
            self._channel.basic_reject(message.delivery_tag, requeue=False)
        else:
            self._channel.basic_ack(message.delivery_tag)

    def _receive_control(self, message: Any) -> None:
        try:
            job_id = _canonical_id(json.loads(message.body)["cancel"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._pass_over(message, error)
            return
        self._receiver.on_cancel_told(job_id)

    def _pass_over(self, _message: Any, error: Exception) -> None:
        self._log.warning("unreadable control message", reason=str(error)[:200])

    def _lose_channel(self) -> None:
        self._consuming.clear()
        self._channel = None
        self._consumer_tags.clear()
        self._acks.clear()
        self._unacknowledged = Unacknowledged()
        self._receiver.on_channel_lost(self._epoch)

    def _repair(self, error: BaseException) -> None:
        """A queue that is not as ours is left behind for its next generation. One that cannot be
        used is deleted and declared anew, or left behind too. The jobs are in the database either
        way."""
        if isinstance(error, QueuesTaken):
            for name, generation in error.queues.items():
                self._queues.leave_behind(name, generation)
        code = getattr(error, "code", None) or getattr(error, "reply_code", None)
        if code == INTERNAL_ERROR:  # of one of them; the broker does not say which
            for name, generation in self._generations.items():
                self._broken[name] = self._broken.get(name, 0) + 1
                if self._broken[name] > 1 or not self._delete(name, generation):
                    self._queues.leave_behind(name, generation)

    def _delete(self, name: str, generation: int) -> bool:
        connection = self._broker.connection()
        try:
            connection.connect()
            self._broker.queue(name, generation)(connection.default_channel).delete()
        except broker_errors(connection) as error:
            self._log.error("cannot delete a broken queue", queue=name, reason=str(error))
            return False
        finally:
            abandon(connection)
        self._log.warning("deleted a broken queue", queue=name)
        return True


def _read_job_id(body: bytes) -> str:
    """Raises ValueError, KeyError, TypeError or RecursionError for what names no job."""
    if match := _job_message(body):
        return match[1].decode()
    fields = json.loads(body)
    if fields["v"] != 1:
        raise ValueError(f"version {fields['v']!r}")
    return _canonical_id(fields["job_id"])


def _canonical_id(value: Any) -> str:
    """Raises ValueError for anything but a job id."""
    if not isinstance(value, str):
        raise ValueError("not a job id")
    job_id = str(uuid.UUID(value))
    if job_id != value:
        raise ValueError("not a canonical job id")
    return job_id


def _bytes(body: Any) -> bytes:
    return body.encode() if isinstance(body, str) else bytes(body)
