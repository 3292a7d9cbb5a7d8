from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from jobsvc.broker.topology import Broker, queue_name
from jobsvc.outbox import Outbox
from jobsvc.store import migrating
from jobsvc.store.database import Database
from tests.store.house import House, worker

from .conftest import Hands

QUEUE = queue_name("default")
NEVER = 3600.0


@pytest.fixture
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('db') / 'jobsvc.db'}")
    migrating.migrate(database)
    yield House(database)
    database.close()


@pytest.fixture
def outbox(house: House, broker: Broker) -> Iterator[Outbox]:
    """A server's, whose ticks are called by hand."""
    made = Outbox(house.database, broker, relay_interval=NEVER)
    made._publisher.connect()
    yield made
    made._publisher.close()


def publish(house: House, outbox: Outbox, *, minutes_ago: int) -> str:
    job_id = house.submit()
    outbox._send(house.effects.dispatches)
    outbox._settle()
    house.change(job_id, dispatch_time=house.now() - timedelta(minutes=minutes_ago))
    return job_id


def test_a_message_that_the_broker_lost(house: House, outbox: Outbox, hands: Hands) -> None:
    """Even one alone, beside workers that could hold many."""
    house.announce(worker(prefetch=200))
    lost = publish(house, outbox, minutes_ago=5)
    assert len(hands.bodies(QUEUE)) == 1
    publish(house, outbox, minutes_ago=0)
    hands.take_all(QUEUE)
    outbox._redispatch.look()
    assert house.owed() == []
    outbox._redispatch.look()
    while outbox._redispatch.pending:
        outbox._tick(NEVER)
    outbox._settle()
    assert [lost in body for body in hands.bodies(QUEUE)] == [True]
    assert house.owed() == []


def test_a_backlog_that_is_all_there(house: House, outbox: Outbox, hands: Hands) -> None:
    house.announce(worker(prefetch=200))
    for _ in range(5):
        publish(house, outbox, minutes_ago=5)
    for _ in range(3):
        outbox._redispatch.look()
    assert house.owed() == []
    assert hands.depth(QUEUE) == 5
