from __future__ import annotations

import json
import pickle
import random
import threading
import time

import amqp
import pytest

from jobsvc.broker.publisher import Publisher, job_message
from jobsvc.broker.topology import CONTROL, JOBS, Broker, queue_name
from jobsvc.errors import DatabaseUnavailable
from tests.harness.wait import until
from tests.store.house import new_id
from worker.runtime.consumer import Delivery

from .conftest import SECONDS_MAX, Generations, Hands, Inbox, StartConsumer, dispatch

QUEUE = queue_name("default")


def test_delivers_and_acknowledges(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox, hands: Hands
) -> None:
    job_id = new_id()
    publisher.publish([dispatch("default", job_id, priority=7)])
    consumer = start_consumer()
    inbox.wait_for(job_id)
    (delivery,) = inbox.deliveries
    assert (delivery.priority, delivery.queue) == (7, "default")
    consumer.acknowledge([delivery])
    consumer.stop()
    assert not consumer.consuming
    assert inbox.lost
    assert hands.depth(QUEUE) == 0


def test_an_acknowledgement_wakes_the_consumer(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox
) -> None:
    """It would take its tick of a second for every two messages."""
    count = 60
    publisher.publish([dispatch("default") for _ in range(count)])
    consumer = start_consumer(prefetch=2, wait=False)

    timers: list[threading.Timer] = []

    def soon(delivery: Delivery) -> None:
        timer = threading.Timer(0.005, consumer.acknowledge, [[delivery]])
        timer.start()
        timers.append(timer)

    inbox.on_arrival = soon
    began = time.monotonic()
    inbox.wait(lambda: len(inbox.deliveries) == count)
    assert time.monotonic() - began < 12
    for timer in timers:
        timer.join()


def test_what_cannot_be_read_is_put_away(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox, hands: Hands
) -> None:
    job_id = new_id()
    bad = [
        b"",
        b"not json",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"v": 1}',
        pickle.dumps({"v": 1, "job_id": job_id}),
        json.dumps({"v": 2, "job_id": job_id}).encode(),
        json.dumps({"v": 1, "job_id": job_id.upper()}).encode(),
        json.dumps({"v": 1, "job_id": job_id.replace("-", "")}).encode(),
        b'{"v": 1, "job_id": 5}',
        b'{"v": 1, "job_id": null}',
        b'{"v": 1, "job_id": ["a"]}',
        b'{"v": 1, "job_id": {}}',
        b"[" * 100_000,
        b'{"v": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\x00",
        b"x" * 1_000_000,
    ]
    publisher.connect()
    good = job_message(dispatch("default", job_id), 1)
    for body in bad:
        hands.put(JOBS.name, QUEUE, body)
    hands.put(JOBS.name, QUEUE, b"\xff", content_encoding="rot13", content_type="text/x")
    hands.put(JOBS.name, QUEUE, b"\xff", headers={"compression": "zlib"})
    hands.put(JOBS.name, QUEUE, b"\xff", headers={"compression": "no-such-thing"})
    hands.put(JOBS.name, QUEUE, good.body, content_encoding="no-such-encoding")
    consumer = start_consumer(prefetch=3)
    inbox.wait_for(job_id)
    assert [delivery.epoch for delivery in inbox.deliveries] == [1], "it had to start over"
    assert inbox.lost == []
    consumer.acknowledge([inbox.deliveries[0]])
    consumer.stop()
    assert hands.depth(QUEUE) == 0
    found = hands.bodies("jobs.poison")
    assert found == [body.decode(errors="replace") for body in [*bad, *[b"\xff"] * 3]]


def test_a_queue_that_is_deleted_under_its_consumer(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox, hands: Hands
) -> None:
    """The broker cancels the consumer, which then is connected, but deaf."""
    before = new_id()
    publisher.publish([dispatch("default", before), dispatch("other")])
    consumer = start_consumer("default", "other")
    inbox.wait(lambda: len(inbox.deliveries) == 2)
    old = list(inbox.deliveries)
    hands.delete(QUEUE)
    inbox.wait(lambda: bool(inbox.lost), 5)
    assert consumer.wait_consuming(5)
    for delivery in old:
        consumer.acknowledge([delivery])  # of a channel that is gone: would close the new one
    after = new_id()
    publisher.close()
    publisher.publish([dispatch("default", after)])
    inbox.wait_for(after)
    inbox.wait(lambda: inbox.ids.count(old[1].job_id) == 2)
    assert max(delivery.epoch for delivery in inbox.deliveries) == 2


def test_arguments_that_do_not_match_lead_to_the_next_generation(
    start_consumer: StartConsumer,
    publisher: Publisher,
    inbox: Inbox,
    hands: Hands,
    known: Generations,
) -> None:
    hands.declare("jobs.q.bad", **{"x-max-priority": 3})
    hands.declare("jobs.q.worse@2", **{"x-max-priority": 3})  # and left behind once already
    known.known |= {"bad": 1, "worse": 2, "fine": 1}
    start_consumer("bad", "worse", "fine")
    assert known.known == {"default": 1, "bad": 2, "worse": 3, "fine": 1}
    ids = [new_id() for _ in range(3)]
    publisher.publish([dispatch(q, i) for q, i in zip(("bad", "worse", "fine"), ids, strict=True)])
    inbox.wait_for(*ids)


def test_a_tag_that_the_broker_does_not_know(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox, known: Generations
) -> None:
    publisher.publish([dispatch("default", job_id := new_id())])
    consumer = start_consumer()
    inbox.wait_for(job_id)
    (delivery,) = inbox.deliveries
    consumer.acknowledge([delivery._replace(tag=delivery.tag + 1)])  # closes the channel: 406
    inbox.wait(lambda: bool(inbox.lost))
    assert consumer.wait_consuming(SECONDS_MAX)
    assert known.known == {"default": 1}


def test_prefetch(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox, hands: Hands
) -> None:
    publisher.publish([dispatch("default") for _ in range(10)])
    consumer = start_consumer(prefetch=3)
    inbox.wait(lambda: len(inbox.deliveries) == 3)
    until(lambda: hands.depth(QUEUE) == 7, SECONDS_MAX, "it holds no more than that")
    consumer.set_prefetch(0)
    until(lambda: not consumer._consumer_tags, SECONDS_MAX, "it consumes no more")
    for delivery in inbox.deliveries:
        consumer.acknowledge([delivery])  # the channel is the same
    publisher.publish([dispatch("default")])
    time.sleep(0.1)
    assert len(inbox.deliveries) == 3
    assert inbox.lost == []
    consumer.set_prefetch(20)
    inbox.wait(lambda: len(inbox.deliveries) == 11)
    assert inbox.lost == []
    assert {delivery.epoch for delivery in inbox.deliveries} == {1}
    assert len(set(inbox.ids)) == 11


def test_letting_go_and_giving_back(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox
) -> None:
    ids = [new_id() for _ in range(4)]
    publisher.publish([dispatch("default", job_id) for job_id in ids])
    consumer = start_consumer(prefetch=4)
    inbox.wait_for(*ids)
    other = Inbox()
    helper = start_consumer(prefetch=10, receiver=other)
    consumer.give_back([inbox.deliveries[0]])
    consumer.suspend()
    other.wait_for(*ids)  # the one that was given back may have been sent to either
    assert not consumer.consuming
    for delivery in other.deliveries:
        helper.acknowledge([delivery])
    helper.stop()
    consumer.resume()
    assert consumer.wait_consuming(SECONDS_MAX)
    publisher.publish([dispatch("default", again := new_id())])
    inbox.wait_for(again)


def test_what_a_receiver_takes_no_more_goes_to_another(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox
) -> None:
    inbox.open = False
    start_consumer(prefetch=4)
    other = Inbox()
    publisher.publish([dispatch("default", job_id := new_id())])
    start_consumer(prefetch=1, receiver=other)
    other.wait_for(job_id)
    assert inbox.deliveries == []


def test_a_stop_sends_the_acknowledgements_that_wait(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox, hands: Hands
) -> None:
    publisher.publish([dispatch("default") for _ in range(50)])
    consumer = start_consumer(prefetch=50)
    inbox.wait(lambda: len(inbox.deliveries) == 50)
    for delivery in inbox.deliveries[:40]:
        consumer.acknowledge([delivery])
    consumer.give_back([inbox.deliveries[40]])
    consumer.stop()
    until(lambda: hands.depth(QUEUE) == 10, SECONDS_MAX, "the rest is there for others")


def test_what_all_workers_are_told(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox, hands: Hands
) -> None:
    start_consumer()
    hands.put(CONTROL.name, "", b"{}", headers={"compression": "zlib"})
    for body in (b"", b"[]", b'{"cancel": 5}', b'{"cancel": ["x"]}', b"{}", b"[" * 100_000):
        hands.put(CONTROL.name, "", body)
    job_id = new_id()
    publisher.control({"cancel": job_id})
    inbox.wait(lambda: inbox.cancels == [job_id])
    assert inbox.lost == []


def test_a_database_that_is_away(
    start_consumer: StartConsumer,
    inbox: Inbox,
    known: Generations,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = threading.Semaphore(0)

    def away(names: object) -> dict[str, int]:
        asked.release()
        raise DatabaseUnavailable

    monkeypatch.setattr(known, "generations", away)
    consumer = start_consumer(wait=False)
    assert asked.acquire(timeout=SECONDS_MAX)
    assert asked.acquire(timeout=SECONDS_MAX)
    assert not consumer.consuming
    monkeypatch.undo()
    assert consumer.wait_consuming(SECONDS_MAX)


def test_messages_that_end_in_any_order_are_acknowledged(
    start_consumer: StartConsumer, publisher: Publisher, inbox: Inbox, hands: Hands
) -> None:
    """With one call where that is right; the one that is open stays."""
    count = 80
    publisher.publish([dispatch("default") for _ in range(count)])
    consumer = start_consumer(prefetch=count)
    inbox.wait(lambda: len(inbox.deliveries) == count)
    order = list(inbox.deliveries)
    random.Random(7).shuffle(order)
    still_open = order.pop()
    for start in range(0, len(order), 7):
        consumer.acknowledge(order[start : start + 7])
    until(lambda: not consumer._acks and not consumer._unacknowledged.waiting, SECONDS_MAX, "sent")
    assert len(consumer._unacknowledged) == 1
    assert inbox.lost == []
    consumer.stop()
    until(lambda: hands.depth(QUEUE) == 1, SECONDS_MAX, "all but one are gone")
    assert hands.bodies(QUEUE) == [f'{{"v": 1, "job_id": "{still_open.job_id}"}}']


def test_quorum_queues(broker_url: str, inbox: Inbox, start_consumer: StartConsumer) -> None:
    broker = Broker(broker_url, "quorum")
    publisher = Publisher(broker, Generations(default=1))
    publisher.publish([dispatch("default", job_id := new_id(), priority=5)])
    publisher.close()
    consumer = start_consumer(on=broker)
    inbox.wait_for(job_id)
    consumer.acknowledge([inbox.deliveries[0]])
    consumer.stop()
    hands = Hands(broker)
    assert hands.depth(QUEUE) == 0
    with pytest.raises(amqp.PreconditionFailed, match=r"x-queue-type.*quorum"):
        hands.declare(QUEUE, **Broker(broker_url).queue("default").queue_arguments)
