"""A broker that falls silent, or dies: on a node of our own."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest

from jobsvc.broker import publisher as publishing
from jobsvc.broker import topology
from jobsvc.broker.listener import HintListener
from jobsvc.broker.publisher import Message, Publisher
from jobsvc.broker.topology import JOBS, Broker, BrokerBlocked, BrokerUnavailable, queue_name
from jobsvc.core.model import Change
from tests.harness.wait import until
from tests.services import RabbitmqNode
from tests.store.house import new_id
from worker.runtime.consumer import Consumer

from .conftest import SECONDS_MAX, Generations, Hands, Inbox, dispatch, put

QUEUE = queue_name("default")


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitmqNode]:
    with RabbitmqNode(vhosts=()) as made:
        yield made


@pytest.fixture
def broker(node: RabbitmqNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    monkeypatch.setattr(publishing, "CONFIRM_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(topology, "CONNECT_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(topology, "IO_TIMEOUT_SECONDS", 1.0)
    yield Broker(node.url)
    node.resume()


@pytest.fixture
def consumer(node: RabbitmqNode, broker: Broker, inbox: Inbox) -> Iterator[Consumer]:
    made = Consumer(broker, ["default"], inbox, Generations(default=1), 5)
    made.start()
    assert made.wait_consuming(SECONDS_MAX)
    yield made
    node.resume()
    if made._thread.is_alive():
        made.stop()


def in_time(body: Callable[[], None], seconds: float) -> float:
    """Runs it in a thread; answers how long it took."""
    began = time.monotonic()
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it takes longer than {seconds:g} s"
    return time.monotonic() - began


def test_a_confirmation_that_comes_too_late_confirms_nothing_else(
    node: RabbitmqNode, publisher: Publisher, hands: Hands
) -> None:
    publisher.publish([dispatch("default")])
    hands.declare("full", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    hands.do(lambda channel: channel.queue_bind("full", JOBS.name, "full"))
    message = Message(JOBS.name, "full", b"{}", outbox_id=7)
    assert not put(publisher, message)
    late = new_id()
    node.pause()
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        publisher.publish([dispatch("default", late)])
    assert 0.25 < time.monotonic() - began < 9
    assert not publisher.connected
    assert not publisher._unconfirmed
    with pytest.raises(BrokerUnavailable):  # nor can it be reached; that is found out in time
        publisher.publish([dispatch("default", late)])
    assert time.monotonic() - began < 10
    node.resume()
    publisher.connect()
    assert put(publisher, message) == {7}
    publisher.publish([dispatch("default", late)])
    assert late in {json.loads(body)["job_id"] for body in hands.bodies(QUEUE)}


def test_a_broker_that_is_short_of_memory(node: RabbitmqNode, broker: Broker, hands: Hands) -> None:
    """It stops reading from whoever publishes: the connection is kept, and asked for nothing."""
    known = Generations()
    publisher = Publisher(broker, known, known.leave_behind)
    publisher.publish([dispatch("short")])
    connection = publisher.connect()
    node.ctl("set_vm_memory_high_watermark", "absolute", "1000")
    try:
        with pytest.raises(BrokerBlocked):
            publisher.publish([dispatch("short")])
        assert not publisher.connected
        for body in (publisher.connect, partial(publisher.depth, "short")):
            with pytest.raises(BrokerBlocked):
                body()
    finally:
        node.ctl("set_vm_memory_high_watermark", "absolute", "512MB")

    def reached() -> bool:
        with suppress(BrokerBlocked):
            publisher.connect()
        return publisher.connected

    until(reached, SECONDS_MAX, "it takes messages again")
    assert publisher.connect() is connection
    last = new_id()
    assert not publisher.publish([dispatch("short", last)])
    assert json.loads(hands.bodies(queue_name("short"))[-1])["job_id"] == last
    publisher.close()


def test_silence_is_noticed(
    node: RabbitmqNode, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "HEARTBEAT_SECONDS", 1)
    publisher.connect()
    publisher.keep_alive()
    node.pause()

    def keep() -> None:
        with suppress(BrokerUnavailable):
            while True:
                publisher.keep_alive()
                time.sleep(0.1)

    assert in_time(keep, 6) > 1
    assert not publisher.connected
    node.resume()
    publisher.publish([dispatch("default")])


def test_a_quiet_connection_is_kept(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker ends one that has sent nothing for two heartbeats."""
    monkeypatch.setattr(topology, "HEARTBEAT_SECONDS", 1)
    connection = publisher.connect()
    for _ in range(14):
        publisher.keep_alive()
        time.sleep(0.25)
    publisher.publish([dispatch("default")])
    assert publisher.connect() is connection


@pytest.mark.parametrize("resubscribe", [False, True])
def test_a_consumer_can_be_stopped_while_the_broker_is_silent(
    node: RabbitmqNode, consumer: Consumer, resubscribe: bool
) -> None:
    """As a worker does: with a word to the broker before, that waits for an answer."""
    node.pause()
    if resubscribe:
        consumer.set_prefetch(0)
        time.sleep(0.1)
    in_time(consumer.stop, 8)


# py-amqp leaves the socket of a handshake that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_consumer_comes_back(
    node: RabbitmqNode, broker: Broker, consumer: Consumer, inbox: Inbox, publisher: Publisher
) -> None:
    told: list[Change] = []
    listener = HintListener(broker, told.extend)
    listener.start()
    publisher.connect()
    publisher.control({"cancel": new_id()})
    node.kill()
    inbox.wait(lambda: bool(inbox.lost))
    assert not consumer.consuming
    with pytest.raises(BrokerUnavailable):
        publisher.publish([dispatch("default")])
    node.start()
    assert consumer.wait_consuming(SECONDS_MAX)
    publisher.publish([dispatch("default", job_id := new_id())])
    inbox.wait_for(job_id)
    publisher.control({"cancel": job_id})
    inbox.wait(lambda: job_id in inbox.cancels)

    def heard() -> bool:
        publisher.hint([Change(job_id, 1)])
        return Change(job_id, 1) in told

    until(heard, SECONDS_MAX, "the listener is back too")
    listener.stop()
    gc.collect()  # those sockets, while nobody minds
