"""Any order of verbs, by workers that hold on to leases which they lost, leaves legal histories.

A model beside the database knows each job's state, budget and present lease from the law alone,
and what each verb has to answer; in the end the checker reads the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from jobsvc.core.attempts import (
    AttemptFailed,
    Claimed,
    Ending,
    Interrupted,
    JobError,
    Log,
    Output,
    Progress,
    Snoozed,
    Stopped,
    Succeeded,
)
from jobsvc.core.model import OnConflict as How
from jobsvc.core.model import RetryPolicy, Unique, UniqueScope
from jobsvc.core.states import (
    CRASHES_MAX,
    RETRYABLE_STATES,
    TERMINAL_STATES,
    WAITING_STATES,
    JobState,
)
from jobsvc.errors import JobStateForbids, JobUnknown, UniqueConflict
from jobsvc.store.database import Database
from jobsvc.store.tables import jobs
from jobsvc.store.verbs import Submitted
from tests.checker import check
from tests.store.conftest import connect, open_database, sqlite_url
from tests.store.house import CRASH, DONE, FATAL, LEASE_SECONDS, RETRYABLE, House, new_job, wipe

KEYS = st.sampled_from(["a", "b", None])
UNIQUE = st.builds(Unique, st.just("u"), st.sampled_from(UniqueScope), st.sampled_from(How))
REPORTS = st.lists(
    st.sampled_from([Progress(1, 2), Log("INFO", "x"), Output(text="y"), Output(data=b"\0")]),
    min_size=1,
    max_size=3,
)
ENDINGS: st.SearchStrategy[Ending] = st.sampled_from(
    [
        *(DONE, RETRYABLE, FATAL, CRASH, Interrupted(), Stopped()),
        *(Snoozed(0.0), Snoozed(60.0)),
        AttemptFailed(JobError("Retry", retryable=True), retry_after=0.0),
    ]
)


@dataclass
class Known:
    """What the law says of one job."""

    state: JobState
    max_attempts: int
    token: str | None = None
    attempt: int = 0
    failures: int = 0
    crashes: int = 0
    cancel_requested: bool = False
    unique: Unique | None = None

    @property
    def holds_key(self) -> bool:
        runs = self.state is JobState.RUNNING
        return self.unique is not None and (
            self.state in WAITING_STATES or (runs and self.unique.scope is UniqueScope.ACTIVE)
        )

    def end(self, ending: Ending) -> None:
        self.token = None
        match ending:
            case Succeeded():
                self.state = JobState.SUCCEEDED
            case AttemptFailed(error, _, crashed):
                self.fail(error.retryable, crashed)
            case _ if self.cancel_requested:
                self.state = JobState.CANCELLED
            case Snoozed():
                self.state = JobState.SCHEDULED
            case _:
                self.state = JobState.QUEUED

    def fail(self, retryable: bool, crashed: bool, alone: bool = True) -> None:
        self.token = None
        self.failures += 1
        self.crashes += crashed
        used_up = self.failures >= self.max_attempts or (alone and self.crashes >= CRASHES_MAX)
        if not retryable or used_up:
            self.state = JobState.FAILED
        else:
            self.state = JobState.CANCELLED if self.cancel_requested else JobState.RETRYING


class Histories(RuleBasedStateMachine):
    ids = Bundle("ids")
    leases = Bundle("leases")

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.house = House(database, frozen=datetime(2030, 1, 1, tzinfo=UTC))
        self.known: dict[str, Known] = {}
        self.keys: dict[str, str] = {}
        self.ttl: set[str] = set()

    def teardown(self) -> None:
        try:
            check(self.house.database, acknowledged=self.known, jobs_min=len(self.known))
        finally:
            self.house.database.close()

    @initialize(
        target=ids, budgets=st.lists(st.integers(1, 5), min_size=4, max_size=4), unique=UNIQUE
    )
    def begin(self, budgets: list[int], unique: Unique) -> object:
        """With something to do: random rules alone would hardly get beyond the first submits."""
        kinds = [(budget, None) for budget in budgets[1:]] + [(budgets[0], unique)]
        return multiple(*(self.submit_new(None, None, b, None, u) for b, u in kinds))

    @rule(
        target=ids,
        delay=st.sampled_from([None, None, 0.0, 60.0]),
        ttl=st.sampled_from([None, None, 100.0]),
        max_attempts=st.integers(1, 5),
        key=KEYS,
    )
    def submit(
        self, delay: float | None, ttl: float | None, max_attempts: int, key: str | None
    ) -> object:
        return self.submit_new(delay, ttl, max_attempts, key, None)

    @rule(target=ids, key=KEYS, unique=UNIQUE)
    def submit_unique(self, key: str | None, unique: Unique) -> object:
        job_id = self.submit_new(None, None, 1, key, unique)
        return multiple() if job_id is None else job_id

    def submit_new(
        self,
        delay: float | None,
        ttl: float | None,
        max_attempts: int,
        key: str | None,
        unique: Unique | None,
    ) -> str | None:
        request = new_job(
            delay=delay,
            ttl=ttl,
            max_attempts=max_attempts,
            idempotency_key=key,
            request_hash=b"",
            unique=unique,
            labels={"ttl": str(ttl)},
            retry_policy=RetryPolicy(10.0, 2.0, 60.0, 0.0),
        )
        (answer,) = self.house.submit_all([request])
        expected = self.keys.get(key) if key else None
        if expected is None and (holder := self.holder(unique)):
            if unique and unique.on_conflict is How.REJECT:
                assert isinstance(answer, UniqueConflict)
                assert answer.job_id == holder
                return None
            expected = holder
        expected = expected or request.job_id
        assert isinstance(answer, Submitted)
        assert (answer.job_id, answer.already_existed) == (expected, expected != request.job_id)
        if key:
            self.keys.setdefault(key, expected)
        if expected == request.job_id:
            self.replace(unique)
            state = JobState.SCHEDULED if delay else JobState.QUEUED
            self.known[expected] = Known(state, max_attempts, unique=unique)
            if ttl:
                self.ttl.add(expected)
        return expected

    def holders(self, unique: Unique | None) -> list[str]:
        return [i for i, known in self.known.items() if unique and known.holds_key]

    def holder(self, unique: Unique | None) -> str | None:
        """Who is in the way of a job with that key."""
        if unique is None or unique.on_conflict is How.REPLACE:
            return None
        held = self.holders(unique)
        return max(held, key=lambda i: (self.known[i].state in WAITING_STATES, i), default=None)

    def replace(self, unique: Unique | None) -> None:
        for job_id in self.holders(unique):
            if self.known[job_id].state in WAITING_STATES:
                self.known[job_id].state = JobState.CANCELLED

    @rule(target=leases, job_ids=st.lists(ids, min_size=1, max_size=4, unique=True))
    def claim(self, job_ids: list[str]) -> object:
        claimed = self.house.claim_all(job_ids)
        self.learn_expired(self.in_state(JobState.QUEUED).intersection(job_ids))
        assert {c.job_id for c in claimed} == self.in_state(JobState.QUEUED).intersection(job_ids)
        for each in claimed:
            known = self.known[each.job_id]
            known.state, known.token = JobState.RUNNING, each.token
            known.attempt += 1
            assert each.attempt == known.attempt
        return multiple(*claimed)

    @rule(target=leases, job_id=ids, ending=ENDINGS)
    def attempt(self, job_id: str, ending: Ending) -> object:
        """A whole attempt at once, as most are; its lease is kept to be misused later."""
        claimed = self.house.claim_all([job_id])
        self.learn_expired(self.in_state(JobState.QUEUED).intersection([job_id]))
        assert bool(claimed) == (job_id in self.in_state(JobState.QUEUED))
        for each in claimed:
            known = self.known[job_id]
            known.attempt += 1
            assert self.house.finish(each, ending)
            known.end(ending)
        return multiple(*claimed)

    @rule(claimed=leases, ending=ENDINGS)
    def finish(self, claimed: Claimed, ending: Ending) -> None:
        assert self.house.finish(claimed, ending) == self.is_held(claimed)
        if self.is_held(claimed):
            self.known[claimed.job_id].end(ending)

    def is_held(self, claimed: Claimed) -> bool:
        known = self.known.get(claimed.job_id)
        return known is not None and known.token == claimed.token

    @rule(claimed=leases, entries=REPORTS | st.none())
    def tell_or_renew(
        self, claimed: Claimed, entries: list[Progress | Log | Output] | None
    ) -> None:
        if entries is None:
            self.renew(claimed)
        else:
            self.report(claimed, entries)

    def report(self, claimed: Claimed, entries: list[Progress | Log | Output]) -> None:
        assert self.house.report(claimed, *entries) == self.is_held(claimed)

    def renew(self, claimed: Claimed) -> None:
        held = {}
        if self.is_held(claimed):
            known = self.known[claimed.job_id]
            held[claimed.job_id, claimed.token] = known.cancel_requested
        assert self.house.renew(claimed) == held

    @rule(job_id=ids, seldom=st.sampled_from([True, False, False, False]))
    def cancel(self, job_id: str, seldom: bool) -> None:
        if not seldom:  # or most jobs would end like that
            return
        ended = self.in_state(JobState.SUCCEEDED, JobState.FAILED)
        if not self.allowed(self.house.cancel, job_id, set(self.known) - ended):
            return
        known = self.known[job_id]
        if known.state is JobState.RUNNING:
            known.cancel_requested = True
        else:
            known.state = JobState.CANCELLED

    def allowed(self, verb: Callable[[str], object], job_id: str, to: set[str]) -> bool:
        """Calls it for a job; whether it went well, as it must for those of `to` alone."""
        if job_id in to:
            verb(job_id)
            return True
        with pytest.raises(JobStateForbids if job_id in self.known else JobUnknown):
            verb(job_id)
        return False

    @rule(job_id=ids)
    def retry(self, job_id: str) -> None:
        ended = self.in_state(*RETRYABLE_STATES)
        if job_id in ended and (holder := self.holder(self.known[job_id].unique)):
            with pytest.raises(UniqueConflict, match=holder):
                self.house.retry(job_id)
        elif self.allowed(self.house.retry, job_id, ended):
            known = self.known[job_id]
            self.replace(known.unique)
            known.state, known.cancel_requested = JobState.QUEUED, False
            known.failures = known.crashes = 0
            self.ttl.discard(job_id)

    @rule(
        job_id=ids,
        priority=st.none() | st.integers(0, 9),
        seconds=st.sampled_from([None, -60.0, 0.0, 60.0]),
        labels=st.none() | st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy")),
    )
    def update(
        self,
        job_id: str,
        priority: int | None,
        seconds: float | None,
        labels: dict[str, str] | None,
    ) -> None:
        due = None if seconds is None else self.house.now() + timedelta(seconds=seconds)

        def change(job_id: str) -> None:
            self.house.update_job(job_id, priority=priority, schedule_time=due, labels=labels)

        waiting = self.in_state(*WAITING_STATES)
        if self.allowed(change, job_id, waiting) and seconds is not None:
            state = JobState.SCHEDULED if seconds > 0 else JobState.QUEUED
            self.known[job_id].state = state

    @rule(job_id=ids, seldom=st.sampled_from([True, False, False]))
    def delete(self, job_id: str, seldom: bool) -> None:
        ended = self.in_state(*TERMINAL_STATES)
        if seldom and self.allowed(self.house.delete, job_id, ended):
            del self.known[job_id]
            self.ttl.discard(job_id)

    @rule(
        seconds=st.sampled_from([0.0, 1.0, 11.0, LEASE_SECONDS + 1, 61.0]),
        sweep=st.sampled_from(["promote", "promote", "reap", "reap_workers", "expire", "others"]),
    )
    def upkeep(self, seconds: float, sweep: str) -> None:
        self.house.wait(seconds)
        getattr(self, sweep)()

    def reap(self) -> None:
        lost = [i for i, k in self.known.items() if k.token and self.overdue(i)]
        alone = len(self.in_state(JobState.RUNNING)) == 1
        assert self.house.reap() == len(lost)
        for job_id in lost:
            self.known[job_id].fail(retryable=True, crashed=True, alone=alone)

    def reap_workers(self) -> None:
        assert self.house.reap_workers("w2") == 0
        lost = [known for known in self.known.values() if known.token]
        assert self.house.reap_workers("w1", "w2") == len(lost)
        for known in lost:
            known.fail(retryable=True, crashed=True, alone=len(lost) == 1)

    def promote(self) -> None:
        waiting = self.in_state(JobState.SCHEDULED, JobState.RETRYING)
        due = {job_id for job_id in waiting if self.is_due(job_id)}
        self.house.promote()
        self.learn_expired(due)
        for job_id in due:
            if self.known[job_id].state is not JobState.FAILED:
                self.known[job_id].state = JobState.QUEUED

    def expire(self) -> None:
        self.house.expire()
        self.learn_expired(self.in_state(*WAITING_STATES))

    def others(self) -> None:
        """What must change no history."""
        self.house.redispatch()
        self.house.take_owed()
        self.house.deliver()
        self.house.redispatch_all(self.house.now())

    @invariant()
    def the_database_agrees(self) -> None:
        columns = (
            jobs.c.state,
            jobs.c.lease_token,
            jobs.c.attempt,
            jobs.c.failures,
            jobs.c.crashes,
        )
        stored = self.house.database.read(lambda c: c.execute(sa.select(jobs.c.id, *columns)).all())
        assert {row.id: tuple(row)[1:] for row in stored} == {
            job_id: (k.state, k.token, k.attempt, k.failures, k.crashes)
            for job_id, k in self.known.items()
        }

    def overdue(self, job_id: str) -> bool:
        return bool(self.house.row(job_id).lease_expire_time <= self.house.now())

    def is_due(self, job_id: str) -> bool:
        row = self.house.row(job_id)
        return bool((row.next_attempt_time or row.schedule_time) <= self.house.now())

    def in_state(self, *states: JobState) -> set[str]:
        return {job_id for job_id, known in self.known.items() if known.state in states}

    def learn_expired(self, waiting: set[str]) -> None:
        """Those that are past their expire_time are FAILED now."""
        for job_id in self.ttl & waiting:
            if self.house.row(job_id).expire_time <= self.house.now():
                self.known[job_id].state = JobState.FAILED


def run(machine: Callable[[], Histories], examples: int) -> None:
    run_state_machine_as_test(
        machine,  # type: ignore[arg-type]  # any factory will do
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to shrink a failure would take minutes
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(120)
def test_any_order_of_verbs_on_sqlite(tmp_path: Path) -> None:
    numbers = itertools.count()

    def machine() -> Histories:
        directory = tmp_path / str(next(numbers))
        directory.mkdir()
        return Histories(open_database(sqlite_url(directory)))

    run(machine, examples=25)


@pytest.mark.timeout(120)
def test_any_order_of_verbs_on_postgresql(postgresql_url: str) -> None:
    open_database(postgresql_url).close()

    def machine() -> Histories:
        database = connect(postgresql_url)
        wipe(database)
        return Histories(database)

    run(machine, examples=6)
