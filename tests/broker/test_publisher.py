from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import pytest

from jobsvc.broker.publisher import HINT_PAIRS_MAX, Message, Publisher
from jobsvc.broker.topology import JOBS, Broker, BrokerUnavailable, queue_name
from jobsvc.core.model import Change
from tests.harness.wait import until
from tests.store.house import new_id

from .conftest import Generations, Hands, bytes_of, dispatch, put

QUEUE = queue_name("default")
FULL = {"x-max-length": 1, "x-overflow": "reject-publish"}


def fill(publisher: Publisher, hands: Hands) -> Message:
    """A queue that takes nothing more; answers a message for it."""
    message = Message(JOBS.name, "full", b"{}", outbox_id=7)
    publisher.connect()
    hands.declare("full", **FULL)
    hands.do(lambda channel: channel.queue_bind("full", JOBS.name, "full"))
    assert not put(publisher, message)
    return message


def test_messages_are_as_the_design_has_them(
    publisher: Publisher, hands: Hands, broker: Broker
) -> None:
    first, second = new_id(), new_id()
    publisher.publish([dispatch("default", first, priority=3), dispatch("other", second)])
    (message,) = hands.take_all(QUEUE)
    assert bytes_of(message) == b'{"v": 1, "job_id": "%s"}' % first.encode()
    assert message.properties["delivery_mode"] == 2
    assert message.properties["priority"] == 3
    assert message.properties["content_type"] == "application/json"
    assert [json.loads(body)["job_id"] for body in hands.bodies(queue_name("other"))] == [second]
    # The dead-letter queue is a server's to declare, once it has made all else anew.
    assert not broker.remembers(publisher.connect())
    broker.declare_dead(publisher.connect())
    dead = dispatch("default", first, kind="dead", attempt=3, error_type="ValueError")
    publisher.publish([dead])
    assert [json.loads(body) for body in hands.bodies("jobs.dead")] == [
        {
            "v": 1,
            "job_id": first,
            "job_type": "demo",
            "queue": "default",
            "attempt": 3,
            "error_type": "ValueError",
        }
    ]


def test_many_in_one_call_keep_their_order(publisher: Publisher, hands: Hands) -> None:
    ids = [new_id() for _ in range(500)]
    publisher.publish([dispatch("default", job_id) for job_id in ids])
    assert [json.loads(body)["job_id"] for body in hands.bodies(QUEUE)] == ids
    assert not publisher._unconfirmed


def test_no_queue_takes_it(publisher: Publisher, hands: Hands) -> None:
    """A broker confirms what it then drops; it is told all the same, and overcome."""
    publisher.publish([dispatch("default"), dispatch("other")])
    connection = publisher.connect()
    hands.delete(QUEUE)
    lost = [dispatch(name, outbox_id=n) for n, name in enumerate(("other", "default", "other"))]
    assert publisher.publish(lost) == {1}
    assert hands.depth(queue_name("other")) == 3
    assert not publisher.publish([lost[1]])
    assert [json.loads(body)["job_id"] for body in hands.bodies(QUEUE)] == [lost[1].job_id]
    assert publisher.connect() is connection


def test_nobody_to_take_dead_letters(publisher: Publisher, broker: Broker) -> None:
    """Jobs do not wait for it; a server makes it anew."""
    dead = dispatch("default", kind="dead", outbox_id=1)
    assert publisher.publish([dead, dispatch("default", outbox_id=2)]) == {1}
    assert publisher.depth("default") == 1
    broker.declare_dead(publisher.connect())
    assert not publisher.publish([dead])


def test_a_server_makes_the_dead_letter_queue_anew(
    broker: Broker, known: Generations, hands: Hands
) -> None:
    news: list[None] = []
    publisher = Publisher(broker, known, known.leave_behind, lambda: news.append(None))
    publisher.connect()
    hands.delete("jobs.dead")
    dead = dispatch("default", kind="dead", outbox_id=1)
    assert publisher.publish([dead]) == {1}
    assert not publisher.publish([dead])
    publisher.close()
    assert len(news) == 1  # nothing else was lost


def test_the_broker_refuses(publisher: Publisher, hands: Hands) -> None:
    """One queue that is full holds up no other."""
    message = fill(publisher, hands)
    fine = Message(JOBS.name, QUEUE, b"{}")
    connection = publisher.connect()
    assert put(publisher, fine, message, fine) == {message.outbox_id}
    assert hands.depth(QUEUE) == 2
    hands.take_all("full")
    assert not put(publisher, message)
    assert hands.depth("full") == 1
    assert publisher.connect() is connection


def test_what_is_sent_after_a_refusal_does_not_hide_it(publisher: Publisher, hands: Hands) -> None:
    """What was refused is settled together with others."""
    message = fill(publisher, hands)
    publisher._send([message])

    def is_refused() -> bool:
        publisher.keep_alive()
        return bool(publisher._refused)

    until(is_refused, 10, "it is refused")
    assert publisher.publish([dispatch("default")]) == {message.outbox_id}
    assert not publisher.publish([dispatch("default")])


def test_an_exchange_is_gone(publisher: Publisher, hands: Hands) -> None:
    """That closes the channel, a moment after the publish."""
    publisher.connect()
    hands.do(lambda channel: channel.exchange_delete(JOBS.name))
    with pytest.raises(BrokerUnavailable):
        publisher.publish([dispatch("default")])
    publisher.publish([dispatch("default")])
    assert hands.depth(QUEUE) == 1


def test_depth(publisher: Publisher, hands: Hands) -> None:
    publisher.publish([dispatch("default")] * 3)
    connection = publisher.connect()
    assert publisher.depth("default") == 3
    assert publisher.depth("unheard-of") is None
    hands.delete(QUEUE)
    assert publisher.depth("default") is None
    assert publisher.connect() is connection  # none of this has cost the connection
    publisher.publish([dispatch("other")])


def test_a_queue_that_others_moved_on(
    publisher: Publisher, hands: Hands, known: Generations
) -> None:
    publisher.publish([dispatch("default")])
    known.leave_behind("default", 1)
    publisher.follow()
    publisher.publish([dispatch("default")] * 2)
    assert publisher.depth("default") == 2
    assert hands.depth(queue_name("default", 2)) == 2
    assert hands.depth(QUEUE) == 1


def test_a_broker_that_does_not_remember(broker: Broker, hands: Hands) -> None:
    seen: list[int | None] = []

    def make(names: Iterable[str]) -> Mapping[str, int]:
        return {"default": 1}

    def recreate() -> None:
        seen.append(hands.depth(QUEUE))  # before anything is declared
        if len(seen) == 1:
            raise ZeroDivisionError

    def connect() -> None:
        publisher = Publisher(broker, make, on_new_broker=recreate)
        try:
            publisher.connect()
        finally:
            publisher.close()

    with pytest.raises(ZeroDivisionError):
        connect()
    assert hands.depth("jobs.dead") is None  # so that the next one tries again
    connect()
    assert seen == [None, None]
    assert hands.depth("jobs.dead") == 0
    connect()
    assert len(seen) == 2
    hands.delete("jobs.dead")
    connect()
    assert len(seen) == 3


def test_hints_are_cut_into_messages(publisher: Publisher, hands: Hands) -> None:
    hands.broker.declare(publisher.connect(), {})
    hands.declare("ear")
    hands.do(lambda channel: channel.queue_bind("ear", "jobs.hint", ""))
    changes = [Change(new_id(), n) for n in range(HINT_PAIRS_MAX + 1)]
    publisher.hint(changes)
    publisher.publish([dispatch("default")])  # on the same channel: the hints are there by now
    messages = hands.take_all("ear")
    assert [len(json.loads(bytes_of(m))["changes"]) for m in messages] == [HINT_PAIRS_MAX, 1]
    assert json.loads(bytes_of(messages[1])) == {
        "v": 1,
        "service": "",
        "changes": [[changes[-1].job_id, HINT_PAIRS_MAX]],
    }
    assert messages[0].properties["delivery_mode"] == 1


def test_keep_alive_reads_what_comes_meanwhile(publisher: Publisher, hands: Hands) -> None:
    publisher.keep_alive()  # not connected: nothing to keep
    assert not publisher.connected
    connection = publisher.connect()
    for _ in range(3):
        publisher.keep_alive()
    publisher.publish([dispatch("default")])
    assert publisher.connect() is connection
