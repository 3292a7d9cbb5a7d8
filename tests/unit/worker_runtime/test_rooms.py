"""Each room of the runtime by itself."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any, cast

import pytest

from jobsvc.core import backoff
from jobsvc.core.attempts import Claimed, Input, Interrupted, Succeeded
from jobsvc.errors import DatabaseUnavailable
from worker.pool import Pool
from worker.runtime import prefetch
from worker.runtime.attempts import Attempt, Attempts
from worker.runtime.consumer import Consumer, Delivery
from worker.runtime.inbox import Inbox
from worker.runtime.persisting import persist
from worker.runtime.prefetch import Prefetch

_numbers = itertools.count(1)


def delivery(job_id: str = "", *, priority: int = 0, epoch: int = 1, age: float = 0.0) -> Delivery:
    number = next(_numbers)
    received = time.monotonic() - age
    return Delivery(job_id or f"job-{number}", priority, "default", number, epoch, received)


def attempt(job_id: str = "", token: str = "t1", *, age: float = 0.0) -> Attempt:
    message = delivery(job_id, age=age)
    claimed = Claimed(message.job_id, token, "demo", "default", 1, Input(), 60.0)
    return Attempt(claimed, message, time.monotonic())


@pytest.fixture
def claimable() -> threading.Event:
    return threading.Event()


@pytest.fixture
def attempts(claimable: threading.Event) -> Attempts:
    return Attempts(claimable, threading.Event())


@pytest.fixture
def inbox(claimable: threading.Event, attempts: Attempts) -> Inbox:
    return Inbox(claimable, attempts, redelivered=True)


# The table


def test_what_has_ended_takes_no_slot_and_is_held_until_it_is_recorded(attempts: Attempts) -> None:
    first, second = attempt(), attempt()
    attempts.add([first, second], 1.0)
    ended = attempts.end([(first.claimed, Interrupted()), (attempt().claimed, Interrupted())])
    assert ended == {first: Interrupted()}
    assert (len(attempts), attempts.unended, attempts.ended) == (2, 1, 1)
    assert set(attempts.leased()) == {first, second}
    attempts.remove(ended)
    assert (len(attempts), attempts.unended, attempts.ended) == (1, 1, 0)
    assert attempts.get(first.claimed) is None


def test_two_attempts_at_one_job_are_two(attempts: Attempts) -> None:
    """The first has lost its lease, and its process is still being killed."""
    first, second = attempt("job", "t1"), attempt("job", "t2")
    attempts.add([first, second], 1.0)
    attempts.end([(first.claimed, Interrupted())])
    assert (first.ended, second.ended) == (True, False)


def test_what_has_ended_can_not_be_lost(attempts: Attempts) -> None:
    running, ended, gone = attempt(), attempt(), attempt()
    attempts.add([running, ended], 1.0)
    attempts.end([(ended.claimed, Succeeded(Input()))])
    assert [attempts.lose(each) for each in (running, ended, gone)] == [True, False, False]
    assert attempts.leased() == [ended]


def test_room_is_told_once_there_is_as_much_as_is_wanted(
    attempts: Attempts, claimable: threading.Event
) -> None:
    held = [attempt() for _ in range(3)]
    attempts.add(held, 1.0)
    attempts.wake_at = 1
    attempts.end([(held[0].claimed, Interrupted())])
    assert not claimable.is_set()
    attempts.end([(held[1].claimed, Interrupted())])
    assert claimable.is_set()


def test_messages_are_given_back_once(attempts: Attempts) -> None:
    old, new = attempt(age=10.0), attempt()
    attempts.add([old, new], 1.0)
    assert attempts.deliveries() == {"default": 2}
    assert attempts.detach(time.monotonic() - 5.0) == [old]
    assert attempts.detach(time.monotonic() - 5.0) == []
    assert (attempts.detached, attempts.deliveries()) == (1, {"default": 1})


# The inbox


def test_the_inbox_gives_the_most_urgent_first_then_as_they_came(inbox: Inbox) -> None:
    messages = [delivery(priority=priority) for priority in (0, 5, 9, 5)]
    assert inbox.on_deliveries(messages)
    batch, repeated = inbox.take(3)
    assert list(batch.values()) == [messages[2], messages[1], messages[3]]
    assert repeated == []
    assert len(inbox) == 1


def test_the_inbox_tells_of_what_only_repeats_another(inbox: Inbox) -> None:
    first, again, other = delivery("job"), delivery("job"), delivery("job", priority=-1)
    inbox.on_deliveries([first, again, other])
    assert inbox.take(9) == ({"job": first}, [again])
    assert inbox.take(9) == ({"job": other}, [])  # which of the two counts the claim must tell


def test_the_inbox_wakes_for_the_first_message_alone(
    inbox: Inbox, claimable: threading.Event
) -> None:
    inbox.on_deliveries([delivery()])
    assert claimable.is_set()
    claimable.clear()
    inbox.on_deliveries([delivery()])
    assert not claimable.is_set()


def test_the_inbox_lets_go(inbox: Inbox) -> None:
    late, lost, kept = delivery(age=5.0), delivery(), delivery(epoch=2)
    inbox.on_deliveries([late, lost, kept])
    assert inbox.take_late(time.monotonic() - 1.0) == [late]
    inbox.on_channel_lost(1)
    assert inbox.close() == [kept]
    assert not inbox.on_deliveries([delivery()])


# Prefetch


class Counted:
    def __init__(self) -> None:
        self.prefetches: list[int] = []
        self.average_run_seconds = 1.0

    def set_prefetch(self, prefetch: int) -> None:
        self.prefetches.append(prefetch)


def test_prefetch_is_changed_when_it_matters(attempts: Attempts) -> None:
    fake = Counted()
    adapting = Prefetch(cast(Consumer, fake), cast(Pool, cast(Any, fake)), attempts, concurrency=4)
    for average in (1.0, prefetch.AHEAD_SECONDS / 10, prefetch.AHEAD_SECONDS / 12, 1e-9):
        fake.average_run_seconds = average
        adapting.adapt()
    assert fake.prefetches == [44, prefetch.PREFETCH_MAX]
    attempts.add([attempt(age=10.0)], 1.0)
    attempts.detach(time.monotonic() - 5.0)
    fake.average_run_seconds = 1.0
    adapting.adapt()
    assert fake.prefetches[-1] == 3


# Writing


def test_writing_goes_on_as_long_as_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "SECONDS_MIN", 0.0)
    monkeypatch.setattr(backoff, "SECONDS_MAX", 0.0)
    tries: list[None] = []

    def write() -> str:
        tries.append(None)
        if len(tries) < 3:
            raise DatabaseUnavailable
        return "done"

    assert persist(write, lambda seconds: True) == "done"
    tries.clear()
    with pytest.raises(DatabaseUnavailable):
        persist(write, lambda seconds: False)
    assert len(tries) == 1
    with pytest.raises(ZeroDivisionError):
        persist(lambda: 1 // 0, lambda seconds: True)
