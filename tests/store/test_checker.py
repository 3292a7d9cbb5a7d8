"""The checker finds what is wrong: each way to break a history, one at a time."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import Interrupted, Progress, Snoozed
from jobsvc.core.model import OnConflict, Unique, UniqueScope
from jobsvc.core.states import EventType, JobState
from jobsvc.store.verbs import arrows
from tests.checker import HistoryBroken, check
from tests.store.house import CRASH, DONE, FATAL, RETRYABLE, House, new_id


@pytest.fixture
def broken(sqlite_house: House) -> House:
    """With one job of each kind, told apart by its queue; what is in it is legal so far."""
    house = sqlite_house
    house.submit(queue="queued")
    house.submit(queue="scheduled", delay=60.0)
    house.start(queue="running")
    house.finish(house.start(queue="succeeded"), DONE)
    house.finish(house.start(queue="failed"), FATAL)
    house.finish(house.start(queue="exhausted", max_attempts=1), RETRYABLE)
    house.submit(queue="expired", expire_time=house.now())
    house.cancel(house.submit(queue="cancelled"))
    stopped = house.start(queue="stopped")
    house.report(stopped, Progress(1, 2))
    house.cancel(stopped.job_id)
    house.finish(stopped, RETRYABLE)
    lost = house.start(queue="retrying", max_attempts=2)
    house.finish(lost, CRASH)
    for ending in (Interrupted(), Snoozed(60.0)):
        house.finish(house.start(queue="again"), ending)
    retried = house.start(queue="retried")
    house.finish(retried, FATAL)
    house.retry(retried.job_id)
    house.finish(house.claim(retried.job_id), RETRYABLE)
    house.submit(queue="labelled", labels={"a": "b"})
    return house


def corrupt(house: House, statement: str, queue: str) -> None:
    """Runs SQL in which JOB stands for the one job of the queue."""
    statement = statement.replace("JOB", f"(SELECT id FROM jobs WHERE queue = '{queue}')")
    with house.database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
        assert connection.execute(sa.text(statement)).rowcount > 0
        connection.commit()
        connection.exec_driver_sql("PRAGMA ignore_check_constraints = OFF")


def violations(house: House, **options: object) -> tuple[str, ...]:
    with pytest.raises(HistoryBroken) as caught:
        check(house.database, **options)  # type: ignore[arg-type]
    return caught.value.violations


def test_a_legal_history_passes_and_is_counted(broken: House) -> None:
    report = check(broken.database, jobs_min=14)
    assert report.jobs == 14
    assert report.states[JobState.FAILED] == 3
    assert report.event_types[EventType.SUBMITTED] == 14
    assert report.events == sum(report.event_types.values())


JOB = "UPDATE jobs SET {} WHERE id = JOB"
EVENT = "UPDATE job_events SET {} WHERE job_id = JOB AND sequence = {}"
ACTOR = EVENT.replace("{}", "detail = json_{}", 1)
DROP = "DELETE FROM job_events WHERE job_id = JOB AND sequence = {}"
ADD = (
    "INSERT INTO job_events SELECT job_id, sequence + 1, '{}', '{}', event_time, attempt,"
    " worker_id, detail, x FROM job_events WHERE job_id = JOB ORDER BY sequence DESC LIMIT 1"
)


@pytest.mark.parametrize(
    ("queue", "statement", "expected"),
    [
        ("succeeded", DROP.format(2), "sequences are not 1 to 2: [1, 3]"),
        ("succeeded", DROP.format(1), "sequences are not 1 to 2: [2, 3]"),
        ("succeeded", DROP.format(3), "last_sequence is 3, its events say 2"),
        ("succeeded", DROP.format(3), "state is SUCCEEDED, its events say RUNNING"),
        ("succeeded", DROP.format("sequence"), "has no events"),
        ("succeeded", EVENT.format("sequence = 4", 3), "sequences are not 1 to 3: [1, 2, 4]"),
        ("succeeded", JOB.format("last_sequence = 4"), "last_sequence is 4, its events say 3"),
        ("succeeded", ADD.format("FAILED", "FAILED"), "is no arrow: SUCCEEDED -FAILED-> FAILED"),
        ("succeeded", ADD.format("SUCCEEDED", "SUCCEEDED"), "terminal events at [3, 4] of 4"),
        ("succeeded", ADD.format("PROGRESS", "SUCCEEDED"), "terminal events at [3] of 4"),
        ("succeeded", ADD.format("QUEUED", "QUEUED"), "is no arrow: SUCCEEDED -QUEUED-> QUEUED"),
        ("queued", EVENT.format("type = 'STARTED'", 1), "is no arrow: None -STARTED-> QUEUED"),
        ("queued", EVENT.format("state = 'RETRYING'", 1), "-SUBMITTED-> RETRYING"),
        ("queued", ADD.format("PROGRESS", "QUEUED"), "is no arrow: QUEUED -PROGRESS-> QUEUED"),
        ("queued", ADD.format("STARTED", "RUNNING"), "has attempt 0 instead of 1"),
        ("running", EVENT.format("attempt = 2", 2), "has attempt 2 instead of 1"),
        ("running", EVENT.format("attempt = 1", 1), "has attempt 1 instead of 0"),
        ("running", JOB.format("attempt = 2"), "attempt is 2, its events say 1"),
        ("running", JOB.format("state = 'QUEUED'"), "state is QUEUED, its events say RUNNING"),
        ("running", JOB.format("lease_token = NULL"), "lease_token is None in state RUNNING"),
        ("running", JOB.format("lease_expire_time = NULL"), "lease_expire_time is None in state"),
        ("running", JOB.format("result = x'00'"), "has a result in state RUNNING"),
        ("running", JOB.format("held = true"), "is held in state RUNNING"),
        ("running", JOB.format("next_attempt_time = 1"), "next_attempt_time is 1970-01-01"),
        ("succeeded", JOB.format("result = NULL"), "has no result in state SUCCEEDED"),
        ("succeeded", JOB.format("finish_time = NULL"), "finish_time is None in state SUCCEEDED"),
        ("succeeded", JOB.format("finish_time = 1"), "finish_time is 1970-01-01"),
        ("succeeded", JOB.format("purge_time = NULL"), "purge_time is None in state SUCCEEDED"),
        ("queued", JOB.format("finish_time = 1"), "in state QUEUED"),
        ("failed", JOB.format("error = NULL"), "its error is not that of its last event: None"),
        ("failed", JOB.format("error = '{}'"), "its error is not that of its last event"),
        ("succeeded", EVENT.format("detail = '{\"error\": 1}'", 3), "SUCCEEDED, has an error"),
        ("failed", EVENT.format("detail = NULL", 4), "event 4, FAILED, has no error"),
        ("cancelled", EVENT.format("detail = NULL", 2), "event 2, CANCELLED, has no error"),
        ("cancelled", JOB.format("error = NULL"), "its error is not that of its last event"),
        ("failed", EVENT.format("event_time = 1", 3), "and no end follows with it"),
        ("stopped", EVENT.format("event_time = 1", 5), "and no end follows with it"),
        ("retrying", EVENT.format("state = 'RUNNING'", 3), "and no end follows with it"),
        ("retrying", EVENT.format("state = 'RUNNING'", 3), "does not agree with RUNNING"),
        ("failed", EVENT.format("state = 'RETRYING'", 3), "does not agree with RETRYING"),
        ("stopped", EVENT.format("type = 'LOG'", 4), "CANCELLED without CANCEL_REQUESTED"),
        (
            "stopped",
            JOB.format("cancel_reason = NULL"),
            "cancel_reason is None, its events say otherwise",
        ),
        ("failed", JOB.format("failures = 2"), "failures is 2, its events say 1"),
        ("exhausted", JOB.format("max_attempts = 0"), "used 1 attempts of 0"),
        ("exhausted", JOB.format("max_attempts = 2"), "FAILED with 1 of 2 attempts used"),
        ("retrying", JOB.format("crashes = 0"), "crashes is 0, its events say 1"),
        ("retrying", JOB.format("error_type = 'OSError'"), "is found by the error type OSError"),
        ("queued", JOB.format("error_type = 'OSError'"), "its error is None"),
        ("queued", JOB.format("last_x = 1000"), "last_x is 1000, its events say"),
        ("running", EVENT.format("x = 1000", 1), "stands at"),
        ("queued", EVENT.format("detail = NULL", 1), "event 1, SUBMITTED, has no actor"),
        ("cancelled", ACTOR.format("remove(detail, '$.actor')", 2), "CANCELLED, has no actor"),
        ("stopped", ACTOR.format("set(detail, '$.actor', 'a')", 5), "FAILED, has an actor"),
        ("stopped", ACTOR.format("set(detail, '$.actor', 'a')", 6), "CANCELLED, has an actor"),
        ("retried", EVENT.format("type = 'QUEUED'", 5), "is no arrow: FAILED -QUEUED-> QUEUED"),
        ("retried", EVENT.format("type = 'PROGRESS'", 4), "its terminal events at [] of 4"),
        ("retried", JOB.format("failures = 2"), "failures is 2, its events say 1"),
        ("retried", JOB.format("cancel_reason = 'x'"), "cancel_reason is 'x', its events say"),
        ("labelled", JOB.format("labels = '{}'"), "has the labels {}, to be found by {'a': 'b'}"),
        ("labelled", "DELETE FROM job_labels WHERE job_id = JOB", "to be found by None"),
        ("labelled", "DELETE FROM jobs WHERE id = JOB", "has labels, but no job"),
        ("queued", "DELETE FROM jobs WHERE id = JOB", "has events, but no job"),
    ],
)
def test_a_broken_history_is_found(
    broken: House, queue: str, statement: str, expected: str
) -> None:
    corrupt(broken, statement, queue)
    found = violations(broken)
    assert any(expected in violation for violation in found), found


def test_a_cancelled_job_that_waits_again_is_found(sqlite_house: House) -> None:
    claimed = sqlite_house.start()
    sqlite_house.cancel(claimed.job_id)
    sqlite_house.change(claimed.job_id, cancel_reason=None)
    sqlite_house.finish(claimed, Interrupted())
    sqlite_house.change(claimed.job_id, cancel_reason="enough")
    assert violations(sqlite_house) == (
        f"{claimed.job_id}: event 4 goes back to QUEUED after CANCEL_REQUESTED",
    )


def test_a_run_that_went_on_for_too_long_is_found(
    sqlite_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrows, "CRASHES_MAX", 4)
    job_id = sqlite_house.submit(max_attempts=5)
    for _ in range(4):
        sqlite_house.finish(sqlite_house.claim(job_id), CRASH)
        sqlite_house.wait(3600)
        sqlite_house.promote()
    sqlite_house.retry(job_id)
    sqlite_house.finish(sqlite_house.claim(job_id), CRASH)
    assert violations(sqlite_house) == (f"{job_id}: crashed 4 times, 3 were allowed",)


WAITING, REPLACE = UniqueScope.WAITING, OnConflict.REPLACE


def test_a_key_that_two_hold_is_found(sqlite_house: House) -> None:
    house = sqlite_house

    def two(one: Unique, other: Unique, *, runs: bool) -> tuple[str, str]:
        """Of which one comes past all checks."""
        first, second = house.submit(), house.submit()
        for job_id, unique in ((first, one), (second, other)):
            house.change(job_id, unique_key=unique.key, unique_scope=unique.scope)
            house.change(job_id, unique_on_conflict=unique.on_conflict)
        if runs:
            house.claim(first)
        return first, second

    both = Unique("a")
    found = [two(both, both, runs=False), two(Unique("b"), Unique("b"), runs=True)]
    found.append(two(Unique("c", on_conflict=REPLACE), Unique("c"), runs=True))
    found.append(two(Unique("d", WAITING), Unique("d", WAITING), runs=False))
    two(Unique("e"), Unique("e", on_conflict=REPLACE), runs=True)
    house.finish(house.claim(two(Unique("f", WAITING), Unique("f"), runs=False)[0]), RETRYABLE)
    two(Unique("g", WAITING), Unique("g"), runs=True)
    expected = {f"{one}: holds its unique key beside {other}" for one, other in found}
    assert set(violations(house)) == expected


def test_an_acknowledged_job_that_is_missing_is_found(broken: House) -> None:
    there, gone = broken.submit(), new_id()
    assert violations(broken, acknowledged=[there, gone]) == (
        f"{gone}: acknowledged, but not stored",
    )
    check(broken.database, acknowledged=[there])


def test_jobs_that_have_not_ended_are_found_when_all_should_have(broken: House) -> None:
    found = violations(broken, all_ended=True)
    assert sorted(v.split(": ", 1)[1] for v in found) == [
        *["has not ended: QUEUED"] * 3,
        *["has not ended: RETRYING"] * 2,
        "has not ended: RUNNING",
        "has not ended: SCHEDULED",
        "has not ended: SCHEDULED",
    ]


def test_messages_that_are_owed_still_are_found(broken: House) -> None:
    found = violations(broken, outbox_empty=True)
    assert len(found) == len(broken.owed())
    assert all("still owed to the broker" in violation for violation in found)
    broken.deliver()
    check(broken.database, outbox_empty=True)


def test_a_run_in_which_too_little_happened_is_found(broken: House) -> None:
    assert violations(broken, jobs_min=15) == (
        "only 14 jobs, where at least 15 were to be looked at",
    )


def test_a_long_list_is_cut_in_the_message_alone(sqlite_house: House) -> None:
    missing = [new_id() for _ in range(60)]
    with pytest.raises(HistoryBroken, match=r"60 violations:(?s:.*)\.\.\. and 10 more") as caught:
        check(sqlite_house.database, acknowledged=missing)
    assert len(caught.value.violations) == 60
