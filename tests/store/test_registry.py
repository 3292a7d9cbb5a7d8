from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import DAY
from jobsvc.store import queues, registry
from jobsvc.store.tables import workers
from tests.store.house import House, together, worker

DEMO = JobTypeInfo("demo", "what it does", '{"type": "object"}', "q", 3, 1.5)


def types(house: House) -> dict[str, JobTypeInfo]:
    return house.database.read(registry.load_types)


def revision(house: House) -> int:
    return house.database.read(registry.registry_revision)


def live(house: House) -> frozenset[tuple[str, str]]:
    return house.write(registry.live_types)


def test_announced_types_are_stored_exactly(house: House) -> None:
    house.announce(worker(), DEMO, JobTypeInfo("bare"))
    assert types(house) == {"demo": DEMO, "bare": JobTypeInfo("bare")}


def test_the_later_announcement_stands_and_grows_the_revision(house: House) -> None:
    house.announce(worker(), DEMO)
    first = revision(house)
    house.announce(worker("w2"), DEMO)
    assert revision(house) == first
    changed = replace(DEMO, description="", queue=None, timeout=2.0)
    house.announce(worker("w3"), changed)
    assert types(house) == {"demo": changed}
    assert revision(house) == first + 1
    assert house.write(lambda tx: tx.registry_revision) == first + 1


def test_a_worker_is_live_while_it_beats(house: House) -> None:
    house.announce(worker(queues=("default", "slow"), job_types=("demo", "other")))
    everything = {(q, t) for q in ("default", "slow") for t in ("demo", "other")}
    assert live(house) == everything
    house.wait(29)
    assert house.write(lambda tx: registry.heartbeat(tx, "w1"))
    house.wait(29)
    assert live(house) == everything
    house.wait(2)
    assert live(house) == frozenset()
    assert house.write(lambda tx: registry.heartbeat(tx, "w1"))
    assert live(house) == everything


def test_a_retired_worker_is_gone_and_its_types_stay_known(house: House) -> None:
    house.announce(worker(), DEMO)
    house.write(lambda tx: registry.retire(tx, "w1"))
    assert live(house) == frozenset()
    assert not house.write(lambda tx: registry.heartbeat(tx, "w1"))
    assert types(house) == {"demo": DEMO}


def test_a_dead_worker_is_forgotten_after_a_day(house: House) -> None:
    house.announce(worker("old"))
    house.wait(DAY - 60)
    house.announce(worker("young"))
    house.write(registry.forget_dead)
    assert house.count(workers) == 2
    house.wait(120)
    house.write(registry.forget_dead)
    names = house.database.read(lambda c: c.execute(sa.select(workers.c.id)).scalars().all())
    assert names == ["young"]


def test_announcing_again_replaces_the_worker(house: House) -> None:
    house.announce(worker(queues=("default",), prefetch=8))
    house.announce(worker(queues=("slow",), prefetch=3))
    assert house.count(workers) == 1
    assert live(house) == {("slow", "demo")}
    assert house.write(lambda tx: registry.live_prefetch(tx, "slow")) == 3


def test_prefetch_counts_the_live_workers_of_the_queue(house: House) -> None:
    house.announce(worker("silent", prefetch=100))
    house.wait(31)
    house.announce(worker("w1", prefetch=8))
    house.announce(worker("w2", prefetch=5, queues=("default", "slow")))
    prefetch = [
        house.write(lambda tx, q=queue: registry.live_prefetch(tx, q))  # type: ignore[misc]
        for queue in ("default", "slow", "unknown")
    ]
    assert prefetch == [13, 5, 0]


def test_a_broken_queue_is_left_behind_once(house: House) -> None:
    def leave(broken: int) -> int:
        return house.write(lambda tx: queues.next_generation(tx, "default", broken))

    house.announce(worker(queues=("default", "slow")))
    assert house.database.read(queues.generations) == {"default": 1, "slow": 1}
    assert together(*[lambda: leave(1)] * 5) == [2] * 5
    assert leave(1) == 2
    assert leave(2) == 3
    assert house.database.read(queues.generations) == {"default": 3, "slow": 1}


def test_naming_a_queue_again_keeps_its_generation(house: House) -> None:
    house.write(lambda tx: queues.add_queues(tx, ["b", "a", "b"]))
    house.write(lambda tx: queues.next_generation(tx, "a", 1))
    house.write(lambda tx: queues.add_queues(tx, ["a", "c"]))
    house.announce(worker(queues=("a",)))
    assert house.database.read(queues.generations) == {"a": 2, "b": 1, "c": 1}


@pytest.mark.parametrize("workers_count", [8])
def test_workers_that_start_at_once_are_all_known(house: House, workers_count: int) -> None:
    infos = [JobTypeInfo(f"t{n}") for n in range(5)]
    names = [f"w{n}" for n in range(workers_count)]

    def start(name: str) -> None:
        order = infos if name < "w4" else infos[::-1]
        house.announce(worker(name, queues=("b", "a") if name < "w4" else ("a", "b")), *order)

    together(*[lambda name=name: start(name) for name in names])
    assert house.count(workers) == workers_count
    assert set(types(house)) == {info.name for info in infos}
