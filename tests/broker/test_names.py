"""Names on the broker that are there already, and not as ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from jobsvc.broker.publisher import Publisher
from jobsvc.broker.topology import JOBS, Broker, queue_name
from tests.store.house import new_id

from .conftest import Generations, Hands, Inbox, StartConsumer, dispatch

TTL = {"x-message-ttl": 60_000}


@pytest.fixture
def server(broker: Broker, known: Generations) -> Iterator[Publisher]:
    made = Publisher(broker, known, known.leave_behind, lambda: None)
    yield made
    made.close()


def publish_all(publisher: Publisher, job_id: str) -> frozenset[int]:
    dead = dispatch("default", kind="dead", outbox_id=1)
    return publisher.publish([dispatch("default", job_id, outbox_id=2), dead])


@pytest.mark.parametrize("arguments", [TTL, {"x-queue-type": "quorum"}, {"x-max-length": 1000}])
def test_what_is_only_looked_at_is_used_as_it_is(
    server: Publisher,
    start_consumer: StartConsumer,
    hands: Hands,
    inbox: Inbox,
    arguments: dict[str, object],
) -> None:
    """Whoever reads `jobs.dead` goes on to."""
    for name in ("jobs.dead", "jobs.poison"):
        hands.declare(name, **arguments)
    start_consumer()
    job_id = new_id()
    assert not publish_all(server, job_id)
    inbox.wait_for(job_id)
    assert len(hands.take_all("jobs.dead")) == 1
    server.publish_poison(b"?")
    assert hands.bodies("jobs.poison") == ["?"]


def test_what_is_only_looked_at_stops_nothing_where_it_cannot_be_had(
    server: Publisher, start_consumer: StartConsumer, broker: Broker, inbox: Inbox, hands: Hands
) -> None:
    """Both are another connection's alone. A dead letter is owed still then; a message that no
    worker can read is gone."""
    with broker.connection() as owner:
        for name in ("jobs.dead", "jobs.poison"):
            owner.default_channel.queue_declare(name, exclusive=True)
        consumer = start_consumer(prefetch=1)
        hands.put(JOBS.name, queue_name("default"), b"?")
        job_id = new_id()
        assert publish_all(server, job_id) == {1}
        inbox.wait_for(job_id)
        assert not inbox.lost
        consumer.acknowledge(inbox.deliveries)
        assert publish_all(server, new_id()) == {1}
    assert publish_all(server, new_id()) == {1}  # and has the queue made anew
    assert not publish_all(server, new_id())


def test_exchanges_of_another_type_serve_as_well(
    server: Publisher,
    start_consumer: StartConsumer,
    hands: Hands,
    inbox: Inbox,
) -> None:
    def declare(channel: Any) -> None:
        for name in ("jobs.dead", "jobs.unroutable", "jobs.hint", "jobs.control"):
            channel.exchange_declare(name, "topic", durable=False)

    hands.do(declare)
    start_consumer()
    job_id = new_id()
    assert not publish_all(server, job_id)
    inbox.wait_for(job_id)
    server.control({"cancel": job_id})
    inbox.wait(lambda: inbox.cancels == [job_id])
    server.hint([])
    server.publish_poison(b"?")
    assert [hands.depth("jobs.dead"), hands.depth("jobs.poison")] == [1, 1]


def test_another_queue_type(
    server: Publisher, hands: Hands, broker: Broker, known: Generations
) -> None:
    """Queues of jobs are left behind for their next generation, also those that no worker
    consumes: nothing could be published else."""
    known({"default", "of-nobody"})
    assert not publish_all(server, new_id())
    other = Publisher(Broker(broker.url, "quorum"), known, known.leave_behind, lambda: None)
    assert not publish_all(other, new_id())
    other.close()
    assert known.known == {"default": 2, "of-nobody": 2}
    depths = [hands.depth(queue_name("default", generation)) for generation in (1, 2)]
    assert depths == [1, 1]
    assert hands.depth("jobs.dead") == 2
    assert not publish_all(server, new_id())  # on its connection, to what it has declared


def test_a_consumer_of_another_queue_type(
    server: Publisher, start_consumer: StartConsumer, broker: Broker, known: Generations
) -> None:
    server.connect()
    start_consumer(on=Broker(broker.url, "quorum"))
    assert known.known == {"default": 2}


def test_a_queue_of_jobs_that_is_another_connections(
    broker: Broker, server: Publisher, known: Generations
) -> None:
    with broker.connection() as owner:
        owner.default_channel.queue_declare(queue_name("default"), exclusive=True)
        assert not publish_all(server, new_id())
    assert known.known == {"default": 2}


def test_publishers_that_cannot_leave_a_queue_behind_do_not_try_for_ever(
    hands: Hands, broker: Broker
) -> None:
    hands.declare(queue_name("default"), **TTL)
    publisher = Publisher(broker, lambda _: {"default": 1})
    with pytest.raises(Exception, match="PRECONDITION_FAILED"):
        publisher.connect()
    publisher.close()
