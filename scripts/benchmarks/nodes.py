"""What the sides of a round share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Self

from scripts.benchmarks.programs import cpu_seconds
from tests.services import (
    VHOSTS,
    NodeError,
    PostgresNode,
    RabbitmqNode,
    machine_bin,
    vhost_url,
    wheel_bin,
)

Cpu = Mapping[str, float]  # by part: seconds, or microseconds a job


class Nodes:
    """One PostgreSQL with fsync and one RabbitMQ; and how many processes each server of this
    service is to have."""

    def __init__(self, server_processes: int = 1) -> None:
        self.server_processes = server_processes
        self.postgres = PostgresNode(machine_bin() or wheel_bin(), fsync=True)
        self.rabbitmq = RabbitmqNode()
        self._vhosts = iter(VHOSTS)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.postgres)
            stack.enter_context(self.rabbitmq)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def vhost(self) -> str:
        """The address of one that nobody has used."""
        if name := next(self._vhosts, None):
            return vhost_url(self.rabbitmq.url, name)
        raise NodeError("all vhosts are used up")

    def cpu(self) -> Cpu:
        """Seconds used so far."""
        return {
            "PostgreSQL": sum(cpu_seconds(self.postgres.pid)),
            "RabbitMQ": sum(cpu_seconds(self.rabbitmq.pid)),
        }
