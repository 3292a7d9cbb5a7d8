"""From what the pool tells to the database. A thread makes events of reports, and gives each
attempt the one transition that its ending leads to, by its token, many in one transaction.

A message is acknowledged after the commit; what is lost before it comes again, and finds nothing to
claim. A job whose row somebody else has locked keeps nobody waiting: it is tried again by and by.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Mapping, Sequence

from jobsvc import metrics, telemetry, tracing, vital
from jobsvc.core.attempts import (
    RESULT_INVALID,
    AttemptFailed,
    Claimed,
    Ending,
    JobError,
    Log,
    Output,
    Progress,
    Report,
    Stopped,
)
from jobsvc.core.model import Effects
from jobsvc.errors import DatabaseUnavailable
from jobsvc.outbox import Outbox
from jobsvc.store import hot, verbs
from jobsvc.store.database import Database
from jobsvc.store.locking import passing_over
from jobsvc.store.verbs.running import LOG_BYTES_MAX, LOG_BYTES_MIN, OUTPUT_BYTES_MAX
from worker.runtime.attempts import Attempt, Attempts
from worker.runtime.consumer import Consumer
from worker.runtime.persisting import persist
from worker.runtime.records import ids

RECORD_MAX = 200
# In one transaction, which must end within the database's time limit.
REPORTS_MAX = 1000
GATHER_SECONDS = 0.004
# By the ids of the jobs whose ending was accepted: whether it ended the job FAILED.
Accepted = dict[str, bool]

# How long a worker that stops waits for the database to record its last endings.
LAST_WRITE_SECONDS = 5.0
# When to try again what somebody else has locked.
LOCKED_SECONDS = 0.5


# Job id -> lease token, ending.
Endings = Mapping[str, tuple[str, Ending]]
# What was accepted, and the ids of what somebody else has locked.
Written = tuple[Accepted, frozenset[str]]
NOTHING: Written = {}, frozenset()


class Recording:
    """Implements the pool's Listener."""

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        attempts: Attempts,
        consumer: Consumer,
        *,
        worker_id: str,
        concurrency: int,
    ) -> None:
        self._database = database
        self._outbox = outbox
        self._attempts = attempts
        self._consumer = consumer
        self._worker_id = worker_id
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._recordable = threading.Condition(self._lock)
        self._reports: dict[Attempt, list[Report]] = {}
        self._endings: dict[Attempt, Ending] = {}
        self._locked: dict[Attempt, float] = {}  # until when (monotonic seconds) to leave it alone
        self._stopping = False
        self._stopped_at = 0.0
        self._log = telemetry.get_logger("worker")
        self._thread = vital.thread("record", self._record_forever)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After the pool has told every ending: returns when all are recorded."""
        with self._lock:
            self._stopping = True
            self._stopped_at = time.monotonic()
            self._recordable.notify()
        self._thread.join()

    # Listener

    def on_started(self, tasks: Sequence[Claimed]) -> None:
        """STARTED was recorded with the claim; this is when the handlers really begin."""
        now = time.monotonic()
        for attempt in self._attempts.find(tasks):
            attempt.started = now
            attempt.span = tracing.begin_attempt(attempt.claimed, self._worker_id)

    def on_reports(self, reports: Sequence[tuple[Claimed, Report]]) -> None:
        with self._lock:
            for task, report in reports:
                attempt = self._attempts.get(task)
                if attempt is not None and not attempt.lost and _within_budget(attempt, report):
                    self._reports.setdefault(attempt, []).append(report)
            self._recordable.notify()

    def on_endings(self, endings: Sequence[tuple[Claimed, Ending]]) -> None:
        ended = self._attempts.end(endings)
        now = time.monotonic()
        for attempt, ending in ended.items():
            if attempt.started is not None:
                claimed = attempt.claimed
                run = metrics.kind_child(metrics.RUN, claimed.job_type, claimed.queue)
                run.observe(now - attempt.started)
                failed = isinstance(ending, AttemptFailed)
                tracing.end_attempt(attempt.span, _name(ending), failed=failed)
        with self._lock:
            self._endings.update(ended)
            self._recordable.notify()

    # The thread

    def _record_forever(self) -> None:
        while True:
            with self._lock:
                if not self._wait():
                    return
            if self._attempts.unended > self._concurrency:
                time.sleep(GATHER_SECONDS)  # more will end within a moment, and share a commit
            with self._lock:
                reports, endings = self._take()
            if reports:
                late = self._record_reports(reports)
                if late:  # an ending waits until the reports before it are recorded
                    endings = self._put_back(endings, late)
            if endings:
                self._record_endings(endings)

    def _wait(self) -> bool:
        """Until there is something to record; False once there is not, and no more comes."""
        while self._reports or self._endings or not self._stopping:
            now = time.monotonic()
            due = [self._locked.get(a, now) for a in (*self._reports, *self._endings)]
            if due and min(due) <= now:
                return True
            self._recordable.wait(min(due) - now if due else None)
        return False

    def _take(self) -> tuple[dict[Attempt, list[Report]], dict[Attempt, Ending]]:
        """What one round records. An ending waits until the reports before it have been taken; of
        an attempt that has more than fit, the rest goes behind those of others."""
        now = time.monotonic()
        self._locked = {attempt: due for attempt, due in self._locked.items() if due > now}
        reports: dict[Attempt, list[Report]] = {}
        room = REPORTS_MAX
        for attempt in [each for each in self._reports if each not in self._locked]:
            if not room:
                break
            told = self._reports.pop(attempt)
            reports[attempt], rest = told[:room], told[room:]
            room -= len(reports[attempt])
            if rest:
                self._reports[attempt] = rest
        complete = (
            attempt
            for attempt in self._endings
            if attempt not in self._reports and attempt not in self._locked
        )
        taken = list(itertools.islice(complete, RECORD_MAX))
        return reports, {attempt: self._endings.pop(attempt) for attempt in taken}

    def _record_reports(self, reports: Mapping[Attempt, list[Report]]) -> Collection[Attempt]:
        """Answers those that somebody else has locked: they are told again later."""
        told = {attempt: entries for attempt, entries in reports.items() if not attempt.lost}
        batch = {attempt.job_id: (attempt.token, entries) for attempt, entries in told.items()}
        if not batch:
            return ()

        def report() -> tuple[frozenset[str], Effects]:
            return self._database.write(lambda tx: verbs.report(passing_over(tx), batch))

        try:
            held, effects = persist(report, self._keep_trying)
        except DatabaseUnavailable:  # and we stop: there is time for the endings alone
            with self._lock:
                self._reports.clear()
            self._log.error("reports not recorded", job_ids=list(batch))
            return ()
        except Exception:  # noqa: BLE001 - logged; a report must not cost anybody an ending
            self._log.exception("reports dropped", job_ids=list(batch))
            return ()
        self._outbox.tell(effects)
        locked = self._locked_of(batch, held)
        late = [attempt for attempt in told if attempt.job_id in locked]
        with self._lock:
            for attempt in late:
                self._reports[attempt] = told[attempt] + self._reports.get(attempt, [])
                self._locked[attempt] = time.monotonic() + LOCKED_SECONDS
        return late

    def _put_back(
        self, endings: Mapping[Attempt, Ending], late: Collection[Attempt]
    ) -> dict[Attempt, Ending]:
        """Those of `late` are for a later round; answers the others."""
        with self._lock:
            self._endings.update({a: endings[a] for a in late if a in endings})
        return {a: ending for a, ending in endings.items() if a not in late}

    def _record_endings(self, endings: Mapping[Attempt, Ending]) -> None:
        batch = {a.job_id: (a.token, ending) for a, ending in endings.items() if not a.lost}
        accepted, locked = self._write_endings(batch) if batch else NOTHING
        later = {a: ending for a, ending in endings.items() if not a.lost and a.job_id in locked}
        done = {a: ending for a, ending in endings.items() if a not in later}
        self._attempts.remove(done)
        # Those for later, too: their leases protect them, and they are to keep nobody's place.
        self._consumer.acknowledge([a.delivery for a in endings if not a.detached])
        with self._lock:
            for attempt, ending in later.items():
                attempt.detached = True
                self._endings[attempt] = ending
                self._locked[attempt] = time.monotonic() + LOCKED_SECONDS
        with telemetry.together():
            for attempt, ending in done.items():
                self._log_ending(attempt.claimed, ending, accepted.get(attempt.job_id))

    def _write_endings(self, batch: Endings) -> Written:
        try:
            plain = self._succeed(batch)
        except DatabaseUnavailable:
            self._log.error("outcomes not recorded", job_ids=list(batch))
            return NOTHING
        accepted, locked = self._finish({i: batch[i] for i in batch if i not in plain})
        return dict.fromkeys(plain, False) | accepted, locked

    def _succeed(self, batch: Endings) -> frozenset[str]:
        """The plain ones; answers their ids. Raises DatabaseUnavailable."""

        def succeed() -> tuple[frozenset[str], Effects]:
            return hot.succeed(self._database, batch)

        try:
            accepted, effects = persist(succeed, self._keep_trying)
        except DatabaseUnavailable:
            raise
        except Exception:  # noqa: BLE001 - logged; the verb finds out which one it is
            self._log.exception("cannot record successes by one statement", job_ids=list(batch))
            return frozenset()
        self._outbox.tell(effects)
        return accepted

    def _finish(self, batch: Endings) -> Written:
        """One that the database refuses for what is in it is recorded as a failure instead, and
        costs the others nothing."""
        if not batch:
            return NOTHING

        def finish() -> tuple[frozenset[str], Effects]:
            return self._database.write(lambda tx: verbs.finish(passing_over(tx), batch))

        try:
            accepted, effects = persist(finish, self._keep_trying)
        except DatabaseUnavailable:
            self._log.error("outcomes not recorded", job_ids=list(batch))
            return NOTHING
        except Exception as error:  # noqa: BLE001 - logged, and recorded where it can be
            self._log.exception("cannot record outcomes", job_ids=list(batch))
            if len(batch) > 1:
                return self._finish_each(batch)
            ((job_id, (token, ending)),) = batch.items()
            refused = JobError(RESULT_INVALID, f"cannot be stored: {type(error).__name__}")
            if ending == AttemptFailed(refused):
                return NOTHING  # the lease runs out, and the reaper takes over
            return self._finish({job_id: (token, AttemptFailed(refused))})
        self._outbox.tell(effects)
        failed = {dead.job_id for dead in effects.failed}
        told = {job_id: job_id in failed for job_id in accepted}
        return told, self._locked_of(batch, accepted)

    def _finish_each(self, batch: Endings) -> Written:
        accepted: Accepted = {}
        locked: frozenset[str] = frozenset()
        for job_id, given in batch.items():
            told, left = self._finish({job_id: given})
            accepted |= told
            locked |= left
        return accepted, locked

    def _locked_of(
        self, batch: Mapping[str, tuple[str, object]], accepted: Collection[str]
    ) -> frozenset[str]:
        """Of what was not accepted: the ids whose lease holds all the same, as somebody else has
        locked them. None once there is no time left to try again."""
        left = {i: token for i, (token, _) in batch.items() if i not in accepted}
        if not left:
            return frozenset()
        if self._stopping and time.monotonic() - self._stopped_at > LAST_WRITE_SECONDS:
            self._log.error("not recorded: locked by somebody else", job_ids=list(left))
            return frozenset()

        def look() -> frozenset[str]:
            held = self._database.read(lambda connection: verbs.leased(connection, left))
            return frozenset(job_id for job_id, _ in held)

        try:
            return persist(look, self._keep_trying)
        except DatabaseUnavailable:
            self._log.error("not recorded, if not by somebody else", job_ids=list(left))
            return frozenset()

    def _keep_trying(self, seconds: float) -> bool:
        """Once the worker stops only for a while: what is not recorded then is the reaper's."""
        return not self._stopping or seconds <= LAST_WRITE_SECONDS

    def _log_ending(self, claimed: Claimed, ending: Ending, failed: bool | None) -> None:
        """`failed`: whether it ended the job FAILED; None, it was not accepted."""
        fields = ids(claimed, self._worker_id)
        if failed is None:
            # Recorded by whoever took the job over; or by us, if the answer of COMMIT was lost.
            self._log.warning("outcome dropped: the lease was lost", **fields)
        elif isinstance(ending, AttemptFailed) and failed:
            self._log.error("job failed", error_type=ending.error.type, **fields)
        elif isinstance(ending, AttemptFailed):
            self._log.info(
                "attempt failed",
                error_type=ending.error.type,
                retryable=ending.error.retryable,
                **fields,
            )
        else:
            self._log.info(f"attempt {type(ending).__name__.lower()}", **fields)


def _within_budget(attempt: Attempt, report: Report) -> bool:
    """Counts it. The store holds the budget; this only keeps a handler that floods us from our
    memory."""
    match report:
        case Log(_, message):
            if attempt.log_bytes > LOG_BYTES_MAX:
                return False
            attempt.log_bytes += max(len(message.encode()), LOG_BYTES_MIN)
        case Output():
            if attempt.output_bytes > OUTPUT_BYTES_MAX:
                return False
            attempt.output_bytes += report.size
        case Progress():
            pass
    return True


def _name(ending: Ending) -> str:
    """As spans tell it."""
    match ending:
        case AttemptFailed():
            return "workerlost" if ending.crashed else "failed"
        case Stopped():
            return "cancelled"
        case _:
            return type(ending).__name__.lower()
