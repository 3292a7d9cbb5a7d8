from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from jobsvc.broker.listener import HintListener
from jobsvc.broker.publisher import HINT_PAIRS_MAX, Publisher
from jobsvc.broker.topology import HINT, Broker
from jobsvc.core.model import Change
from tests.harness.wait import until
from tests.store.house import new_id

from .conftest import SECONDS_MAX, Hands


class Ear:
    """Hears hints; `deaf_to` makes it fail at a job's."""

    def __init__(self) -> None:
        self.heard: list[Change] = []
        self.deaf_to = ""
        self._changed = threading.Condition()

    def __call__(self, changes: Iterable[Change]) -> None:
        with self._changed:
            self.heard += changes
            self._changed.notify_all()
        if self.heard[-1].job_id == self.deaf_to:
            raise ZeroDivisionError

    def wait_for(self, *changes: Change) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: all(change in self.heard for change in changes), SECONDS_MAX
            )


@pytest.fixture
def ears(broker: Broker) -> Iterator[list[Ear]]:
    """Of two servers, listening."""
    found = [Ear(), Ear()]
    listeners = [HintListener(broker, ear) for ear in found]
    for listener in listeners:
        listener.start()
    yield found
    for listener in listeners:
        listener._stopping.set()  # all of them, before any is waited for
    for listener in listeners:
        listener.stop()


def wait_listening(publisher: Publisher, ears: list[Ear]) -> None:
    """A hint that nobody listens for is lost, so it is sent until all have heard it."""
    first = Change(new_id(), 1)

    def all_heard() -> bool:
        publisher.hint([first])
        return all(first in ear.heard for ear in ears)

    until(all_heard, SECONDS_MAX, "both listen")


def test_every_server_hears_every_hint(publisher: Publisher, ears: list[Ear]) -> None:
    wait_listening(publisher, ears)
    changes = [Change(new_id(), n) for n in range(1, HINT_PAIRS_MAX + 50)]
    publisher.hint(changes)
    for ear in ears:
        ear.wait_for(*changes)
        assert ear.heard[-len(changes) :] == changes


def test_a_second_service_on_the_vhost_is_noticed(
    broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its hints are of no use here. Who does not say whose it is, is of an older release."""
    ear = Ear()
    listener = HintListener(replace(broker, service="mine"), ear)
    listener.start()
    mine, theirs, silent = (
        Publisher(replace(broker, service=name), lambda _: {}) for name in ("mine", "theirs", "")
    )
    wait_listening(mine, [ear])
    assert not listener.shared
    theirs.hint([Change("theirs", 1)])
    until(lambda: listener.shared, SECONDS_MAX, "it has heard of the other")
    theirs.announce()
    silent._fan_out(HINT.name, {"v": 1, "changes": [["silent", 1]]})
    ear.wait_for(Change("silent", 1))
    assert Change("theirs", 1) not in ear.heard
    listener.stop()
    for publisher in (mine, theirs, silent):
        publisher.close()
    assert capsys.readouterr().out.count("give each a vhost of its own") == 1


def test_nothing_that_comes_stops_the_listening(
    publisher: Publisher, ears: list[Ear], hands: Hands
) -> None:
    wait_listening(publisher, ears)
    bodies = [
        b"",
        b"[]",
        b"{}",
        b'{"changes": 5}',
        b'{"changes": [5]}',
        b'{"changes": [["a", 1, 2]]}',
        b"[" * 100_000,
        b"\xff",
    ]
    for body in bodies:
        hands.put(HINT.name, "", body)
    fine = Change(new_id(), 7)
    publisher.hint([fine])
    for ear in ears:
        ear.wait_for(fine)
    # What it cannot cope with costs a connection, and no more.
    ears[0].deaf_to = bad = new_id()
    hands.put(HINT.name, "", b"\xff", headers={"compression": "zlib"})
    publisher.hint([Change(bad, 1)])
    wait_listening(publisher, ears)
