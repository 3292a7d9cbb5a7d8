from __future__ import annotations

import asyncio

import pytest

from jobsvc.broker import depths
from jobsvc.broker.depths import Depths
from jobsvc.broker.publisher import Publisher
from jobsvc.broker.topology import Broker
from tests.harness.proxy import Proxy
from tests.services import free_port
from tests.store.house import new_id

from .conftest import SECONDS_MAX, dispatch


async def test_it_counts_what_is_ready(publisher: Publisher, broker: Broker) -> None:
    publisher.publish([dispatch("default", new_id()) for _ in range(3)])
    assert await Depths(broker).ready({"default": 1, "none": 1}) == {"default": 3, "none": 0}


async def test_it_asks_once_for_all_who_ask_within_a_moment(
    publisher: Publisher, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depths, "FRESH_SECONDS", 60.0)
    publisher.publish([dispatch("default", new_id())])
    counting = Depths(broker)
    counts = await asyncio.gather(*[counting.ready({"default": 1}) for _ in range(3)])
    publisher.publish([dispatch("default", new_id())])
    assert [*counts, await counting.ready({"default": 1})] == [{"default": 1}] * 4
    assert await counting.ready({"default": 1, "other": 1}) == {"default": 1, "other": 0}


async def test_a_broker_that_does_not_answer_keeps_nobody_waiting(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depths, "PATIENCE_SECONDS", 0.1)
    with Proxy(broker.url) as link:
        counting = Depths(Broker(link.url))
        with link.silence():
            answer = counting.ready({"default": 1})
            assert await asyncio.wait_for(answer, SECONDS_MAX) == {}


async def test_a_broker_that_is_away_is_not_asked_for_a_while(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depths, "PATIENCE_SECONDS", SECONDS_MAX)
    monkeypatch.setattr(depths, "DOWN_SECONDS", 60.0)
    counting = Depths(Broker(f"amqp://guest:guest@127.0.0.1:{free_port()}//"))
    assert await counting.ready({"default": 1}) == {}
    counting._broker = broker
    assert await counting.ready({"default": 1}) == {}
    monkeypatch.setattr(counting, "_down_until", 0.0)
    assert await counting.ready({"default": 1}) == {"default": 0}
