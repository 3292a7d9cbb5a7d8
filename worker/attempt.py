"""From a message to an outcome in the database, in eight steps:

1. receive: a message is a hint that a job may be claimed, and nothing more;
2. claim: those that can start soon, in one transaction, under a new lease token;
3. drop: what could not be claimed is acknowledged (it runs, has ended, or waits again);
4. run: in a slot of the pool, while the lease thread renews;
5. report: progress, logs and output become events, in batches;
6. outcome: exactly one, whatever the handler did;
7. record: the one transition that follows, by token, many in one transaction;
8. acknowledge: after the commit. What is lost before it comes again and is dropped in step 3.

Threads: the consumer's calls 1, `_claim_forever` does 2 to 4, the pool's call 5 and 6,
`_record_forever` does 7 and 8, the lease thread comes in by `Keeper`.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jobsvc import metrics, telemetry, tracing, vital
from jobsvc.core.model import (
    AttemptFailed,
    Claimed,
    Ending,
    Interrupted,
    JobError,
    Log,
    Output,
    Progress,
    Report,
)
from jobsvc.errors import DatabaseUnavailable
from jobsvc.outbox import Outbox
from jobsvc.store import dispatching, verbs
from jobsvc.store.database import Database, Transaction
from jobsvc.store.verbs.running import LOG_BYTES_MAX, LOG_BYTES_MIN, OUTPUT_BYTES_MAX
from worker import outcome as ran
from worker.consumer import Consumer, Delivery
from worker.lease import Leased
from worker.pool import Pool
from worker.translation import to_ending, to_report, to_task

T = TypeVar("T")

CLAIM_MAX = 100
RECORD_MAX = 200
# In one transaction, which must end within the database's time limit.
REPORTS_MAX = 1000
PREFETCH_MAX = 200
# Jobs are claimed ahead of a free slot only as far as they will start within this.
CLAIM_AHEAD_SECONDS = 0.05
PREFETCH_AHEAD_SECONDS = 0.1
# What could not start within this goes to somebody else.
START_WITHIN_SECONDS = 1.0
LOOK_SECONDS = START_WITHIN_SECONDS / 4
# Longer than this an attempt keeps its message: the lease protects it, and the broker gives up on
# consumers that acknowledge nothing for long (30 min by default).
DETACH_SECONDS = 600.0
GATHER_SECONDS = 0.004
DATABASE_BACKOFF_SECONDS = 0.2, 5.0
# The database has been away for this long: no use in holding messages.
LET_GO_SECONDS = 30.0
# How long a worker that stops waits for the database to record its last outcomes.
LAST_WRITE_SECONDS = 5.0


class Stopping(Exception):
    """The worker stops; what was not claimed yet stays where it is."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One job under one lease, from its claim until its outcome is recorded."""

    claimed: Claimed
    delivery: Delivery
    renewed: float
    ended: bool = False  # its outcome is known, and waits to be recorded
    lost: bool = False
    detached: bool = False
    started: float | None = None
    span: Any = None  # of tracing
    log_bytes: int = 0
    output_bytes: int = 0

    @property
    def job_id(self) -> str:
        return self.claimed.job_id

    @property
    def token(self) -> str:
        return self.claimed.token

    @property
    def key(self) -> str:
        """What the pool knows it by; a lease token is shared by all jobs of one claim."""
        return f"{self.claimed.token}:{self.claimed.job_id}"


@dataclass(slots=True)
class _Records:
    """What waits to be recorded: reports by attempt, then endings."""

    reports: dict[str, list[Report]] = field(default_factory=dict)
    endings: dict[str, Ending] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.reports or self.endings)


class Attempts:
    """The worker's runtime. Implements Receiver (for the consumer), Listener (for the pool) and
    Keeper (for the lease thread); owns the claiming and the recording thread."""

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        worker_id: str,
        *,
        concurrency: int,
        lease_seconds: float,
        republish: bool,
    ) -> None:
        """`republish`: there are other workers; give them what cannot start soon."""
        self._database = database
        self._outbox = outbox
        self._worker_id = worker_id
        self._concurrency = concurrency
        self._lease = lease_seconds
        self._republish = republish
        self._lock = threading.Lock()
        self._inbox: list[tuple[int, int, Delivery]] = []
        self._arrivals = itertools.count()
        self._received = threading.Condition(self._lock)
        self._running: dict[str, Attempt] = {}
        self._records = _Records()
        self._recordable = threading.Condition(self._lock)
        self._prefetch = concurrency
        self._claimed_at = self._looked_at = 0.0
        self._started_at: float | None = None  # the latest job that was claimed
        self._claiming = self._recording = True
        self._log = telemetry.get_logger("worker")
        metrics.RUNNING.set_function(lambda: self.running_count)
        self._threads = [
            vital.thread("claim", self._claim_forever),
            vital.thread("record", self._record_forever),
        ]

    def start(
        self,
        pool: Pool,
        types: frozenset[str],
        consumer: Consumer,
        beat_now: Callable[[], None],
    ) -> None:
        """`types`: what the pool's handlers can run. `beat_now`: have the leases renewed at
        once."""
        self._pool = pool
        self._types = types
        self._consumer = consumer
        self._acknowledge = consumer.acknowledge
        self._beat_now = beat_now
        for thread in self._threads:
            thread.start()

    def stop_claiming(self) -> None:
        """Returns when no claim is under way; what was received and not claimed goes back."""
        with self._lock:
            self._claiming = False
            self._received.notify()
        self._threads[0].join()
        with self._lock:
            unclaimed, self._inbox = self._inbox, []
        for _, _, delivery in unclaimed:
            self._consumer.give_back(delivery)

    def stop_recording(self) -> None:
        """After the pool has told every outcome: returns when all are recorded."""
        with self._lock:
            self._recording = False
            self._recordable.notify()
        self._threads[1].join()

    @property
    def running_count(self) -> int:
        return len(self._running)

    # Receiver

    def on_delivery(self, delivery: Delivery) -> None:
        with self._lock:
            claiming = self._claiming
            if claiming:
                heapq.heappush(self._inbox, (-delivery.priority, next(self._arrivals), delivery))
                self._received.notify()
        if not claiming:
            self._consumer.give_back(delivery)

    def on_channel_lost(self, epoch: int) -> None:
        if not self._republish:  # Kombu's memory transport delivers nothing twice
            return
        with self._lock:
            self._inbox = [entry for entry in self._inbox if entry[2].epoch > epoch]
            heapq.heapify(self._inbox)

    def on_cancel_told(self, job_id: str) -> None:
        with self._lock:
            ours = any(attempt.job_id == job_id for attempt in self._running.values())
        if ours:
            self._beat_now()

    # Listener

    def on_started(self, task: ran.Task) -> None:
        """STARTED was recorded with the claim; this is when the handler really begins."""
        if (attempt := self._running.get(task.token)) is not None:
            attempt.started = time.monotonic()
            attempt.span = tracing.begin_attempt(attempt.claimed, self._worker_id)

    def on_report(self, task: ran.Task, report: ran.Report) -> None:
        with self._lock:
            attempt = self._running.get(task.token)
            if attempt is None or attempt.lost:
                return
            entry = to_report(report)
            # The store holds the budget; this only keeps a handler that floods us from our memory.
            match entry:
                case Log(_, message):
                    if attempt.log_bytes > LOG_BYTES_MAX:
                        return
                    attempt.log_bytes += max(len(message.encode()), LOG_BYTES_MIN)
                case Output():
                    if attempt.output_bytes > OUTPUT_BYTES_MAX:
                        return
                    attempt.output_bytes += entry.size
                case Progress():
                    pass
            self._records.reports.setdefault(task.token, []).append(entry)
            self._recordable.notify()

    def on_outcome(self, task: ran.Task, outcome: ran.Outcome) -> None:
        attempt = self._running.get(task.token)
        if attempt is not None and attempt.started is not None:
            kind = metrics.kind(attempt.claimed.job_type, attempt.claimed.queue)
            metrics.RUN.labels(*kind).observe(time.monotonic() - attempt.started)
            tracing.end_attempt(
                attempt.span,
                type(outcome).__name__.lower(),
                failed=isinstance(outcome, ran.Failed | ran.WorkerLost),
            )
        self._end(task.token, to_ending(outcome))

    def _end(self, key: str, ending: Ending) -> None:
        with self._lock:
            if attempt := self._running.get(key):
                attempt.ended = True
                self._records.endings[key] = ending
                self._recordable.notify()

    # Keeper

    def leased(self) -> Sequence[Attempt]:
        with self._lock:
            return [attempt for attempt in self._running.values() if not attempt.lost]

    def on_lease_lost(self, attempt: Leased, reason: str) -> None:
        assert isinstance(attempt, Attempt)
        with self._lock:
            # With its outcome known it is no more ours to stop; the token decides. A lease that is
            # missing is then most likely the one that just ended by being recorded.
            if attempt.ended or attempt.key not in self._running:
                return
            attempt.lost = True
        metrics.LEASES_LOST.inc()
        self._log.warning("attempt stopped", reason=reason, **self._ids(attempt.claimed))
        self._pool.abandon(attempt.key)

    def on_cancel_requested(self, attempt: Leased) -> None:
        assert isinstance(attempt, Attempt)
        self._pool.cancel(attempt.key)

    def standing(self) -> tuple[float | None, Counter[str]]:
        with self._lock:
            held = [entry[2] for entry in self._inbox]
            held += [each.delivery for each in self._running.values() if not each.detached]
        ago = None if self._started_at is None else time.monotonic() - self._started_at
        return ago, Counter(delivery.queue for delivery in held)

    def on_beat(self) -> None:
        """Long attempts give their message back, and take up none of the prefetch."""
        latest = time.monotonic() - DETACH_SECONDS
        with self._lock:
            long = [
                attempt
                for attempt in self._running.values()
                if not attempt.detached and attempt.delivery.received < latest
            ]
            for attempt in long:
                attempt.detached = True
        for attempt in long:
            self._acknowledge(attempt.delivery)
        self._adapt_prefetch()

    # Claiming

    def _claim_forever(self) -> None:
        while True:
            with self._lock:
                while self._claiming and not self._worth_claiming():
                    if not self._received.wait(LOOK_SECONDS):
                        break
                if not self._claiming:
                    return
                batch = self._take()
            if batch:
                self._claim(batch)
                self._claimed_at = time.monotonic()
            if time.monotonic() - self._looked_at >= LOOK_SECONDS:
                self._looked_at = time.monotonic()
                self._give_back()
                self._adapt_prefetch()

    def _most(self) -> int:
        """How many jobs to hold: those that run, and those that will start within a moment."""
        slots = self._pool.slots
        ahead = slots * CLAIM_AHEAD_SECONDS / max(self._pool.average_run_seconds, 1e-4)
        return slots + min(int(ahead), CLAIM_MAX)

    def _room(self) -> int:
        return self._most() - len(self._running)

    def _worth_claiming(self) -> bool:
        """A claim costs the same for many as for one, so while enough runs it waits for room for
        half of what can be held, or for all there is."""
        room = self._room()
        return bool(self._inbox) and room > 0 and room >= min(len(self._inbox), self._most() // 2)

    def _take(self) -> dict[str, Delivery]:
        """The next messages that can start soon, by priority; one each of a job. Of two with
        different priorities one is out of date, which only the claim will tell: the second waits
        for the next round."""
        batch: dict[str, Delivery] = {}
        second = []
        for _ in range(min(self._room(), CLAIM_MAX, len(self._inbox))):
            entry = heapq.heappop(self._inbox)
            delivery = entry[2]
            first = batch.setdefault(delivery.job_id, delivery)
            if first.priority != delivery.priority:
                second.append(entry)
            elif first is not delivery:
                self._acknowledge(delivery)
        for entry in second:
            heapq.heappush(self._inbox, entry)
        return batch

    def _claim(self, batch: dict[str, Delivery]) -> None:
        token = str(uuid.uuid4())
        priorities = {job_id: delivery.priority for job_id, delivery in batch.items()}
        began = time.monotonic()
        try:
            result = self._persist(
                lambda tx: verbs.claim(
                    tx, batch, self._types, self._worker_id, token, self._lease, priorities
                ),
                claiming=True,
            )
        except Stopping:
            return
        except Exception:  # noqa: BLE001 - logged; the others must not wait for a bad one
            self._log.exception("cannot claim", job_ids=list(batch))
            for job_id, delivery in batch.items() if len(batch) > 1 else ():
                self._claim({job_id: delivery})
            if len(batch) == 1:  # redispatch brings it back, ever more seldom
                self._acknowledge(next(iter(batch.values())))
            return
        claimed = {c.job_id: c for c in result.claimed}
        # In the order of the batch, which is that of the priorities.
        attempts = [Attempt(claimed[i], batch[i], began) for i in batch if i in claimed]
        with self._lock:
            self._running.update((attempt.key, attempt) for attempt in attempts)
        if attempts:
            self._started_at = began
        for attempt in attempts:
            kind = metrics.kind(attempt.claimed.job_type, attempt.claimed.queue)
            metrics.WAIT.labels(*kind).observe(attempt.claimed.waited)
            self._log.info("job started", **self._ids(attempt.claimed))
            self._pool.submit(to_task(attempt.claimed, attempt.key))
        self._outbox.tell(result.effects)
        for job_id, delivery in batch.items():
            if job_id not in claimed:
                self._log.debug("message dropped", job_id=job_id)
                self._acknowledge(delivery)

    def _persist(self, body: Callable[[Transaction], T], *, claiming: bool = False) -> T:
        """Writes, again and again while the database is out of reach; once the worker stops, only
        for a while: what is not recorded then is the reaper's (DatabaseUnavailable).

        With `claiming` it raises Stopping when the worker stops, and meanwhile lets go of all
        messages if the database stays away: others may reach it. Raises what the database has
        against `body`.
        """
        began = time.monotonic()
        suspended = False
        for tries in itertools.count():
            try:
                answer = self._database.write(body)
                if suspended:
                    self._consumer.resume()
                return answer
            except DatabaseUnavailable as error:
                if not tries:
                    self._log.warning("database out of reach", reason=str(error))
                if not self._recording and time.monotonic() - began > LAST_WRITE_SECONDS:
                    raise
            if claiming:
                if not self._claiming:
                    raise Stopping
                if not suspended and time.monotonic() - began > LET_GO_SECONDS:
                    suspended = True
                    self._consumer.suspend()
            low, high = DATABASE_BACKOFF_SECONDS
            time.sleep(random.uniform(low, min(high, low * 2 ** min(tries, 8))))
        raise AssertionError("count() does not end")

    def _give_back(self) -> None:
        """What waited too long: messages to other workers, claimed jobs to the queue."""
        for task in self._pool.withdraw(START_WITHIN_SECONDS):
            self._end(task.token, Interrupted())
        if not self._republish or self._starting_soon():
            return
        latest = time.monotonic() - START_WITHIN_SECONDS
        with self._lock:
            late = [entry[2] for entry in self._inbox if entry[2].received < latest]
            if late:
                self._inbox = [entry for entry in self._inbox if entry[2].received >= latest]
                heapq.heapify(self._inbox)
        if late:
            ids = [delivery.job_id for delivery in late]
            try:
                effects = self._persist(lambda tx: dispatching.republish(tx, ids), claiming=True)
            except Stopping:
                return
            self._outbox.tell(effects)
            for delivery in late:
                self._acknowledge(delivery)

    def _starting_soon(self) -> bool:
        """Whether the inbox empties fast enough: jobs start, and as many as wait take no long."""
        ahead = len(self._inbox) * self._pool.average_run_seconds / max(self._pool.slots, 1)
        idle = time.monotonic() - self._claimed_at
        return ahead < START_WITHIN_SECONDS and idle < START_WITHIN_SECONDS

    def _adapt_prefetch(self) -> None:
        """As many messages as run, and as will start within a moment; none for the slots whose
        long attempts have given theirs back. Changed only when it matters: it costs the consumer
        a new subscription."""
        if not self._republish:
            return
        with self._lock:
            detached = sum(attempt.detached for attempt in self._running.values())
        slots = self._concurrency - detached
        ahead = slots * PREFETCH_AHEAD_SECONDS / max(self._pool.average_run_seconds, 1e-4)
        wanted = min(slots + int(ahead), max(PREFETCH_MAX, slots))
        small = wanted <= self._concurrency and wanted != self._prefetch
        if small or not self._prefetch / 2 <= wanted <= self._prefetch * 2:
            self._prefetch = wanted
            self._consumer.set_prefetch(wanted)

    # Recording

    def _record_forever(self) -> None:
        while True:
            with self._lock:
                while not self._records and self._recording:
                    self._recordable.wait()
                if not self._records:
                    return
                crowded = len(self._running) - len(self._records.endings) > self._pool.slots
            if crowded:  # more will end within a moment, and share a commit
                time.sleep(GATHER_SECONDS)
            with self._lock:
                reports, endings = self._take_records()
            if reports:
                self._record_reports(reports)
            if endings:
                self._record_endings(endings)

    def _take_records(self) -> tuple[dict[str, list[Report]], dict[str, Ending]]:
        """What one round records. An ending waits until the reports before it have been taken; of
        an attempt that has more than fit, the rest goes behind those of others."""
        records = self._records
        reports: dict[str, list[Report]] = {}
        room = REPORTS_MAX
        while records.reports and room:
            key = next(iter(records.reports))
            told = records.reports.pop(key)
            reports[key], rest = told[:room], told[room:]
            room -= len(reports[key])
            if rest:
                records.reports[key] = rest
        complete = (key for key in records.endings if key not in records.reports)
        keys = list(itertools.islice(complete, RECORD_MAX))
        return reports, {key: records.endings.pop(key) for key in keys}

    def _record_reports(self, reports: dict[str, list[Report]]) -> None:
        with self._lock:
            known = {k: self._running[k] for k in reports if k in self._running}
        batch = {a.job_id: (a.token, reports[key]) for key, a in known.items()}
        try:
            _, effects = self._persist(lambda tx: verbs.report(tx, batch))
        except DatabaseUnavailable:  # and we stop: there is time for the endings alone
            with self._lock:
                self._records.reports.clear()
            self._log.error("reports not recorded", job_ids=list(batch))
            return
        except Exception:  # noqa: BLE001 - logged; a report must not cost anybody an outcome
            self._log.exception("reports dropped", job_ids=list(batch))
            return
        self._outbox.tell(effects)

    def _record_endings(self, endings: dict[str, Ending]) -> None:
        with self._lock:
            ended = {key: self._running[key] for key in endings}
        accepted = self._finish(
            {a.job_id: (a.token, endings[key]) for key, a in ended.items() if not a.lost}
        )
        with self._lock:
            for key in ended:
                del self._running[key]
            self._received.notify()
        for key, attempt in ended.items():
            self._log_ending(attempt, endings[key], attempt.job_id in accepted)
            if not attempt.detached:
                self._acknowledge(attempt.delivery)

    def _finish(self, batch: dict[str, tuple[str, Ending]]) -> frozenset[str]:
        """Answers the ids whose ending was accepted. One that the database refuses for what is in
        it is recorded as a failure instead, and costs the others nothing."""
        if not batch:
            return frozenset()
        try:
            accepted, effects = self._persist(lambda tx: verbs.finish(tx, batch))
        except DatabaseUnavailable:
            self._log.error("outcomes not recorded", job_ids=list(batch))
            return frozenset()
        except Exception as error:  # noqa: BLE001 - logged, and recorded where it can be
            self._log.exception("cannot record outcomes", job_ids=list(batch))
            if len(batch) > 1:
                return frozenset().union(*(self._finish({k: v}) for k, v in batch.items()))
            ((job_id, (token, ending)),) = batch.items()
            refused = JobError("RESULT_INVALID", f"cannot be stored: {type(error).__name__}")
            if ending == AttemptFailed(refused):
                return frozenset()  # the lease runs out, and the reaper takes over
            return self._finish({job_id: (token, AttemptFailed(refused))})
        self._outbox.tell(effects)
        return accepted

    def _log_ending(self, attempt: Attempt, ending: Ending, accepted: bool) -> None:
        if not accepted:
            # Recorded by whoever took the job over; or by us, if the answer of COMMIT was lost.
            self._log.warning("outcome dropped: the lease was lost", **self._ids(attempt.claimed))
        elif isinstance(ending, AttemptFailed):
            self._log.info(
                "attempt failed",
                error_type=ending.error.type,
                retryable=ending.error.retryable,
                **self._ids(attempt.claimed),
            )
        else:
            self._log.info(f"attempt {type(ending).__name__.lower()}", **self._ids(attempt.claimed))

    def _ids(self, claimed: Claimed) -> dict[str, object]:
        return {
            "job_id": claimed.job_id,
            "job_type": claimed.job_type,
            "queue": claimed.queue,
            "attempt": claimed.attempt,
            "worker_id": self._worker_id,
            "trace_id": claimed.trace_id,
        }
