"""A row that somebody else has locked, an operator's session for one, costs its own job alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import Log
from jobsvc.core.model import DAY
from jobsvc.core.states import JobState
from jobsvc.store import dispatching, hot, registry, verbs
from jobsvc.store.database import CommitUnknown, Database, Transaction
from jobsvc.store.locking import passing_over
from jobsvc.store.tables import idempotency_keys, jobs, workers
from tests.harness.wait import until
from tests.store.conftest import connect
from tests.store.house import (
    DONE,
    EVERY_TYPE,
    LEASE_SECONDS,
    House,
    new_id,
    new_token,
    wait_until_blocked,
    worker,
)
from tests.unit.worker_runtime.conftest import SECONDS_MAX, Runtime, Shaky
from worker.runtime import recording
from worker.runtime.lease import LeaseThread


@contextmanager
def locked(house: House, table: sa.Table = jobs, **key: str) -> Iterator[None]:
    """Meanwhile another session holds the rows."""
    other = connect(house.database.url.render_as_string(hide_password=False))
    rows = sa.select(table).filter_by(**key).with_for_update()
    with other.engine.begin() as connection:
        # Longer than any test: it is the test that ends it.
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        assert connection.execute(rows).all()
        yield
    other.close()


@pytest.fixture
def impatient(pg_house: House) -> Iterator[House]:
    """Whoever waits for a lock is refused at once, and so fails the test."""
    url = pg_house.database.url.update_query_dict({"options": "-c lock_timeout=1ms"})
    database = Database(url.render_as_string(hide_password=False))
    yield House(database)
    database.close()


# The verbs.


def test_a_lease_is_renewed_beside_one_that_is_locked(impatient: House) -> None:
    house = impatient
    stuck, fine, lost = house.start(), house.start(), house.start()
    house.change(lost.job_id, lease_token=new_token())
    house.cancel(stuck.job_id)
    leases = {each.job_id: each.token for each in (stuck, fine, lost)}
    with locked(house, id=stuck.job_id):
        assert house.renew(stuck, fine, lost) == {(fine.job_id, fine.token): False}
        held = house.database.read(lambda c: verbs.leased(c, leases))
    assert held == {(stuck.job_id, stuck.token): True, (fine.job_id, fine.token): False}


def claim(house: House, *job_ids: str) -> verbs.ClaimResult:
    given = dict.fromkeys(job_ids, 0)
    token = new_token()
    return house.write(
        lambda tx: verbs.claim(
            passing_over(tx), given, EVERY_TYPE, "w1", token, LEASE_SECONDS, given
        )
    )


def test_a_claim_passes_over_what_is_locked_and_owes_it_a_message(impatient: House) -> None:
    house = impatient
    stuck, fine = house.submit(), house.submit()
    house.deliver()
    with locked(house, id=stuck):
        found = claim(house, stuck, fine, new_id())
    assert [each.job_id for each in found.claimed] == [fine]
    assert found.effects.dispatches == ()  # it is the relay's, once it is due
    assert house.owed() == house.owed(stuck) == ["job"]
    house.wait(dispatching.LOCKED_DELAY.total_seconds())
    assert [each.job_id for each in house.take_owed()] == [stuck]
    assert house.row(stuck).last_sequence == 1


def test_what_needs_no_message_is_owed_none(impatient: House) -> None:
    """Ended, held (whoever releases it sends one), of another priority (it has another one)."""
    house = impatient
    ended, held, outdated = house.submit(), house.submit(), house.submit(priority=1)
    house.cancel(ended)
    house.change(held, held=True, held_for="QUEUE")
    house.deliver()
    with locked(house, job_type="demo"):
        found = claim(house, ended, held, outdated)
    assert (found.claimed, house.owed()) == ((), [])


def test_messages_are_passed_on_beside_one_that_is_locked(impatient: House) -> None:
    house = impatient
    stuck, fine = house.submit(), house.submit()
    house.deliver()
    with locked(house, id=stuck):
        house.republish(stuck, fine)
    assert [each.job_id for each in house.effects.dispatches] == [fine]
    assert house.owed(stuck) == ["job"]


def test_outcomes_and_reports_are_recorded_beside_one_that_is_locked(impatient: House) -> None:
    house = impatient
    stuck, fine = house.start(), house.start()
    reports = {each.job_id: (each.token, [Log("INFO", "x")]) for each in (stuck, fine)}
    endings = {each.job_id: (each.token, DONE) for each in (stuck, fine)}
    with locked(house, id=stuck.job_id):
        told, _ = house.write(lambda tx: verbs.report(passing_over(tx), reports))
        accepted, _ = house.write(lambda tx: verbs.finish(passing_over(tx), endings))
    assert told == accepted == {fine.job_id}
    assert house.history(stuck.job_id) == ["SUBMITTED>QUEUED", "STARTED>RUNNING"]


def test_the_purge_passes_over_what_is_locked(impatient: House) -> None:
    house = impatient
    ids = [house.submit(idempotency_key=key, request_hash=b"h") for key in ("a", "b")]
    for job_id in ids:
        house.finish(house.claim(job_id), DONE)
    house.announce(worker("w1"))
    house.announce(worker("w2"))
    house.wait(400 * DAY)
    with locked(house, idempotency_keys, key="a"), locked(house, workers, id="w1"):
        assert house.purge() == 2
        house.write(registry.forget_dead)
        assert house.count(idempotency_keys) == house.count(workers) == 1
    house.purge()
    assert house.count(idempotency_keys) == 0


# The worker.


@pytest.fixture
def runtime(pg_house: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    monkeypatch.setattr(recording, "LOCKED_SECONDS", 0.02)
    made = Runtime(cast(Shaky, pg_house.database))
    made.start()
    yield made
    made.stop()


def wait_state(house: House, job_id: str, state: JobState) -> None:
    until(lambda: house.get(job_id).state is state, SECONDS_MAX, f"it is {state}")


def test_a_message_of_a_locked_job_holds_up_no_other(runtime: Runtime) -> None:
    house = runtime.house
    stuck = house.submit()
    house.deliver()
    with locked(house, id=stuck):
        delivery = runtime.deliver(stuck)
        fine, _ = runtime.run()
        runtime.consumer.wait_acknowledged(delivery)
        assert house.owed(stuck) == ["job"]  # its message is kept
        runtime.pool.end(fine, DONE)
        wait_state(house, fine, JobState.SUCCEEDED)
    runtime.deliver(stuck)
    assert runtime.pool.of(stuck).attempt == 1


def test_an_outcome_that_cannot_be_recorded_yet_holds_up_no_other(runtime: Runtime) -> None:
    house = runtime.house
    stuck, message = runtime.run()
    with locked(house, id=stuck):
        runtime.pool.tell(stuck, Log("INFO", "first"))
        runtime.pool.end(stuck, DONE)
        fine, _ = runtime.run()
        runtime.pool.tell(fine, Log("INFO", "fine"))
        runtime.pool.end(fine, DONE)
        wait_state(house, fine, JobState.SUCCEEDED)
        assert house.get(stuck).state is JobState.RUNNING
    wait_state(house, stuck, JobState.SUCCEEDED)
    assert house.history(stuck)[-2:] == ["LOG>RUNNING", "SUCCEEDED>SUCCEEDED"]
    runtime.consumer.wait_acknowledged(message)
    assert runtime.consumer.acknowledged.count(message) == 1
    assert len(runtime.attempts) == 0


def test_what_waits_to_be_recorded_keeps_no_place_for_messages(runtime: Runtime) -> None:
    stuck, message = runtime.run()
    with locked(runtime.house, id=stuck):
        runtime.pool.end(stuck, DONE)
        runtime.consumer.wait_acknowledged(message)
        assert runtime.attempts.detached == 0
        assert runtime.keeper.standing()[1] == {}


def test_a_worker_that_stops_gives_a_locked_row_a_moment(
    pg_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "LOCKED_SECONDS", 0.02)
    monkeypatch.setattr(recording, "LAST_WRITE_SECONDS", 0.1)
    runtime = Runtime(cast(Shaky, pg_house.database))
    runtime.start()
    stuck, _ = runtime.run()
    with locked(pg_house, id=stuck):
        runtime.pool.end(stuck, DONE)
        runtime.stop()
    assert pg_house.get(stuck).state is JobState.RUNNING  # the reaper's, when its lease is over
    assert len(runtime.attempts) == 0


def test_leases_are_renewed_and_cancels_told_beside_a_locked_row(runtime: Runtime) -> None:
    """Of the jobs, and of the worker's own."""
    house = runtime.house
    house.announce(worker("w1"))
    stuck, fine = runtime.run()[0], runtime.run()[0]
    house.cancel(stuck)
    before = house.row(stuck).lease_expire_time
    thread = LeaseThread(
        house.database,
        "w1",
        runtime.keeper,
        lambda: None,
        threading.Event(),
        lease_seconds=2 * LEASE_SECONDS,
        heartbeat_seconds=0.02,
    )

    def renewed(job_id: str) -> bool:
        expires = house.row(job_id).lease_expire_time
        return bool(expires > before + timedelta(seconds=LEASE_SECONDS / 2))

    with locked(house, id=stuck), locked(house, workers, id="w1"):
        thread.start()
        until(lambda: renewed(fine), SECONDS_MAX, "the other lease is renewed")
        runtime.pool.wait(lambda: runtime.pool.cancelled)
        assert not renewed(stuck)
        assert runtime.pool.abandoned == []
    until(lambda: renewed(stuck), SECONDS_MAX, "its lease is renewed, once it can be")
    thread.stop()
    assert set(runtime.pool.cancelled) == {runtime.pool.of(stuck).key}


def test_a_claim_whose_commit_was_lost_is_waited_for(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be under way, and holds what it claims: to pass over that would start nothing."""
    house = runtime.house
    job_id = house.submit()
    claim = hot.claim
    calls: list[str] = []

    def lost(database: Database, *given: object) -> object:
        token = str(given[3])
        calls.append(token)
        if len(calls) == 1:
            began = threading.Event()

            def under_way(tx: Transaction) -> None:
                verbs.claim(tx, [job_id], EVERY_TYPE, "w1", token, LEASE_SECONDS)
                began.set()
                wait_until_blocked(house)

            threading.Thread(target=lambda: house.database.write(under_way)).start()
            assert began.wait(SECONDS_MAX)
            raise CommitUnknown
        return claim(database, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(hot, "claim", lost)
    runtime.deliver(job_id)
    assert runtime.pool.of(job_id).attempt == 1
    assert set(calls) == {runtime.pool.of(job_id).token}
