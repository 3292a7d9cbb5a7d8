from __future__ import annotations

import math
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from jobsvc.broker.topology import Broker
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import Change, Effects
from jobsvc.core.states import JobState
from jobsvc.errors import DatabaseUnavailable
from jobsvc.outbox import Outbox
from jobsvc.services import upkeep
from jobsvc.services.upkeep import Loop, Once, Task
from jobsvc.store.database import Database
from jobsvc.store.tables import idempotency_keys, job_events, jobs
from tests.store.house import DONE, RETRYABLE, House, new_id, worker

SECONDS_MAX = 10.0
AGO = timedelta(minutes=-2)
RESUME = timedelta(hours=24)


def due(house: House) -> list[str]:
    """Three jobs whose time has come."""
    ids = [house.submit(delay=100.0) for _ in range(2)]
    for job_id in ids:
        house.change(job_id, schedule_time=house.now() + AGO)
    claimed = house.start()
    house.finish(claimed, RETRYABLE)
    house.change(claimed.job_id, next_attempt_time=house.now() + AGO)
    return [*ids, claimed.job_id]


def test_promote(house: House, database: Database) -> None:
    later = house.submit(delay=100.0)
    ids = due(house)
    count, effects = upkeep.promote_once(database, 10)
    assert count
    assert sorted(c.job_id for c in effects.changes) == sorted(ids)
    assert sorted(d.job_id for d in effects.dispatches) == sorted(ids)
    assert {house.get(job_id).state for job_id in ids} == {JobState.QUEUED}
    assert house.get(later).state is JobState.SCHEDULED
    assert upkeep.promote_once(database, 10) == (0, Effects())


def test_expire(house: House, database: Database) -> None:
    job_id, alive = house.submit(ttl=100.0), house.submit(ttl=100.0)
    house.change(job_id, expire_time=house.now() + AGO)
    count, effects = upkeep.expire_once(database, 10)
    assert (count, [c.job_id for c in effects.changes]) == (1, [job_id])
    assert [d.kind for d in effects.dispatches] == ["dead"]
    assert house.get(job_id).state is JobState.FAILED
    assert house.get(alive).state is JobState.QUEUED
    assert upkeep.expire_once(database, 10)[0] == 0


def test_reap(house: House, database: Database) -> None:
    lost, alive = house.start(), house.start()
    house.change(lost.job_id, lease_expire_time=house.now() + AGO)
    count, effects = upkeep.reap_once(database, 10)
    assert (count, [c.job_id for c in effects.changes]) == (1, [lost.job_id])
    assert house.get(lost.job_id).state is JobState.RETRYING
    assert house.get(alive.job_id).state is JobState.RUNNING
    assert upkeep.reap_once(database, 10)[0] == 0


def test_release(house: House, database: Database) -> None:
    job_id = house.submit("other")
    house.claim_all([job_id], types=frozenset({"demo"}))
    assert house.row(job_id).held
    release = upkeep.Release()
    assert release.once(database, 10)[0] == 0
    house.announce(worker(job_types=("other",)), JobTypeInfo("other"))
    count, effects = release.once(database, 10)
    assert (count, [d.job_id for d in effects.dispatches]) == (1, [job_id])
    assert not house.row(job_id).held


def test_purge(house: House, database: Database) -> None:
    old, young = house.start(idempotency_key="k"), house.start()
    for claimed in (old, young):
        house.finish(claimed, DONE)
    house.change(old.job_id, purge_time=house.now() + AGO)
    assert upkeep.purge_once(database, 10, timedelta()) == (1, Effects())
    assert (house.count(jobs), house.count(job_events)) == (1, 3)
    assert house.count(idempotency_keys) == 1  # it lives for a day at least
    assert house.get(young.job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("once", "make"),
    [
        (upkeep.promote_once, lambda house: house.submit(delay=0.001)),
        (upkeep.expire_once, lambda house: house.submit(delay=1.0, ttl=0.001)),
        (upkeep.reap_once, lambda house: house.claim(house.submit(), lease_seconds=0.001)),
    ],
)
def test_a_call_takes_no_more_than_its_limit(
    house: House, database: Database, once: Once, make: Callable[[House], object]
) -> None:
    for _ in range(5):
        make(house)
    threading.Event().wait(0.002)
    assert [once(database, 2)[0] for _ in range(4)] == [2, 2, 1, 0]


def test_events_outlive_their_job_by_as_long_as_a_resume_token_is_good(
    house: House, database: Database
) -> None:
    claimed = house.start()
    house.finish(claimed, DONE)
    (purge,) = (task.once for task in upkeep.tasks(0.5, 5.0, RESUME) if task.name == "purge")
    house.change(claimed.job_id, purge_time=house.now() - RESUME)
    assert purge(database, 10) == (0, Effects())
    assert house.count(job_events) == 3
    house.change(claimed.job_id, purge_time=house.now() - RESUME + AGO)
    assert purge(database, 10) == (1, Effects())
    assert house.count(job_events) == 0


def test_every_kind_of_upkeep_has_a_task() -> None:
    tasks = upkeep.tasks(0.5, 5.0, RESUME)
    assert {task.once for task in tasks} >= {
        upkeep.promote_once,
        upkeep.expire_once,
        upkeep.reap_once,
    }
    intervals = {task.name: task.interval for task in tasks}
    assert (intervals["promote"], intervals["reap"]) == (0.5, 5.0)


class Script:
    """A task that answers, or raises, one thing after another, and then nothing."""

    def __init__(self, *answers: int | Exception) -> None:
        self._answers = list(answers)
        self.calls = 0
        self.done = threading.Event()

    def __call__(self, database: Database, limit: int) -> tuple[int, Effects]:
        self.calls += 1
        if not self._answers:
            self.done.set()
            return 0, Effects()
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer, Effects((Change(new_id(), self.calls),))


def run(
    database: Database, script: Script, interval: float, seconds_max: float = SECONDS_MAX
) -> list[int]:
    """Runs a loop until the script is at its end; answers the changes that it told of."""
    told: list[int] = []
    outbox = Outbox(
        database,
        Broker("memory://"),
        on_changes=lambda changes: told.extend(c.last_sequence for c in changes),
    )
    loop = Loop(Task("script", interval, script), database, outbox)
    loop.start()
    assert script.done.wait(seconds_max)
    loop.stop()
    return told


def test_a_job_that_it_ends_failed_is_logged(house: House, database: Database) -> None:
    job_id = house.submit(ttl=100.0)
    house.change(job_id, expire_time=house.now() + AGO)
    ended = threading.Event()

    def once(database: Database, limit: int) -> tuple[int, Effects]:
        if house.get(job_id).state is JobState.FAILED:
            ended.set()
        return upkeep.expire_once(database, limit)

    loop = Loop(Task("expire", 0.01, once), database, Outbox(database, Broker("memory://")))
    with capture_logs() as logs:
        loop.start()
        assert ended.wait(SECONDS_MAX)
        loop.stop()
    (told,) = [log for log in logs if log["event"] == "job failed"]
    assert (told["job_id"], told["error_type"]) == (job_id, "EXPIRED")
    assert told["log_level"] == "error"


def test_a_loop_goes_on_at_once_while_batches_are_full(database: Database) -> None:
    full = upkeep.LIMIT
    script = Script(full, full, full, full)
    # The interval is too long for five of them.
    assert run(database, script, 0.5, 1.5) == [1, 2, 3, 4]
    assert script.calls == 5


def test_a_loop_waits_after_a_batch_that_was_not_full(database: Database) -> None:
    script = Script(upkeep.LIMIT - 1)
    loop = Loop(Task("script", 0.2, script), database, Outbox(database, Broker("memory://")))
    loop.start()
    assert not script.done.wait(0.3)
    assert script.done.wait(SECONDS_MAX)
    loop.stop()


def test_a_loop_looks_again_sooner_where_its_task_says_when(database: Database) -> None:
    script = Script(1)
    task = Task("script", 3600.0, script, lambda: 0.01)
    loop = Loop(task, database, Outbox(database, Broker("memory://")))
    loop.start()
    assert script.done.wait(SECONDS_MAX)
    loop.stop()


def test_release_says_when_a_rate_opens(house: House, database: Database) -> None:
    release = upkeep.Release()
    house.rate(1, 10.0)
    house.start()
    house.claim_all([house.submit()])
    assert release.opens() == math.inf
    assert release.once(database, 10)[0] == 0
    assert 9 < release.opens() < 11


def test_a_loop_survives_what_goes_wrong(database: Database) -> None:
    script = Script(DatabaseUnavailable(), 1, ZeroDivisionError("our bug"), 2)
    assert run(database, script, 0.01) == [2, 4]


def test_a_stop_interrupts_full_batches(database: Database) -> None:
    """However much there is left to do."""
    begun = threading.Event()

    def endless(database: Database, limit: int) -> tuple[int, Effects]:
        begun.set()
        return limit, Effects()

    loop = Loop(Task("endless", 0.01, endless), database, Outbox(database, Broker("memory://")))
    loop.start()
    assert begun.wait(SECONDS_MAX)
    stopped = threading.Thread(target=loop.stop, daemon=True)
    stopped.start()
    stopped.join(SECONDS_MAX)
    assert not stopped.is_alive()
