from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from jobsvc.core.attempts import (
    AttemptFailed,
    Ending,
    Input,
    Interrupted,
    Log,
    Progress,
    Snoozed,
    Stopped,
    Succeeded,
    clean_error,
)
from jobsvc.core.states import EventType, JobState
from jobsvc.store import verbs
from jobsvc.store.database import Transaction
from jobsvc.store.verbs.running import LOG_BYTES_MAX, LOG_BYTES_MIN
from tests.harness.wait import until
from tests.store.house import RETRYABLE, new_id
from worker.runtime import claiming, keeping, prefetch, recording
from worker.runtime.attempts import TOLD_MAX

from .conftest import CONCURRENCY, SECONDS_MAX, Runtime, Shaky

DONE = Succeeded(Input(b"done"))
CRASHED = AttemptFailed(clean_error("WORKER_LOST", "m"), crashed=True)
NEVER = 3600.0


def wait_state(runtime: Runtime, job_id: str, state: JobState) -> None:
    until(lambda: runtime.house.get(job_id).state is state, SECONDS_MAX, f"it is {state}")


def test_from_a_message_to_a_recorded_outcome(runtime: Runtime) -> None:
    job_id, delivery = runtime.run(timeout=7.0)
    task = runtime.pool.of(job_id)
    assert (task.job_id, task.job_type, task.attempt) == (job_id, "demo", 1)
    assert (task.timeout, task.input) == (7.0, Input())
    assert runtime.house.history(job_id)[-1] == "STARTED>RUNNING"
    assert runtime.consumer.acknowledged == []
    runtime.pool.end(job_id, DONE)
    runtime.consumer.wait_acknowledged(delivery)
    assert runtime.house.get(job_id).state is JobState.SUCCEEDED  # before it is acknowledged
    assert len(runtime.attempts) == 0
    told = [change for effects in runtime.outbox.told for change in effects.changes]
    assert [change.last_sequence for change in told] == [2, 3]


@pytest.mark.parametrize(
    ("outcome", "state", "event"),
    [
        (AttemptFailed(clean_error("E", "m")), JobState.RETRYING, EventType.ATTEMPT_FAILED),
        (AttemptFailed(clean_error("E", "m", retryable=False)), JobState.FAILED, EventType.FAILED),
        (
            CRASHED,
            JobState.RETRYING,
            EventType.ATTEMPT_FAILED,
        ),
        (Snoozed(100.0), JobState.SCHEDULED, EventType.SNOOZED),
        (Interrupted(), JobState.QUEUED, EventType.ATTEMPT_INTERRUPTED),
        (Stopped(), JobState.QUEUED, EventType.ATTEMPT_INTERRUPTED),  # of no cancel that we know
    ],
)
def test_each_outcome_is_recorded(
    runtime: Runtime, outcome: Ending, state: JobState, event: EventType
) -> None:
    job_id, delivery = runtime.run()
    runtime.pool.end(job_id, outcome)
    runtime.consumer.wait_acknowledged(delivery)
    job = runtime.house.get(job_id)
    assert job.state is state
    assert runtime.house.events(job_id)[-1].type is event
    assert runtime.house.row(job_id).crashes == (outcome == CRASHED)


def test_the_attempt_that_ends_a_job_failed_is_logged_so(runtime: Runtime) -> None:
    with capture_logs() as logs:
        again, _ = runtime.run(max_attempts=2)
        runtime.pool.end(again, RETRYABLE)
        last, delivery = runtime.run(max_attempts=1)
        runtime.pool.end(last, RETRYABLE)
        runtime.consumer.wait_acknowledged(delivery)
        until(lambda: [log for log in logs if log["event"] == "job failed"], SECONDS_MAX, "it is")
    told = {log["job_id"]: log for log in logs if log["event"] in ("attempt failed", "job failed")}
    assert (told[again]["event"], told[again]["log_level"]) == ("attempt failed", "info")
    assert told[again]["retryable"]
    assert (told[last]["event"], told[last]["log_level"]) == ("job failed", "error")
    assert (
        told[last].items() >= {"error_type": "ValueError", "attempt": 1, "worker_id": "w1"}.items()
    )
    assert "retryable" not in told[last]


def test_messages_of_jobs_that_cannot_be_claimed_are_dropped(runtime: Runtime) -> None:
    house = runtime.house
    running = house.start().job_id
    later = house.submit(delay=100.0)
    cancelled = house.submit()
    house.cancel(cancelled)
    expired = house.submit(ttl=100.0)
    house.change(expired, expire_time=house.now())
    ids = [running, later, cancelled, expired, new_id()]
    runtime.consumer.wait_acknowledged(*[runtime.deliver(job_id) for job_id in ids])
    assert runtime.pool.tasks == []
    assert house.get(expired).state is JobState.FAILED
    assert house.get(running).attempt == 1


def test_a_message_that_comes_twice(idle: Runtime) -> None:
    """At once, and again while the job runs."""
    job_id = idle.house.submit()
    first, second = idle.deliver(job_id), idle.deliver(job_id)
    idle.start()
    idle.pool.of(job_id)
    idle.consumer.wait(lambda: len(idle.consumer.acknowledged) == 1)
    third = idle.deliver(job_id)
    idle.consumer.wait_acknowledged(third)
    idle.pool.end(job_id, DONE)
    idle.consumer.wait_acknowledged(first, second)
    assert len(idle.consumer.acknowledged) == 3  # each once
    assert len(idle.pool.tasks) == 1
    assert idle.house.get(job_id).attempt == 1


@pytest.mark.parametrize("urgent_first", [True, False])
def test_of_two_messages_the_one_with_the_jobs_priority_counts(
    idle: Runtime, urgent_first: bool
) -> None:
    """The other one was sent before an update; which of them that is only the claim can tell."""
    old, new = (9, 0) if urgent_first else (0, 9)
    job_id = idle.house.submit(priority=old)
    outdated = idle.deliver(job_id, priority=old)
    idle.house.update_job(job_id, priority=new)
    latest = idle.deliver(job_id, priority=new)
    idle.start()
    idle.pool.of(job_id)
    idle.consumer.wait_acknowledged(outdated)
    assert latest not in idle.consumer.acknowledged
    idle.pool.end(job_id, DONE)
    idle.consumer.wait_acknowledged(latest)
    assert idle.house.get(job_id).attempt == 1


def test_a_message_with_another_priority_starts_nothing(runtime: Runtime) -> None:
    job_id = runtime.house.submit(priority=5)
    runtime.consumer.wait_acknowledged(runtime.deliver(job_id, priority=4))
    assert runtime.house.get(job_id).state is JobState.QUEUED
    runtime.deliver(job_id, priority=5)
    runtime.pool.of(job_id)


def test_the_most_urgent_go_first(idle: Runtime) -> None:
    ids = [idle.house.submit(priority=priority) for priority in (0, 5, 9, 5)]
    for job_id, priority in zip(ids, (0, 5, 9, 5), strict=True):
        idle.deliver(job_id, priority=priority)
    idle.start()
    idle.pool.wait(lambda: len(idle.pool.tasks) == CONCURRENCY)
    for count, job_id in enumerate((ids[2], ids[1]), CONCURRENCY + 1):
        idle.pool.end(job_id, DONE)
        idle.pool.wait(lambda count=count: len(idle.pool.tasks) == count)  # type: ignore[misc]
    assert {task.job_id for task in idle.pool.tasks[:2]} == {ids[2], ids[1]}
    assert [task.job_id for task in idle.pool.tasks[2:]] == [ids[3], ids[0]]


def test_it_claims_nothing_for_slots_that_are_not_ready(idle: Runtime) -> None:
    idle.pool.slots = CONCURRENCY - 1
    for _ in range(CONCURRENCY):
        idle.deliver(idle.house.submit())
    idle.start()
    idle.pool.wait(lambda: len(idle.pool.tasks) == CONCURRENCY - 1)
    assert len(idle.attempts) == CONCURRENCY - 1
    idle.pool.slots = CONCURRENCY
    idle.pool.wait(lambda: len(idle.pool.tasks) == CONCURRENCY)


def test_it_claims_as_far_ahead_as_will_start_soon(idle: Runtime) -> None:
    idle.pool.average_run_seconds = claiming.CLAIM_AHEAD_SECONDS / 2
    ids = [idle.house.submit() for _ in range(10)]
    for job_id in ids:
        idle.deliver(job_id)
    idle.start()
    idle.pool.wait(lambda: len(idle.pool.tasks) == 3 * CONCURRENCY)
    assert len(idle.attempts) == 3 * CONCURRENCY
    # Jobs have become slow. Nothing is claimed, and nobody asks for it all the time.
    idle.pool.average_run_seconds = NEVER
    rounds = idle.pool.withdraw
    calls: list[float] = []

    def counted(older_than_seconds: float) -> object:
        calls.append(older_than_seconds)
        return rounds(older_than_seconds)

    idle.pool.withdraw = counted  # type: ignore[assignment,method-assign]
    time.sleep(0.6)
    assert 1 <= len(calls) <= 5
    assert len(idle.pool.tasks) == 3 * CONCURRENCY


def test_what_was_claimed_and_cannot_start_goes_back_to_the_queue(runtime: Runtime) -> None:
    job_id, delivery = runtime.run()
    runtime.pool.unstarted = [runtime.pool.of(job_id)]
    runtime.consumer.wait_acknowledged(delivery)
    assert runtime.house.history(job_id)[-1] == "ATTEMPT_INTERRUPTED>QUEUED"
    assert runtime.house.row(job_id).failures == 0


def test_messages_that_cannot_start_soon_go_to_others(runtime: Runtime) -> None:
    busy = [runtime.run() for _ in range(CONCURRENCY)]
    late, fresh = runtime.house.submit(), runtime.house.submit()
    runtime.house.deliver()
    delivery = runtime.deliver(late, age=2 * claiming.START_WITHIN_SECONDS)
    runtime.deliver(fresh)
    runtime.consumer.wait_acknowledged(delivery)
    assert runtime.house.owed(late) == ["job"]
    assert runtime.consumer.acknowledged == [delivery]
    for job_id, _ in busy:
        runtime.pool.end(job_id, DONE)
    assert runtime.pool.of(fresh).attempt == 1


def test_alone_in_a_process_it_keeps_what_it_has(database: Shaky) -> None:
    """Nobody else is there to take it, and nothing comes twice."""
    runtime = Runtime(database, alone=True)
    runtime.start()
    busy = [runtime.run() for _ in range(CONCURRENCY)]
    late = runtime.house.submit()
    runtime.deliver(late, age=2 * claiming.START_WITHIN_SECONDS)
    runtime.inbox.on_channel_lost(1)
    for job_id, delivery in busy:
        runtime.pool.end(job_id, DONE)
        runtime.consumer.wait_acknowledged(delivery)
    runtime.pool.of(late)
    assert runtime.consumer.prefetches == []
    runtime.stop()


def test_messages_of_a_channel_that_is_lost_are_forgotten(idle: Runtime) -> None:
    """They come again, on another."""
    idle.deliver(idle.house.submit())
    idle.inbox.on_channel_lost(1)
    idle.start()
    kept, _ = idle.run()
    assert [task.job_id for task in idle.pool.tasks] == [kept]


def test_prefetch_follows_the_pace(runtime: Runtime) -> None:
    runtime.pool.average_run_seconds = prefetch.AHEAD_SECONDS / 10
    runtime.keeper.on_beat()
    assert runtime.consumer.prefetches[-1] == 11 * CONCURRENCY
    runtime.pool.average_run_seconds *= 1.1  # not worth a new subscription
    runtime.keeper.on_beat()
    runtime.pool.average_run_seconds = 1e-9
    runtime.keeper.on_beat()
    assert runtime.consumer.prefetches[-1] == prefetch.PREFETCH_MAX
    runtime.pool.average_run_seconds = 100.0
    runtime.keeper.on_beat()
    assert runtime.consumer.prefetches == [11 * CONCURRENCY, prefetch.PREFETCH_MAX, CONCURRENCY]


def test_long_attempts_give_their_message_and_their_place_back(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, delivery = runtime.run()
    time.sleep(0.02)
    monkeypatch.setattr(keeping, "DETACH_SECONDS", 0.02)
    runtime.pool.average_run_seconds = 100.0
    runtime.keeper.on_beat()
    assert runtime.consumer.acknowledged == [delivery]
    assert runtime.consumer.prefetches[-1] == CONCURRENCY - 1
    monkeypatch.setattr(keeping, "DETACH_SECONDS", NEVER)
    _, other = runtime.run()
    assert other not in runtime.consumer.acknowledged
    monkeypatch.setattr(keeping, "DETACH_SECONDS", 0.0)
    runtime.keeper.on_beat()
    assert runtime.consumer.prefetches[-1] == 0  # no slot is free: no message is wanted
    runtime.pool.end(long, DONE)
    wait_state(runtime, long, JobState.SUCCEEDED)
    runtime.consumer.wait(lambda: runtime.consumer.prefetches[-1] == 1)
    assert runtime.consumer.acknowledged.count(delivery) == 1


def test_a_heartbeat_tells_what_is_held_and_when_something_was_claimed(
    idle: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle.deliver(idle.house.submit())
    assert idle.keeper.standing() == (None, {"default": 1})
    idle.start()
    idle.run()
    idle.consumer.wait(lambda: len(idle.attempts) == 2)
    ago, held = idle.keeper.standing()
    assert held == {"default": 2}
    assert ago is not None
    assert 0 <= ago < SECONDS_MAX
    monkeypatch.setattr(keeping, "DETACH_SECONDS", 0.0)
    idle.keeper.on_beat()
    assert idle.keeper.standing()[1] == {}


def test_a_claim_of_nothing_is_none(runtime: Runtime) -> None:
    runtime.house.pause()
    runtime.consumer.wait_acknowledged(runtime.deliver(runtime.house.submit()))
    assert runtime.keeper.standing() == (None, {})


def test_a_lost_lease_ends_the_attempt_and_its_outcome_is_dropped(runtime: Runtime) -> None:
    job_id, delivery = runtime.run()
    (held,) = runtime.keeper.leased()
    runtime.house.change(job_id, lease_token=new_id())  # somebody else runs it
    runtime.keeper.on_lease_lost(held, "gone")
    assert runtime.pool.abandoned == [runtime.pool.tasks[0].key]
    runtime.consumer.wait_acknowledged(delivery)
    assert runtime.house.history(job_id)[-1] == "STARTED>RUNNING"
    assert runtime.keeper.leased() == []
    assert len(runtime.attempts) == 0


def test_the_outcome_of_a_lease_that_was_lost_unnoticed_is_dropped(runtime: Runtime) -> None:
    job_id, delivery = runtime.run()
    runtime.house.change(job_id, lease_token=new_id())
    runtime.pool.tell(job_id, Log("INFO", "stale"))
    runtime.pool.end(job_id, DONE)
    runtime.consumer.wait_acknowledged(delivery)
    assert runtime.house.history(job_id)[-1] == "STARTED>RUNNING"


def test_what_is_told_after_a_lost_lease_is_not_recorded(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By token alone it would be: the lease could not be renewed, and nobody has taken it."""
    monkeypatch.setattr(runtime.pool, "abandon", lambda key: None)  # it takes its time
    job_id, delivery = runtime.run()
    (held,) = runtime.keeper.leased()
    runtime.keeper.on_lease_lost(held, "could not be renewed")
    runtime.pool.tell(job_id, Log("INFO", "late"))
    runtime.pool.end(job_id, DONE)
    runtime.consumer.wait_acknowledged(delivery)
    assert runtime.house.history(job_id)[-1] == "STARTED>RUNNING"


def test_a_cancel_reaches_the_pool(runtime: Runtime) -> None:
    job_id, delivery = runtime.run()
    runtime.house.cancel(job_id)
    runtime.inbox.on_cancel_told(new_id())
    assert not runtime.beat.is_set()
    runtime.inbox.on_cancel_told(job_id)
    assert runtime.beat.is_set()
    (held,) = runtime.keeper.leased()
    runtime.keeper.on_cancel_requested(held)
    assert runtime.pool.cancelled == [runtime.pool.tasks[0].key]
    runtime.pool.end(job_id, Stopped())
    runtime.consumer.wait_acknowledged(delivery)
    assert runtime.house.get(job_id).state is JobState.CANCELLED


def test_a_cancel_that_is_told_while_its_job_is_claimed(idle: Runtime) -> None:
    """The claim has been committed by then, and the worker does not know of it yet."""
    job_id = idle.house.submit()
    delivery = idle.deliver(job_id)
    idle.inbox.on_cancel_told(job_id)
    for _ in range(TOLD_MAX - 1):
        idle.inbox.on_cancel_told(new_id())
    assert not idle.beat.is_set()
    idle.start()
    assert idle.beat.wait(SECONDS_MAX)
    idle.pool.end(job_id, DONE)
    idle.consumer.wait_acknowledged(delivery)


def test_of_cancels_that_were_told_the_last_are_remembered(runtime: Runtime) -> None:
    for _ in range(2 * TOLD_MAX):
        runtime.inbox.on_cancel_told(new_id())
    assert len(runtime.attempts._told) == TOLD_MAX


def test_reports_are_recorded_in_order_and_before_the_outcome(runtime: Runtime) -> None:
    job_id, delivery = runtime.run()
    task = runtime.pool.of(job_id)
    for number in range(20):
        runtime.pool.tell(task.job_id, Log("INFO", str(number)))
    runtime.pool.tell(task.job_id, Progress(1.0, 0.0, "half"))
    runtime.pool.end(job_id, DONE)
    runtime.consumer.wait_acknowledged(delivery)
    events = runtime.house.events(job_id)
    logs = [e.report.message for e in events if isinstance(e.report, Log)]
    assert logs == [str(number) for number in range(20)]
    assert [event.type for event in events[-2:]] == [EventType.PROGRESS, EventType.SUCCEEDED]


def test_a_flood_of_reports_is_recorded_in_parts(
    runtime: Runtime, database: Shaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not keep others from ending."""
    sizes: list[int] = []
    report = verbs.report

    def measured(tx: Transaction, reports: dict[str, tuple[str, list[Log]]]) -> object:
        sizes.append(sum(len(entries) for _, entries in reports.values()))
        return report(tx, reports)

    monkeypatch.setattr(verbs, "report", measured)
    monkeypatch.setattr(recording, "REPORTS_MAX", 50)
    flood, _ = runtime.run()
    other, other_delivery = runtime.run()
    database.away = True
    task = runtime.pool.of(flood)
    for number in range(420):
        runtime.pool.tell(task.job_id, Log("INFO", str(number)))
    runtime.pool.tell(other, Log("INFO", "other"))
    runtime.pool.end(flood, DONE)
    runtime.pool.end(other, DONE)
    database.away = False
    wait_state(runtime, flood, JobState.SUCCEEDED)
    assert max(sizes) <= 50
    events = runtime.house.events(flood)
    logs = [e.report.message for e in events if isinstance(e.report, Log)]
    assert logs == [str(number) for number in range(420)]
    assert events[-1].type is EventType.SUCCEEDED
    assert runtime.consumer.acknowledged[0] == other_delivery
    assert runtime.house.history(other)[-2:] == ["LOG>RUNNING", "SUCCEEDED>SUCCEEDED"]


@pytest.mark.parametrize("message", ["", "x", "x" * 10_000])
def test_a_flood_takes_no_more_memory_than_its_budget(
    runtime: Runtime, database: Shaky, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    monkeypatch.setattr(recording, "LOG_BYTES_MAX", 64_000)
    job_id, _ = runtime.run()
    database.away = True
    task = runtime.pool.of(job_id)
    for _ in range(2_000):
        runtime.pool.tell(task.job_id, Log("INFO", message))
    waiting = next(iter(runtime.recording._reports.values()), [])
    assert len(waiting) <= 64_000 // max(LOG_BYTES_MIN, len(message)) + 1
    assert LOG_BYTES_MAX == 8 * 1024 * 1024


def refuse(monkeypatch: pytest.MonkeyPatch, refused: Callable[[str, Ending], bool]) -> None:
    """Has the database refuse outcomes for what is in them."""
    finish = verbs.finish

    def picky(tx: Transaction, endings: dict[str, tuple[str, Ending]]) -> object:
        if any(refused(job_id, ending) for job_id, (_, ending) in endings.items()):
            raise OverflowError
        return finish(tx, endings)

    monkeypatch.setattr(verbs, "finish", picky)


def test_an_outcome_that_the_database_refuses_fails_alone(
    runtime: Runtime, database: Shaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, bad_delivery = runtime.run()
    good, good_delivery = runtime.run()
    refuse(
        monkeypatch,
        lambda job_id, ending: job_id == bad and type(ending).__name__ == "Succeeded",
    )
    database.away = True  # so that both are recorded together
    runtime.pool.end(bad, DONE)
    runtime.pool.end(good, DONE)
    database.away = False
    runtime.consumer.wait_acknowledged(bad_delivery, good_delivery)
    assert runtime.house.get(good).state is JobState.SUCCEEDED
    job = runtime.house.get(bad)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.type == "RESULT_INVALID"
    assert len(runtime.attempts) == 0


def test_an_outcome_that_cannot_be_recorded_at_all_is_left_to_the_reaper(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, delivery = runtime.run()
    refuse(monkeypatch, lambda job_id, _: job_id == bad)
    runtime.pool.end(bad, DONE)
    runtime.consumer.wait_acknowledged(delivery)
    assert runtime.house.get(bad).state is JobState.RUNNING
    assert runtime.keeper.leased() == []  # so its lease runs out
    good, _ = runtime.run()
    runtime.pool.end(good, DONE)
    wait_state(runtime, good, JobState.SUCCEEDED)


def test_a_job_that_cannot_be_claimed_holds_nobody_up(
    idle: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = idle.house.submit(), idle.house.submit()
    claim = verbs.claim

    def picky(tx: Transaction, ids: dict[str, object], *rest: object) -> object:
        if bad in ids:
            raise OverflowError
        return claim(tx, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(verbs, "claim", picky)
    delivery = idle.deliver(bad)
    idle.deliver(good)
    idle.start()
    idle.pool.of(good)
    idle.consumer.wait_acknowledged(delivery)
    assert [task.job_id for task in idle.pool.tasks] == [good]


def test_the_database_comes_back(runtime: Runtime, database: Shaky) -> None:
    running, delivery = runtime.run()
    waiting = runtime.house.submit()
    database.away = True
    tries = database.tries
    runtime.deliver(waiting)
    runtime.pool.end(running, DONE)
    until(lambda: database.tries > tries + 5, SECONDS_MAX, "it tries again and again")
    assert runtime.consumer.acknowledged == []
    database.away = False
    runtime.consumer.wait_acknowledged(delivery)
    assert runtime.pool.of(waiting).attempt == 1
    assert runtime.house.get(running).state is JobState.SUCCEEDED
    assert runtime.consumer.suspensions == []


def test_messages_are_let_go_of_when_the_database_stays_away(
    runtime: Runtime, database: Shaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "LET_GO_SECONDS", 0.1)
    job_id = runtime.house.submit()
    database.away = True
    runtime.deliver(job_id)
    runtime.consumer.wait(lambda: runtime.consumer.suspensions == [True])
    database.away = False
    runtime.consumer.wait(lambda: runtime.consumer.suspensions == [True, False])


def test_messages_are_let_go_of_while_no_handler_can_run(runtime: Runtime) -> None:
    consumer, pool = runtime.consumer, runtime.pool
    pool.slots, pool.broken = 0, "the volume is gone"
    consumer.wait(lambda: consumer.suspensions == [True])
    pool.slots, pool.broken = CONCURRENCY, ""
    consumer.wait(lambda: consumer.suspensions == [True, False])
    job_id, delivery = runtime.run()
    runtime.pool.end(job_id, DONE)
    consumer.wait_acknowledged(delivery)
    assert consumer.suspensions == [True, False]


def test_stopping_loses_nothing(runtime: Runtime, database: Shaky) -> None:
    running = [runtime.run() for _ in range(CONCURRENCY)]
    waiting = runtime.deliver(runtime.house.submit())
    runtime.claiming.stop()
    assert runtime.consumer.given_back == [waiting]
    late = runtime.deliver(runtime.house.submit())
    assert runtime.consumer.given_back == [waiting, late]
    for job_id, _ in running:
        runtime.pool.tell(job_id, Log("INFO", "last words"))
        runtime.pool.end(job_id, DONE)
    runtime.recording.stop()
    for job_id, delivery in running:
        assert runtime.house.history(job_id)[-2:] == ["LOG>RUNNING", "SUCCEEDED>SUCCEEDED"]
        assert delivery in runtime.consumer.acknowledged
    assert len(runtime.attempts) == 0


def test_a_stop_waits_for_the_database_only_so_long(
    runtime: Runtime, database: Shaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "LAST_WRITE_SECONDS", 0.2)
    monkeypatch.setattr(recording, "REPORTS_MAX", 10)
    job_id, _ = runtime.run()
    waiting = runtime.house.submit()
    database.away = True
    runtime.deliver(waiting)
    task = runtime.pool.of(job_id)
    for _ in range(200):
        runtime.pool.tell(task.job_id, Log("INFO", "line"))
    runtime.pool.end(job_id, DONE)
    stopped = threading.Thread(target=runtime.stop, daemon=True)
    began = time.monotonic()
    stopped.start()
    stopped.join(SECONDS_MAX)
    assert not stopped.is_alive()
    assert time.monotonic() - began < 4
    database.away = False
    assert runtime.house.get(job_id).state is JobState.RUNNING  # the reaper's
