from __future__ import annotations

import threading
from dataclasses import dataclass, field

import kombu
import pytest

from jobsvc.broker.listener import HintListener
from jobsvc.broker.topology import Broker, BrokerUnavailable
from jobsvc.core import backoff

SECONDS_MAX = 10.0
TRIES = 1100  # 2.0 ** 1024 is too large for a float


@dataclass(frozen=True)
class AwayBroker(Broker):
    """Out of reach; counts who tries."""

    tries: list[None] = field(default_factory=list)
    tried_long: threading.Event = field(default_factory=threading.Event)

    def connection(self) -> kombu.Connection:
        connection = super().connection()

        def connect() -> None:
            self.tries.append(None)
            if len(self.tries) >= TRIES:
                self.tried_long.set()
            raise BrokerUnavailable("away")

        connection.connect = connect
        return connection


def test_it_outlives_a_broker_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process ends with its listener."""
    monkeypatch.setattr(backoff, "SECONDS_MIN", 0.0)
    monkeypatch.setattr(backoff, "SECONDS_MAX", 0.0)
    broker = AwayBroker("memory://")
    listener = HintListener(broker, lambda _: None)
    listener.start()
    assert broker.tried_long.wait(SECONDS_MAX)
    assert listener._thread.is_alive()
    listener.stop()
