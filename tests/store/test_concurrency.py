"""Verbs that race for the same jobs: one of them wins, and every history stays legal.

The checker looks at what they leave behind, so a sequence given twice or left out is found too.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import Claimed, Log, Progress
from jobsvc.core.model import DAY
from jobsvc.core.states import EventType, JobState
from jobsvc.errors import JobStateForbids
from jobsvc.store import verbs
from jobsvc.store.batch import Batch
from jobsvc.store.database import Transaction
from jobsvc.store.locking import lock
from jobsvc.store.tables import job_events, jobs
from jobsvc.store.verbs.arrows import expire_one
from tests.store.house import (
    DONE,
    FATAL,
    LEASE_SECONDS,
    RETRYABLE,
    WAIT_SECONDS_MAX,
    House,
    new_token,
    together,
    wait_until_blocked,
)

ROUNDS = 12
MANY = 40


def running(house: House, count: int) -> list[Claimed]:
    return list(house.claim_all([house.submit() for _ in range(count)]))


def claim(house: House, *ids: str) -> tuple[Claimed, ...]:
    """Unlike `House.claim_all` it sets nothing that threads share."""
    types = frozenset({"demo"})
    return house.write(
        lambda tx: verbs.claim(tx, ids, types, "w1", new_token(), LEASE_SECONDS)
    ).claimed


def cancel(house: House, job_id: str) -> JobState | None:
    """The state that the cancel left; None where it came too late."""
    try:
        return house.write(lambda tx: verbs.cancel(tx, job_id, "", "alice"))[0].state
    except JobStateForbids:
        return None


def drain(verb: Callable[[], int]) -> int:
    """Calls the verb until it finds nothing more; what another holds it passes over."""
    return sum(itertools.takewhile(bool, iter(verb, None)))


def test_two_workers_claim_one_job(house: House) -> None:
    for _ in range(ROUNDS):
        job_id = house.submit()
        claims = together(*[lambda job_id=job_id: claim(house, job_id)] * 3)
        assert sorted(len(claimed) for claimed in claims) == [0, 0, 1]
        assert house.get(job_id).attempt == 1


def test_a_claim_and_a_cancel(house: House) -> None:
    for _ in range(ROUNDS):
        job_id = house.submit()
        claimed, state = together(
            lambda job_id=job_id: claim(house, job_id),  # type: ignore[misc]
            lambda job_id=job_id: cancel(house, job_id),  # type: ignore[misc]
        )
        if claimed:
            assert state == JobState.RUNNING
            assert house.history(job_id)[1:] == ["STARTED>RUNNING", "CANCEL_REQUESTED>RUNNING"]
        else:
            assert state == JobState.CANCELLED
            assert house.history(job_id)[1:] == ["CANCELLED>CANCELLED"]


@pytest.mark.parametrize("ending", [DONE, FATAL, RETRYABLE])
def test_an_ending_and_a_reaper(house: House, ending: Any) -> None:
    for _ in range(ROUNDS):
        claimed = house.start()
        house.wait(LEASE_SECONDS + 1)
        accepted, reaped = together(
            lambda claimed=claimed: finish(house, claimed, ending),  # type: ignore[misc]
            lambda: drain(lambda: house.reap()),
        )
        assert accepted + reaped == 1
        failed = [e.error for e in house.events(claimed.job_id) if e.type == "ATTEMPT_FAILED"]
        lost = [error is not None and error.type == "WORKER_LOST" for error in failed]
        assert lost.count(True) == reaped


def finish(house: House, claimed: Claimed, ending: Any) -> int:
    endings = {claimed.job_id: (claimed.token, ending)}
    return len(house.write(lambda tx: verbs.finish(tx, endings))[0])


def test_an_ending_and_a_cancel(house: House) -> None:
    for _ in range(ROUNDS):
        claimed = house.start()
        accepted, state = together(
            lambda claimed=claimed: finish(house, claimed, DONE),  # type: ignore[misc]
            lambda claimed=claimed: cancel(house, claimed.job_id),  # type: ignore[misc]
        )
        assert accepted == 1
        assert state in (None, JobState.RUNNING)
        assert house.get(claimed.job_id).state == JobState.SUCCEEDED


def test_one_ending_told_twice(house: House) -> None:
    for _ in range(ROUNDS):
        claimed = house.start()
        told = [lambda e=e, c=claimed: finish(house, c, e) for e in (DONE, FATAL, RETRYABLE)]
        assert sum(together(*told)) == 1


def test_a_paused_reaper_cannot_undo_an_end(pg_house: House) -> None:
    """It has chosen its job and stands still before it writes; the ending has to wait for it."""
    house = pg_house
    claimed = house.start()
    house.wait(LEASE_SECONDS + 1)
    chosen = threading.Event()
    accepted: list[int] = []

    def reap_slowly(tx: Transaction) -> int:
        def pause(_c: object, _cursor: object, statement: str, *_: object) -> None:
            if "SKIP LOCKED" in statement:
                chosen.set()
                wait_until_blocked(house)

        sa.event.listen(tx.connection, "after_cursor_execute", pause)
        return verbs.reap(tx, 10)[0]

    def end() -> None:
        assert chosen.wait(WAIT_SECONDS_MAX)
        accepted.append(finish(house, claimed, DONE))

    reaped, _ = together(lambda: house.write(reap_slowly), end)
    assert (reaped, accepted) == (1, [0])
    assert house.get(claimed.job_id).state == JobState.RETRYING


def test_reapers_side_by_side(house: House) -> None:
    running(house, MANY)
    house.wait(LEASE_SECONDS + 1)
    assert sum(together(*[lambda: drain(lambda: house.reap(7))] * 3)) == MANY
    assert events(house)[EventType.ATTEMPT_FAILED] == MANY


def test_promoters_side_by_side(house: House) -> None:
    for _ in range(MANY):
        house.submit(delay=60.0)
    house.wait(61)
    assert sum(together(*[lambda: drain(lambda: house.promote(7))] * 3)) == MANY
    assert events(house)[EventType.QUEUED] == len(house.owed()) == MANY


def test_expirers_and_promoters_side_by_side(house: House) -> None:
    for _ in range(MANY):
        house.submit(delay=60.0, ttl=60.0)
    house.wait(61)
    together(
        *[lambda: drain(lambda: house.promote(7))] * 2,
        *[lambda: drain(lambda: house.expire(7))] * 2,
    )
    assert events(house)[EventType.FAILED] == MANY
    assert events(house)[EventType.QUEUED] == 0


def test_relays_side_by_side(house: House) -> None:
    ids = {house.submit() for _ in range(MANY)}
    house.wait(3)

    def relay() -> list[str]:
        batches = itertools.takewhile(bool, iter(lambda: house.take_owed(7), None))
        return [dispatch.job_id for batch in batches for dispatch in batch]

    taken = list(itertools.chain(*together(*[relay] * 3)))
    assert len(taken) == MANY
    assert set(taken) == ids


def test_redispatchers_side_by_side(house: House) -> None:
    for _ in range(MANY):
        house.submit()
    house.deliver()
    house.wait(61)
    assert sum(together(*[lambda: drain(lambda: house.redispatch(limit=7))] * 3)) == MANY
    counts = house.database.read(lambda c: c.execute(sa.select(jobs.c.dispatch_count)).scalars())
    assert set(counts) == {1}


def test_purgers_side_by_side(house: House) -> None:
    for claimed in running(house, MANY):
        house.finish(claimed, DONE)
    house.wait(8 * DAY)
    assert sum(together(*[lambda: drain(lambda: house.purge(7))] * 3)) == MANY
    assert house.count(jobs) == house.count(job_events) == 0


def test_batches_that_share_jobs_in_opposite_order(house: House) -> None:
    """They lock them in the same order all the same, so none has to be tried again."""
    claimed = running(house, MANY)
    runs: list[str] = []

    def report(tx: Transaction, order: list[Claimed]) -> None:
        runs.append("report")
        verbs.report(tx, {c.job_id: (c.token, [Progress(1, 2)]) for c in order})

    def renew(tx: Transaction, order: list[Claimed]) -> None:
        runs.append("renew")
        verbs.renew(tx, {c.job_id: c.token for c in order}, LEASE_SECONDS)

    def repeat(verb: Callable[[Transaction, list[Claimed]], None], order: list[Claimed]) -> None:
        for _ in range(8):
            house.write(lambda tx: verb(tx, order))

    together(
        lambda: repeat(report, claimed),
        lambda: repeat(report, claimed[::-1]),
        lambda: repeat(renew, claimed[::-1]),
    )
    assert Counter(runs) == {"report": 16, "renew": 8}
    assert events(house)[EventType.PROGRESS] == 16 * MANY


def test_many_tell_of_one_job(house: House) -> None:
    claimed = house.start()
    lines, threads = 10, 6

    def tell() -> None:
        for n in range(lines):
            reports = {claimed.job_id: (claimed.token, [Log("INFO", str(n))])}
            house.write(lambda tx: verbs.report(tx, reports))  # noqa: B023

    together(*[tell] * threads, lambda: cancel(house, claimed.job_id) and None)
    assert house.row(claimed.job_id).last_sequence == 2 + lines * threads + 1
    assert finish(house, claimed, DONE)


def test_a_row_that_changed_under_its_lock_rolls_everything_back(house: House) -> None:
    """It cannot, and if it ever does then no history is written over."""
    first, second = house.submit(), house.submit()

    def body(tx: Transaction) -> None:
        locked = lock(tx, [first, second])
        tx.execute(sa.update(jobs).where(jobs.c.id == second).values(last_sequence=9))
        batch = Batch(tx)
        for job in locked.values():
            expire_one(batch, job)
        batch.write()

    with pytest.raises(RuntimeError, match="1 locked jobs changed"):
        house.write(body)
    assert [house.get(i).last_sequence for i in (first, second)] == [1, 1]


def events(house: House) -> Counter[str]:
    statement = sa.select(job_events.c.type)
    return Counter(house.database.read(lambda c: c.execute(statement).scalars().all()))
