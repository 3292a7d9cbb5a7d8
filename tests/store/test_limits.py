"""Queues that are paused or limited, concurrency keys, and the jobs that wait for room."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobsvc.core.attempts import Claimed, Interrupted, JobTypeInfo
from jobsvc.core.model import Concurrency, OnConflict, Unique
from jobsvc.core.states import JobState
from jobsvc.store import queues, verbs
from jobsvc.store.database import Transaction
from jobsvc.store.rules import releasing
from jobsvc.store.rules.limits import OFFER, PAST, counts_until
from jobsvc.store.tables import jobs, outbox, queue_starts, service
from tests.store.house import (
    DONE,
    FATAL,
    LEASE_SECONDS,
    RETRYABLE,
    WAIT_SECONDS_MAX,
    House,
    new_job,
    new_token,
    together,
    wait_until_blocked,
    worker,
)

KEY = Concurrency("k", 1)
OFFER_SECONDS = OFFER.total_seconds()


def held(house: House, *ids: str) -> list[str | None]:
    """What each is held for; None for one that is not held."""
    rows = [house.row(job_id) for job_id in ids]
    return [row.held_for if row.held else None for row in rows]


def offered(house: House) -> list[str]:
    """What the last verb owes messages for."""
    return [dispatch.job_id for dispatch in house.effects.dispatches]


def submit(house: House, count: int, **fields: Any) -> list[str]:
    return [house.submit(**fields) for _ in range(count)]


def take_owed(house: House) -> list[str]:
    """What messages are owed for; the broker has them then."""
    owed = sa.select(outbox.c.job_id).where(outbox.c.kind == "job")
    found = house.database.read(lambda c: list(c.execute(owed).scalars()))
    house.deliver()
    return found


def limited(house: House) -> bool:
    return bool(house.database.read(lambda c: c.execute(sa.select(service.c.limited)).scalar()))


# Pausing.


def test_a_paused_queue_starts_nothing_until_it_is_resumed(house: House) -> None:
    running = house.start()
    ids = submit(house, 3)
    house.pause()
    house.deliver()
    assert house.claim_all(ids) == ()
    assert held(house, *ids) == ["QUEUE"] * 3
    assert house.owed() == []
    assert [house.row(job_id).last_sequence for job_id in ids] == [1] * 3
    assert house.finish(running, DONE)
    assert (offered(house), house.release_held()) == ([], 0)
    house.resume()
    assert offered(house) == ids
    assert len(house.claim_all(ids)) == 3


def test_what_comes_into_a_paused_queue_is_held_at_once(house: House) -> None:
    """Its message would only make a worker hold it, if not after the queue is resumed, and then
    in any order."""
    failed = house.start()
    assert house.finish(failed, FATAL)
    retrying, running = house.start(), house.start()
    assert house.finish(retrying, RETRYABLE)
    scheduled = house.submit(delay=1.0)
    house.pause()
    house.deliver()
    submitted = house.submit()
    house.wait(3600)
    house.promote()
    assert house.finish(running, Interrupted())
    house.retry(failed.job_id)
    ids = [failed.job_id, retrying.job_id, running.job_id, scheduled, submitted]
    assert held(house, *ids) == ["QUEUE"] * 5
    assert [house.row(job_id).state for job_id in ids] == [JobState.QUEUED] * 5
    assert take_owed(house) == []
    assert house.submit(queue="elsewhere") in take_owed(house)
    house.resume()
    assert sorted(take_owed(house)) == sorted(ids)


def test_what_ends_as_it_comes_in_is_not_held(house: House) -> None:
    """Of two with a unique key that are retried at once the second replaces the first."""
    unique = Unique("k", on_conflict=OnConflict.REPLACE)
    first, second = sorted(house.submit(unique=unique) for _ in range(2))
    house.cancel(first), house.cancel(second)
    house.pause()
    house.retry_many(first, second)
    states = [house.row(job_id).state for job_id in (first, second)]
    assert (states, held(house, first, second)) == (
        [JobState.CANCELLED, JobState.QUEUED],
        [None, "QUEUE"],
    )


def test_others_go_on_beside_a_paused_queue(house: House) -> None:
    house.pause("slow")
    slow, quick = house.submit(queue="slow"), house.submit()
    (claimed,) = house.claim_all([slow, quick])
    assert claimed.job_id == quick


def test_a_queue_that_is_named_is_known(house: House) -> None:
    house.pause("one")
    house.resume("two")
    house.limit("three", 3)
    listed = house.database.read(lambda c: queues.list_queues(c, "", 10))
    assert [(q.name, q.paused, q.max_running) for q in listed] == [
        ("one", True, None),
        ("three", False, 3),
        ("two", False, None),
    ]


def test_whether_any_queue_is_limited_is_known_exactly(house: House) -> None:
    seen = [limited(house)]
    changes: list[Callable[[], None]] = [
        lambda: house.pause("a"),
        lambda: house.limit("b", 1),
        lambda: house.resume("a"),
        lambda: house.rate(1, 1.0, "b"),
        lambda: house.limit("b", None),
        lambda: house.rate(0, 0, "b"),
    ]
    for change in changes:
        change()
        seen.append(limited(house))
    assert seen == [False, True, True, True, True, True, False]


def test_two_that_change_queues_at_once_know_of_each_other(pg_house: House) -> None:
    """Else the one that resumes would say that no queue is limited."""
    house = pg_house
    for _ in range(8):
        house.pause("a")
        together(
            lambda: house.write(lambda tx: queues.set_paused(tx, "a", False)),
            lambda: house.write(lambda tx: queues.set_paused(tx, "b", True)),
        )
        assert limited(house)
        house.resume("b")
        assert not limited(house)


def test_resuming_offers_a_long_backlog_in_batches(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "RELEASED_MAX", 2)
    monkeypatch.setattr(releasing, "SPARE", 0)
    house.pause()
    ids = submit(house, 5)
    house.claim_all(ids)
    house.resume()
    assert offered(house) == ids[:2]
    assert [house.release_held(2) for _ in range(3)] == [2, 1, 0]


# How many run.


def test_as_many_run_as_may_and_the_best_first(house: House) -> None:
    house.limit(max_running=2)
    low, high, other, top = (house.submit(priority=p) for p in (0, 5, 0, 9))
    assert {c.job_id for c in house.claim_all([low, high, other, top])} == {high, top}
    assert held(house, low, other) == ["QUEUE"] * 2
    assert house.claim_all([house.submit(priority=9)]) == ()


def test_an_end_offers_its_place_to_the_best_that_waits(house: House) -> None:
    house.limit(max_running=1)
    running = house.start()
    first, second, best = (house.submit(priority=p) for p in (0, 0, 3))
    house.claim_all([first, second, best])
    house.finish(running, DONE)
    assert offered(house) == [best]
    house.finish(house.claim(best), RETRYABLE)
    assert offered(house) == [first]
    assert held(house, first, second) == [None, "QUEUE"]


def test_a_worker_that_is_lost_makes_room_too(house: House) -> None:
    house.limit(max_running=1)
    house.start()
    waiting = house.submit()
    house.claim_all([waiting])
    house.wait(LEASE_SECONDS + 1)
    assert house.reap() == 1
    assert offered(house) == [waiting]


def test_a_limit_that_is_raised_or_lifted_makes_room(house: House) -> None:
    house.limit(max_running=1)
    house.start()
    ids = submit(house, 4)
    house.claim_all(ids)
    house.limit(max_running=2)
    assert offered(house) == ids[:1]
    house.limit(max_running=None)
    assert offered(house) == ids[1:]
    assert len(house.claim_all(ids)) == 4


def test_a_limit_below_what_runs_stops_nothing(house: House) -> None:
    running = [house.start() for _ in range(3)]
    house.limit(max_running=1)
    waiting = house.submit()
    for claimed in running[:2]:
        assert house.claim_all([waiting]) == ()
        assert house.finish(claimed, DONE)
        assert offered(house) == []
    house.finish(running[2], DONE)
    assert offered(house) == [waiting]


def test_a_long_backlog_has_few_messages_on_their_way(house: House) -> None:
    """However many wait: no more than one for each start."""
    house.limit(max_running=2)
    count = 20
    ids = submit(house, count)
    house.deliver()
    running = list(house.claim_all(ids))
    messages = 0
    for _ in range(count - 2):
        house.finish(running.pop(0), DONE)
        house.release_held()
        due = take_owed(house)
        assert len(due) == 1
        messages += len(due)
        running += house.claim_all(due)
        assert len(running) == 2
    assert messages == count - 2


def test_a_place_is_kept_for_the_job_that_was_offered_it(house: House) -> None:
    house.limit(max_running=1)
    running = house.start()
    waiting = house.submit()
    house.claim_all([waiting])
    house.finish(running, DONE)
    late = house.submit()  # its message is there before
    assert house.claim_all([late]) == ()
    assert held(house, waiting, late) == [None, "QUEUE"]
    assert house.release_held() == 0
    house.claim(waiting)


def test_one_place_is_offered_to_one_job(house: House) -> None:
    """Even where a better one has come to wait for it since."""
    house.limit(max_running=1)
    running = house.start()
    first, second = submit(house, 2)
    house.claim_all([first, second])
    house.finish(running, DONE)
    house.change(second, priority=9)
    assert house.release_held() == 0


def test_a_better_job_need_not_wait_for_one_that_was_offered_the_place(house: House) -> None:
    house.limit(max_running=1)
    running = house.start()
    waiting = house.submit()
    house.claim_all([waiting])
    house.finish(running, DONE)
    best = house.claim(house.submit(priority=1))
    assert house.claim_all([waiting]) == ()
    assert held(house, waiting) == ["QUEUE"]
    house.finish(best, DONE)
    assert offered(house) == [waiting]


def test_a_place_is_not_kept_for_ever(house: House) -> None:
    """The message may be lost, or with a worker that is busy."""
    house.limit(max_running=1)
    running = house.start()
    lost, next_one = submit(house, 2)
    house.claim_all([lost, next_one])
    house.finish(running, DONE)
    house.wait(OFFER_SECONDS - 0.5)
    assert house.release_held() == 0
    house.wait(1)
    assert house.release_held() == 1
    assert offered(house) == [next_one]
    house.claim(next_one)
    assert house.claim_all([lost]) == ()
    assert held(house, lost) == ["QUEUE"]


@pytest.mark.parametrize("ends", ["cancelled", "expired"])
def test_the_place_of_an_offered_job_that_ends_is_for_others(house: House, ends: str) -> None:
    house.limit(max_running=1)
    running = house.start()
    gone, next_one = house.submit(ttl=60.0), house.submit()
    house.claim_all([gone, next_one])
    house.finish(running, DONE)
    if ends == "cancelled":
        house.cancel(gone)
        assert house.release_held() == 1
    else:
        house.change(gone, expire_time=house.now() - timedelta(seconds=1))
        house.claim_all([gone])
    assert next_one in offered(house)
    assert house.get(gone).state.terminal


def test_an_interrupted_job_waits_behind_a_better_one(house: House) -> None:
    house.limit(max_running=1)
    running = house.start()
    better = house.submit(priority=1)
    house.claim_all([better])
    house.finish(running, Interrupted())
    assert set(offered(house)) == {better, running.job_id}
    assert house.claim_all([running.job_id]) == ()
    house.claim(better)


# Concurrency keys.


def test_jobs_of_a_key_run_one_by_one_whatever_their_queue_and_type(house: House) -> None:
    running = house.start(concurrency=KEY)
    ids = [
        house.submit("other", queue="q", concurrency=KEY),
        house.submit(concurrency=KEY, priority=1),
    ]
    free = house.submit()
    (claimed,) = house.claim_all([*ids, free])
    assert claimed.job_id == free
    assert held(house, *ids) == ["KEY"] * 2
    house.finish(running, DONE)
    assert offered(house) == [ids[1]]
    house.finish(house.claim(ids[1]), DONE)
    assert offered(house) == [ids[0]]
    house.claim(ids[0])


def test_each_job_goes_by_its_own_limit(house: House) -> None:
    wide, narrow = Concurrency("k", 3), Concurrency("k", 1)
    running = [house.start(concurrency=wide), house.start(concurrency=wide)]
    assert house.claim_all([house.submit(concurrency=narrow)]) == ()
    running.append(house.start(concurrency=wide))
    assert house.claim_all([last := house.submit(concurrency=wide)]) == ()
    house.finish(running.pop(), DONE)
    assert offered(house) == [last]


def test_other_keys_do_not_matter(house: House) -> None:
    house.start(concurrency=KEY)
    house.start(concurrency=Concurrency("other", 1))


def test_a_batch_counts_its_own(house: House) -> None:
    ids = submit(house, 3, concurrency=Concurrency("k", 2))
    assert [c.job_id for c in house.claim_all(ids)] == ids[:2]
    assert held(house, ids[2]) == ["KEY"]


def test_a_queues_place_that_a_key_leaves_unused_is_for_the_next(house: House) -> None:
    """The one that was offered it runs into its key, and a slot is free."""
    house.limit("q", 1)
    house.start(concurrency=KEY)
    running = house.start(queue="q")
    keyed, next_one = house.submit(queue="q", priority=5, concurrency=KEY), house.submit(queue="q")
    house.claim_all([keyed, next_one])
    assert held(house, keyed, next_one) == ["QUEUE"] * 2
    house.finish(running, DONE)
    assert offered(house) == [keyed]
    assert house.claim_all([keyed]) == ()
    assert held(house, keyed) == ["KEY"]
    assert offered(house) == [next_one]


def test_the_tick_goes_through_all_keys_some_at_a_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releasing, "KEYS_MAX", 2)
    keys = [Concurrency(f"k{n}", 1) for n in range(5)]
    running = [house.start(concurrency=key) for key in keys]
    ids = [house.submit(concurrency=key) for key in keys for _ in range(2)]
    house.claim_all(ids)
    for claimed in running:  # past all verbs, as if nobody had made room
        house.change(claimed.job_id, concurrency_key=None)
    after, released = "", []
    for _ in range(3):
        found = house.write(lambda tx: releasing.release_held(tx, 100, after))  # noqa: B023
        after = found.after
        released += [dispatch.job_id for dispatch in found.effects.dispatches]
    assert (released, after) == (ids[::2], "")


# Rates.


def test_no_more_start_than_the_rate_allows(house: House) -> None:
    house.rate(2, 60.0)
    ids = submit(house, 5)
    assert [c.job_id for c in house.claim_all(ids)] == ids[:2]
    assert held(house, *ids[2:]) == ["QUEUE"] * 3
    house.wait(30)
    assert house.release_held() == 0
    house.wait(29.9)
    assert house.release_held() == 0
    house.wait(1.1)  # of which a grain is lost
    assert house.release_held() == 2
    assert offered(house) == ids[2:4]
    assert house.release_held() == 0
    assert len(house.claim_all(ids[2:4])) == 2
    assert house.claim_all(ids[4:]) == ()


def test_an_end_does_not_make_room_in_a_rate(house: House) -> None:
    house.rate(1, 60.0)
    running = house.start()
    waiting = house.submit()
    house.claim_all([waiting])
    house.finish(running, DONE)
    assert offered(house) == []


def test_the_tick_knows_when_a_rate_opens(house: House) -> None:
    house.rate(1, 10.0)
    house.start()
    house.claim_all([house.submit()])
    house.wait(4)
    released = house.write(lambda tx: releasing.release_held(tx, 10))
    assert 5 < released.opens <= 6.5
    house.wait(released.opens)
    assert house.release_held() == 1


@pytest.mark.parametrize(("period", "free_after"), [(10.0, 10.0), (600.0, 600.0)])
def test_what_was_started_counts_by_the_new_period(
    house: House, period: float, free_after: float
) -> None:
    house.rate(1, 100.0)
    house.start()
    house.rate(1, period)
    waiting = house.submit()
    assert house.claim_all([waiting]) == ()
    house.wait(free_after - 2)
    assert house.release_held() == 0
    house.wait(2 + 100 / 64 + period / 64)
    assert house.release_held() == 1


def test_a_rate_takes_bounded_room_and_leaves_none_behind(house: House) -> None:
    house.rate(10_000, 6.4)
    for _ in range(40):
        house.start()
        house.wait(1.0)
    assert house.count(queue_starts) <= 6.4 + PAST.total_seconds() + 2
    house.rate(0, 0)
    assert house.count(queue_starts) == 0


def test_any_period_has_an_end() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    for period in (1e-9, 1e-3, 1.0, 3e11):
        assert counts_until(now, period) >= min(
            now + timedelta(seconds=min(period, 1e9)), datetime(9999, 1, 1, tzinfo=UTC)
        )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 4),
    st.sampled_from([0.05, 1.0, 7.3]),
    st.lists(
        st.tuples(st.sampled_from([-0.04, 0.0, 0.01, 0.3, 0.9, 1.02, 5.0]), st.integers(1, 3)),
        min_size=4,
        max_size=12,
    ),
)
@example(2, 1.0, [(0.0, 2), (1.02, 1), (-0.04, 1), (0.0, 1)])
def test_no_window_has_more_starts_than_the_rate(
    sqlite_house: House, starts: int, period: float, asked: list[tuple[float, int]]
) -> None:
    """By the times that the starts are recorded with, even if the clock was set back in between."""
    house = House(sqlite_house.database, frozen=datetime(2030, 1, 1, tzinfo=UTC))
    house.write(lambda tx: tx.execute(sa.delete(jobs)))
    house.rate(0, 0)
    house.rate(starts, period)
    for seconds, count in asked:
        house.wait(seconds * period)
        house.claim_all(submit(house, count))
    started = sorted(
        house.database.read(
            lambda c: c.execute(sa.select(jobs.c.start_time).where(jobs.c.attempt > 0)).scalars()
        )
    )
    assert started
    for first, beyond in zip(started, started[starts:], strict=False):
        assert beyond - first >= timedelta(seconds=period), started


# What it costs.


def statements(house: House, body: Callable[[Transaction], object]) -> int:
    count = itertools.count()

    def look(tx: Transaction) -> None:
        sa.event.listen(tx.connection, "before_cursor_execute", lambda *_: next(count))
        body(tx)

    house.write(look)
    return next(count)


def claim_and_finish(house: House, **fields: Any) -> tuple[int, int]:
    ids = submit(house, 3, **fields)
    claimed: list[Claimed] = []

    def claim(tx: Transaction) -> None:
        found = verbs.claim(tx, ids, frozenset({"demo"}), "w1", new_token(), LEASE_SECONDS)
        claimed.extend(found.claimed)

    def finish(tx: Transaction) -> None:
        verbs.finish(tx, {c.job_id: (c.token, DONE) for c in claimed})

    return statements(house, claim), statements(house, finish)


def test_jobs_without_limits_cost_no_statement_more(house: House) -> None:
    plain = claim_and_finish(house)
    house.start(concurrency=KEY)
    assert claim_and_finish(house) == plain
    house.limit("elsewhere", 1)
    assert claim_and_finish(house) == (plain[0] + 1, plain[1] + 1)
    house.limit("elsewhere", None)
    assert claim_and_finish(house) == plain
    assert plain == ((4, 4) if house.database.sqlite else (3, 3))


# Side by side.


def claim(house: House, ids: Collection[str]) -> tuple[Claimed, ...]:
    types = frozenset({"demo"})
    return house.write(
        lambda tx: verbs.claim(tx, ids, types, "w1", new_token(), LEASE_SECONDS)
    ).claimed


def finish(house: House, claimed: Claimed) -> list[str]:
    """Who was offered its place."""
    endings = {claimed.job_id: (claimed.token, DONE)}
    _, effects = house.write(lambda tx: verbs.finish(tx, endings))
    return [dispatch.job_id for dispatch in effects.dispatches]


def race(
    house: House, calls: Mapping[str, Callable[[Transaction], Any]], slow: str
) -> dict[str, Any]:
    """What each of two verbs answers. The one that is slow has the lock of a limit first, and
    stands still there until the other waits for it."""
    (other,) = calls.keys() - {slow}
    has_lock = threading.Event()

    def first(tx: Transaction) -> Any:
        def pause(_c: object, _cursor: object, statement: str, *_: object) -> None:
            if "FROM queues" in statement or "advisory" in statement:
                has_lock.set()
                wait_until_blocked(house)

        sa.event.listen(tx.connection, "after_cursor_execute", pause)
        return calls[slow](tx)

    def second() -> Any:
        assert has_lock.wait(WAIT_SECONDS_MAX)
        return house.write(calls[other])

    return dict(zip((slow, other), together(lambda: house.write(first), second), strict=True))


LIMITS: list[dict[str, Any]] = [{}, {"concurrency": KEY}]


@pytest.mark.parametrize("fields", LIMITS)
def test_nothing_is_held_while_a_place_is_free(pg_house: House, fields: dict[str, Any]) -> None:
    """The claim counts what runs just as the last run ends."""
    house = pg_house
    if not fields:
        house.limit(max_running=1)
    for _ in range(10):
        running = house.start(**fields)
        job_id = house.submit(**fields)
        claimed: list[Claimed] = []
        _, offers = together(
            lambda j=job_id, c=claimed: c.extend(claim(house, [j])),  # type: ignore[misc]
            lambda r=running: finish(house, r),  # type: ignore[misc]
        )
        if not claimed:
            assert offers == [job_id]
            claimed += claim(house, [job_id])
        house.finish(claimed[0], DONE)


@pytest.mark.parametrize("fields", LIMITS)
@pytest.mark.parametrize("slow", ["claim", "finish"])
def test_each_waits_for_the_other_and_sees_what_it_did(
    pg_house: House, fields: dict[str, Any], slow: str
) -> None:
    """Whichever has the limit's lock first stands still until the other waits for it."""
    house = pg_house
    if not fields:
        house.limit(max_running=1)
    running, job_id = house.start(**fields), house.submit(**fields)
    calls: dict[str, Callable[[Transaction], Any]] = {
        "claim": lambda tx: verbs.claim(
            tx, [job_id], frozenset({"demo"}), "w1", new_token(), LEASE_SECONDS
        ),
        "finish": lambda tx: verbs.finish(tx, {running.job_id: (running.token, DONE)}),
    }
    answers = race(house, calls, slow)
    claimed, finished = answers["claim"], answers["finish"]
    if slow == "claim":  # it saw the run that was to end
        assert claimed.claimed == ()
        assert [d.job_id for d in finished[1].dispatches] == [job_id]
    else:
        assert [c.job_id for c in claimed.claimed] == [job_id]


@pytest.mark.parametrize("slow", ["submit", "resume"])
def test_a_queue_that_is_resumed_leaves_nothing_held(pg_house: House, slow: str) -> None:
    """Whichever has the lock of the queue first stands still until the other waits for it."""
    house = pg_house
    house.pause()
    calls: dict[str, Callable[[Transaction], Any]] = {
        "submit": lambda tx: verbs.submit(tx, [new_job()], {}),
        "resume": lambda tx: queues.set_paused(tx, "default", False),
    }
    race(house, calls, slow)
    (job_id,) = take_owed(house)
    assert held(house, job_id) == [None]


@pytest.mark.parametrize("fields", LIMITS)
def test_a_job_starts_after_the_end_of_the_run_whose_place_it_takes(
    pg_house: House, fields: dict[str, Any]
) -> None:
    """Though its claim began before."""
    house = pg_house
    if not fields:
        house.limit(max_running=1)
    running, job_id = house.start(**fields), house.submit(**fields)
    ended: list[list[str]] = []

    def claim_late(tx: Transaction) -> None:
        def end_meanwhile(_c: object, _cursor: object, statement: str, *_: object) -> None:
            if ("queues" in statement or "advisory" in statement) and not ended:
                ended.append(finish(house, running))

        sa.event.listen(tx.connection, "before_cursor_execute", end_meanwhile)
        verbs.claim(tx, [job_id], frozenset({"demo"}), "w1", new_token(), LEASE_SECONDS)

    house.write(claim_late)
    assert house.row(job_id).start_time >= house.row(running.job_id).finish_time


@pytest.mark.parametrize("fields", LIMITS)
def test_claims_side_by_side_start_no_more_than_may_run(
    pg_house: House, fields: dict[str, Any]
) -> None:
    house = pg_house
    if not fields:
        house.limit(max_running=2)
    for _ in range(6):
        mine, yours = submit(house, 3, **fields), submit(house, 3, **fields)
        claims = together(lambda m=mine: claim(house, m), lambda y=yours: claim(house, y))  # type: ignore[misc]
        claimed = list(itertools.chain(*claims))
        assert len(claimed) == (1 if fields else 2)
        for each in claimed:
            house.finish(each, DONE)
        for job_id in (*mine, *yours):
            if not house.get(job_id).state.terminal:
                house.cancel(job_id)


def test_rates_hold_side_by_side(pg_house: House) -> None:
    house = pg_house
    house.rate(3, 3600.0)
    batches = [submit(house, 2) for _ in range(4)]
    claims = together(*[lambda b=batch: claim(house, b) for batch in batches])
    assert len(list(itertools.chain(*claims))) == 3


# Held for a type.


def test_a_job_that_a_release_before_this_one_held_is_released(house: House) -> None:
    """It says nothing of what for, and it was for its type."""
    job_id = house.submit("other")
    house.claim_all([job_id], types=frozenset({"demo"}))
    house.change(job_id, held_for=None)
    house.announce(worker(job_types=("other",)), JobTypeInfo("other"))
    assert house.release_held() == 1
    assert offered(house) == [job_id]


def test_a_place_is_kept_only_for_what_a_limit_applies_to(house: House) -> None:
    house.pause()
    ids = submit(house, 2)
    house.claim_all(ids)
    house.resume()
    assert [house.row(job_id).held_for for job_id in ids] == [None, None]
    assert house.get(ids[0]).state is JobState.QUEUED
