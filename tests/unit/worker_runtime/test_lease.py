from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import Any

import pytest

from jobsvc.core.attempts import Claimed
from jobsvc.store import registry
from jobsvc.store.database import Transaction
from jobsvc.store.tables import workers
from tests.harness.wait import until
from tests.store.house import DONE, LEASE_SECONDS, House, new_id, worker
from worker.runtime.lease import LeaseThread

from .conftest import SECONDS_MAX, Seen, Shaky

NEVER = 3600.0


@dataclass(eq=False)
class Held:
    claimed: Claimed
    renewed: float = field(default_factory=monotonic)

    @property
    def job_id(self) -> str:
        return self.claimed.job_id

    @property
    def token(self) -> str:
        return self.claimed.token


class Keeper(Seen):
    def __init__(self) -> None:
        super().__init__()
        self.held: list[Held] = []
        self.lost: list[tuple[Held, str]] = []
        self.cancels: list[Held] = []
        self.beats: list[None] = []
        self.announced: list[None] = []

    def leased(self) -> list[Held]:
        return [held for held in self.held if held not in [lost for lost, _ in self.lost]]

    def on_lease_lost(self, attempt: Held, reason: str) -> None:
        self.note(self.lost, (attempt, reason))

    def on_cancel_requested(self, attempt: Held) -> None:
        self.note(self.cancels, attempt)

    def standing(self) -> tuple[float | None, dict[str, int]]:
        return 7.0, {"default": 3}

    def on_beat(self) -> None:
        self.note(self.beats, None)

    def wait_beats(self, count: int) -> None:
        wanted = len(self.beats) + count
        self.wait(lambda: len(self.beats) >= wanted)


@pytest.fixture
def house(database: Shaky) -> House:
    return House(database)


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


Start = Callable[..., LeaseThread]


@pytest.fixture
def beat() -> threading.Event:
    return threading.Event()


@pytest.fixture
def start(database: Shaky, keeper: Keeper, beat: threading.Event) -> Iterator[Start]:
    started: list[LeaseThread] = []

    def make(*, lease: float = LEASE_SECONDS, heartbeat: float = 0.02) -> LeaseThread:
        thread = LeaseThread(
            database,
            "w1",
            keeper,  # type: ignore[arg-type]
            lambda: keeper.note(keeper.announced, None),
            beat,
            lease_seconds=lease,
            heartbeat_seconds=heartbeat,
        )
        thread.start()
        started.append(thread)
        return thread

    yield make
    database.away = False
    for thread in started:
        thread.stop()


def hold(keeper: Keeper, house: House) -> Held:
    held = Held(house.start())
    keeper.held.append(held)
    return held


def test_renews_what_is_held(start: Start, keeper: Keeper, house: House) -> None:
    held = hold(keeper, house)
    house.announce(worker("w1"))
    house.change(held.job_id, lease_expire_time=house.now())
    before = monotonic()
    start()
    keeper.wait_beats(2)
    expires = house.row(held.job_id).lease_expire_time
    assert expires > house.now() + timedelta(seconds=LEASE_SECONDS - 5)
    assert held.renewed >= before


def test_a_heartbeat_tells_how_the_worker_stands(
    start: Start, keeper: Keeper, house: House
) -> None:
    house.announce(worker("w1"))
    start()
    keeper.wait_beats(1)
    (row,) = house.database.read(lambda c: c.execute(workers.select()).all())
    assert row.unacknowledged == {"default": 3}
    assert row.heartbeat_time - row.claim_time == timedelta(seconds=7)
    assert keeper.lost == []
    assert keeper.announced == []


def test_a_lease_that_is_gone(start: Start, keeper: Keeper, house: House) -> None:
    kept, taken, ended = (hold(keeper, house) for _ in range(3))
    house.change(taken.job_id, lease_token=new_id())
    house.finish(ended.claimed, DONE)
    start()
    keeper.wait_beats(2)
    assert {held for held, _ in keeper.lost} == {taken, ended}
    assert len(keeper.lost) == 2
    assert keeper.leased() == [kept]


def test_a_cancel_that_was_requested(
    start: Start, keeper: Keeper, house: House, beat: threading.Event
) -> None:
    held, other = hold(keeper, house), hold(keeper, house)
    start(heartbeat=NEVER / 4)
    house.cancel(held.job_id)
    beat.set()
    keeper.wait(lambda: keeper.cancels == [held])
    assert keeper.leased() == [held, other]


def test_stops_what_could_not_be_renewed(
    start: Start, keeper: Keeper, house: House, database: Shaky
) -> None:
    held = hold(keeper, house)
    database.away = True
    start(lease=0.6)
    keeper.wait(lambda: bool(keeper.lost))
    assert keeper.lost == [(held, "the lease could not be renewed")]
    assert 0.5 <= monotonic() - held.renewed < 0.6, "before anybody else can have it"


def test_a_short_absence_costs_nothing(
    start: Start, keeper: Keeper, house: House, database: Shaky
) -> None:
    hold(keeper, house)
    start(lease=2.0, heartbeat=0.1)
    keeper.wait_beats(1)
    database.away = True
    tries = database.tries
    until(lambda: database.tries > tries + 2, SECONDS_MAX, "it asks again soon")
    database.away = False
    keeper.wait_beats(2)
    assert keeper.lost == []


def test_time_counts_from_the_start_of_a_renewal(
    start: Start, keeper: Keeper, house: House, database: Shaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long it took to be confirmed is time that the lease has been running."""
    held = hold(keeper, house)
    began: list[float] = []
    write = Shaky.write

    def slow(self: Shaky, body: Callable[[Transaction], object]) -> object:
        began.append(monotonic())
        answer = write(self, body)
        until(lambda: monotonic() > began[-1] + 0.1, SECONDS_MAX, "it is slow")
        return answer

    monkeypatch.setattr(Shaky, "write", slow)
    start(heartbeat=0.01)
    keeper.wait_beats(1)
    assert any(moment - 0.05 <= held.renewed <= moment for moment in began)


def test_a_worker_that_was_forgotten_announces_itself(
    start: Start, keeper: Keeper, house: House, beat: threading.Event
) -> None:
    start(heartbeat=NEVER / 4)
    beat.set()
    keeper.wait(lambda: bool(keeper.announced))
    house.announce(worker("w1"))
    house.write(lambda tx: tx.execute(workers.update().values(heartbeat_time=tx.now)))
    start(heartbeat=0.01)
    keeper.wait_beats(2)
    assert house.database.read(registry.worker_ids) == ["w1"]


def test_a_fault_of_ours_stops_no_renewing(
    start: Start, keeper: Keeper, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(keeper, house)
    faults = [ZeroDivisionError()]
    heartbeat = registry.heartbeat

    def fail_once(tx: Transaction, worker_id: str, *standing: Any) -> bool:
        if faults:
            raise faults.pop()
        return heartbeat(tx, worker_id, *standing)

    monkeypatch.setattr(registry, "heartbeat", fail_once)
    start()
    keeper.wait_beats(2)
    assert keeper.lost == []
