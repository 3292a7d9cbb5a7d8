"""A look at the broker past the service: raw messages in, raw messages out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import amqp
import kombu


class Rabbit:
    """The vhost at `url`; each call has a connection of its own."""

    def __init__(self, url: str) -> None:
        self.url = url

    def put(self, body: bytes, queue: str = "jobs.q.default", priority: int = 0) -> None:
        """Straight into a queue."""
        with self._channel() as channel:
            channel.confirm_select()
            message = amqp.Message(body, priority=priority, delivery_mode=2)
            channel.basic_publish_confirm(message, exchange="", routing_key=queue)

    def depth(self, queue: str = "jobs.q.default") -> int:
        """Messages that are ready."""
        with self._channel() as channel:
            return int(channel.queue_declare(queue, passive=True).message_count)

    def purge(self, queue: str = "jobs.q.default") -> int:
        with self._channel() as channel:
            return int(channel.queue_purge(queue))

    def take(self, queue: str) -> list[bytes]:
        """All that is ready in a queue, and is gone from it then."""
        found = []
        with self._channel() as channel:
            while message := channel.basic_get(queue, no_ack=True):
                body = message.body
                found.append(body.encode() if isinstance(body, str) else bytes(body))
        return found

    def take_json(self, queue: str) -> list[Any]:
        return [json.loads(body) for body in self.take(queue)]

    @contextmanager
    def _channel(self) -> Iterator[Any]:
        with kombu.Connection(self.url, connect_timeout=5) as connection:
            yield connection.channel()
