"""Any order of verbs, by workers that hold on to leases which they lost, leaves legal histories.

A model beside the database knows each job's state, budget and present lease from the law alone,
and what each verb has to answer; in the end the checker reads the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
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

from jobsvc.core.model import (
    AttemptFailed,
    Claimed,
    Ending,
    Interrupted,
    JobError,
    Log,
    Output,
    Progress,
    RetryPolicy,
    Snoozed,
    Stopped,
    Succeeded,
)
from jobsvc.core.states import CRASHES_MAX, WAITING_STATES, JobState
from jobsvc.errors import JobStateForbids
from jobsvc.store.database import Database
from jobsvc.store.submission import Submitted
from jobsvc.store.tables import jobs
from tests.checker import check
from tests.store.conftest import connect, open_database, sqlite_url
from tests.store.house import CRASH, DONE, FATAL, LEASE_SECONDS, RETRYABLE, House, new_job, wipe

KEYS = st.sampled_from(["a", "b", None])
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

    def fail(self, retryable: bool, crashed: bool) -> None:
        self.token = None
        self.failures += 1
        self.crashes += crashed
        used_up = self.failures >= self.max_attempts or self.crashes >= CRASHES_MAX
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

    @initialize(target=ids, budgets=st.lists(st.integers(1, 5), min_size=4, max_size=4))
    def begin(self, budgets: list[int]) -> object:
        """With something to do: random rules alone would hardly get beyond the first submits."""
        return multiple(*(self.submit_new(None, None, budget, None) for budget in budgets))

    @rule(
        target=ids,
        delay=st.sampled_from([None, None, 0.0, 60.0]),
        ttl=st.sampled_from([None, None, 100.0]),
        max_attempts=st.integers(1, 5),
        key=KEYS,
    )
    def submit(
        self, delay: float | None, ttl: float | None, max_attempts: int, key: str | None
    ) -> str:
        return self.submit_new(delay, ttl, max_attempts, key)

    def submit_new(
        self, delay: float | None, ttl: float | None, max_attempts: int, key: str | None
    ) -> str:
        request = new_job(
            delay=delay,
            ttl=ttl,
            max_attempts=max_attempts,
            idempotency_key=key,
            request_hash=b"",
            retry_policy=RetryPolicy(10.0, 2.0, 60.0, 0.0),
        )
        (answer,) = self.house.submit_all([request])
        assert isinstance(answer, Submitted)
        first = self.keys.setdefault(key, request.job_id) if key else request.job_id
        assert (answer.job_id, answer.already_existed) == (first, first != request.job_id)
        if first == request.job_id:
            state = JobState.SCHEDULED if delay else JobState.QUEUED
            self.known[first] = Known(state, max_attempts)
            if ttl:
                self.ttl.add(first)
        return first

    @rule(target=leases, job_ids=st.lists(ids, min_size=1, max_size=4, unique=True))
    def claim(self, job_ids: list[str]) -> object:
        claimed = self.house.claim_all(job_ids)
        self.learn_expired(self.in_state(JobState.QUEUED).intersection(job_ids))
        assert {c.job_id for c in claimed} == {
            i for i in job_ids if self.known[i].state is JobState.QUEUED
        }
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
        known = self.known[job_id]
        assert bool(claimed) == (known.state is JobState.QUEUED)
        for each in claimed:
            known.attempt += 1
            assert self.house.finish(each, ending)
            known.end(ending)
        return multiple(*claimed)

    @rule(claimed=leases, ending=ENDINGS)
    def finish(self, claimed: Claimed, ending: Ending) -> None:
        known = self.known[claimed.job_id]
        assert self.house.finish(claimed, ending) == (known.token == claimed.token)
        if known.token == claimed.token:
            known.end(ending)

    @rule(claimed=leases, entries=REPORTS | st.none())
    def tell_or_renew(
        self, claimed: Claimed, entries: list[Progress | Log | Output] | None
    ) -> None:
        if entries is None:
            self.renew(claimed)
        else:
            self.report(claimed, entries)

    def report(self, claimed: Claimed, entries: list[Progress | Log | Output]) -> None:
        known = self.known[claimed.job_id]
        assert self.house.report(claimed, *entries) == (known.token == claimed.token)

    def renew(self, claimed: Claimed) -> None:
        known = self.known[claimed.job_id]
        held = {(claimed.job_id, claimed.token): known.cancel_requested}
        assert self.house.renew(claimed) == (held if known.token == claimed.token else {})

    @rule(job_id=ids, seldom=st.sampled_from([True, False, False, False]))
    def cancel(self, job_id: str, seldom: bool) -> None:
        if not seldom:  # or most jobs would end like that
            return
        known = self.known[job_id]
        if known.state in (JobState.SUCCEEDED, JobState.FAILED):
            with pytest.raises(JobStateForbids):
                self.house.cancel(job_id)
            return
        self.house.cancel(job_id)
        if known.state is JobState.RUNNING:
            known.cancel_requested = True
        else:
            known.state = JobState.CANCELLED

    @rule(
        seconds=st.sampled_from([0.0, 1.0, 11.0, LEASE_SECONDS + 1, 61.0]),
        sweep=st.sampled_from(["promote", "promote", "reap", "reap_workers", "expire", "others"]),
    )
    def upkeep(self, seconds: float, sweep: str) -> None:
        self.house.wait(seconds)
        getattr(self, sweep)()

    def reap(self) -> None:
        lost = [i for i, k in self.known.items() if k.token and self.overdue(i)]
        assert self.house.reap() == len(lost)
        for job_id in lost:
            self.known[job_id].fail(retryable=True, crashed=True)

    def reap_workers(self) -> None:
        assert self.house.reap_workers("w2") == 0
        lost = [known for known in self.known.values() if known.token]
        assert self.house.reap_workers("w1", "w2") == len(lost)
        for known in lost:
            known.fail(retryable=True, crashed=True)

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
