"""From messages to jobs that run. A thread claims, in one transaction, those that can start soon,
under a new lease token, and hands them to the pool.

What could not be claimed (it runs, has ended, or waits again) is acknowledged and forgotten. What
waits too long goes back: messages to other workers, claimed jobs to the queue.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from jobsvc import metrics, telemetry, vital
from jobsvc.core.attempts import Interrupted
from jobsvc.core.model import Effects
from jobsvc.errors import DatabaseUnavailable
from jobsvc.outbox import Outbox
from jobsvc.store import dispatching, hot, verbs
from jobsvc.store.database import CommitUnknown, Database, Transaction
from jobsvc.store.locking import passing_over
from jobsvc.store.verbs import ClaimResult
from worker.pool import Pool
from worker.runtime.apart import Apart
from worker.runtime.attempts import Attempt, Attempts
from worker.runtime.consumer import Consumer, Delivery
from worker.runtime.inbox import Inbox
from worker.runtime.persisting import persist
from worker.runtime.prefetch import AVERAGE_SECONDS_MIN, Prefetch
from worker.runtime.recording import Recording
from worker.runtime.records import ids

CLAIM_MAX = 100
CLAIM_AHEAD_MAX = 200
# Jobs are claimed ahead of a free slot only as far as they will start within this.
CLAIM_AHEAD_SECONDS = 0.05
# What could not start within this goes to somebody else.
START_WITHIN_SECONDS = 1.0
# More endings than this wait for a database that is slow, or away: nothing more is started.
UNRECORDED_MAX = 1000
LOOK_SECONDS = START_WITHIN_SECONDS / 4
# The database has been away for this long: no use in holding messages.
LET_GO_SECONDS = 30.0


class Claiming:
    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        inbox: Inbox,
        attempts: Attempts,
        consumer: Consumer,
        pool: Pool,
        recording: Recording,
        prefetch: Prefetch | None,
        claimable: threading.Event,
        *,
        worker_id: str,
        lease_seconds: float,
    ) -> None:
        """`prefetch` None: this worker is alone, takes all there is, and keeps what it has.
        `claimable` wakes the thread: something came, or there is room."""
        self._database = database
        self._outbox = outbox
        self._inbox = inbox
        self._attempts = attempts
        self._consumer = consumer
        self._pool = pool
        self._recording = recording
        self._prefetch = prefetch
        self._apart = Apart(attempts, consumer, prefetch)
        self._claimable = claimable
        self._worker_id = worker_id
        self._lease = lease_seconds
        self._stopping = False
        self._suspended = False
        self._doubtful = ""  # a token of which nobody knows what was claimed under it
        self._claimed_at = self._looked_at = 0.0
        self._claim_seconds = 0.0  # moving average of how long a claim takes
        self._log = telemetry.get_logger("worker")
        self._thread = vital.thread("claim", self._claim_forever)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when no claim is under way; what was received and not claimed goes back."""
        self._stopping = True
        self._claimable.set()
        self._thread.join()
        self._consumer.give_back([*self._inbox.close(), *self._apart.close()])

    def _claim_forever(self) -> None:
        while True:
            if not self._worth_claiming():
                self._claimable.wait(LOOK_SECONDS)
            # Whoever changes something after this sets it again.
            self._claimable.clear()
            if self._stopping:
                return
            if self._worth_claiming():
                self._claim_next()
            if time.monotonic() - self._looked_at >= LOOK_SECONDS:
                self._looked_at = time.monotonic()
                self._look()

    def _look(self) -> None:
        """What is done now and then."""
        self._give_back()
        if self._prefetch is None:
            return
        if self._pool.broken:
            self._suspend()  # others may have handlers that run
        else:
            self._resume()
        self._prefetch.adapt()

    def _most(self) -> int:
        """How many jobs to hold: those that run, and those that will start within a moment, or
        while the next are being claimed."""
        slots = self._pool.slots
        average = max(self._pool.average_run_seconds, AVERAGE_SECONDS_MIN)
        ahead = min(CLAIM_AHEAD_SECONDS + 2 * self._claim_seconds, START_WITHIN_SECONDS / 2)
        return slots + min(int(slots * ahead / average), CLAIM_AHEAD_MAX)

    def _room(self) -> int:
        """For what is to run. What has ended and waits to be recorded takes none, or claims would
        wait for records; but no more is started than can be recorded."""
        if self._attempts.ended >= UNRECORDED_MAX:
            return 0
        return self._most() - self._attempts.unended

    def _worth_claiming(self) -> bool:
        """A claim costs the same for many as for one, so while enough runs it waits for room for
        half of what can be held, or for all there is."""
        if self._apart.under_way:
            self._attempts.wake_at = 0
            return self._apart.ready
        waiting = len(self._inbox)
        if not waiting:
            self._attempts.wake_at = -1  # not for room, but when something comes
            return False
        most = self._most()
        wanted = max(1, min(waiting, most // 2))
        self._attempts.wake_at = most - wanted
        return self._room() >= wanted

    def _claim_next(self) -> None:
        if self._apart.under_way:
            self._claim_apart()
            return
        batch, repeated = self._inbox.take(min(self._room(), CLAIM_MAX))
        self._consumer.acknowledge(repeated)
        self._claim(batch)
        self._claimed_at = time.monotonic()

    def _claim_apart(self) -> None:
        if (delivery := self._apart.take()) is None:
            return
        with suppress(DatabaseUnavailable):  # and we stop
            self._claim_others({delivery.job_id: delivery}, str(uuid.uuid4()), among_others=False)

    def _claim(self, batch: Mapping[str, Delivery]) -> None:
        token = str(uuid.uuid4())
        try:
            plain = self._claim_plain(batch, token)
            self._claim_others({i: batch[i] for i in batch if i not in plain}, token)
        except DatabaseUnavailable:
            return  # and we stop: what was not claimed stays where it is

    def _claim_plain(self, batch: Mapping[str, Delivery], token: str) -> Collection[str]:
        """Answers the ids of those that run now."""
        began = time.monotonic()
        priorities = {job_id: delivery.priority for job_id, delivery in batch.items()}
        types = self._pool.job_types

        def claim() -> ClaimResult:
            with self._doubting(token):
                return hot.claim(
                    self._database, priorities, types, self._worker_id, token, self._lease
                )

        try:
            result = persist(claim, self._keep_trying)
        except DatabaseUnavailable:
            raise
        except Exception:  # noqa: BLE001 - logged; the verb finds out which one it is
            self._log.exception("cannot claim by one statement", job_ids=list(batch))
            return ()
        self._resume()
        self._claim_seconds += (time.monotonic() - began - self._claim_seconds) / 8
        return self._begin(batch, result, began)

    def _claim_others(
        self, batch: Mapping[str, Delivery], token: str, *, among_others: bool = True
    ) -> None:
        """Those that are not plain, or that a claim under this token whose answer was lost has
        taken; what cannot be claimed is dropped, and what somebody else has locked comes again."""
        if not batch:
            return
        began = time.monotonic()
        priorities = {job_id: delivery.priority for job_id, delivery in batch.items()}
        types = self._pool.job_types

        def claim_by_verb(tx: Transaction) -> ClaimResult:
            if token != self._doubtful:
                passing_over(tx)
            given = batch, types, self._worker_id, token, self._lease, priorities, among_others
            return verbs.claim(tx, *given)

        def claim() -> ClaimResult:
            with self._doubting(token):
                return self._database.write(claim_by_verb)

        try:
            result = persist(claim, self._keep_trying)
        except DatabaseUnavailable:
            raise
        except Exception:  # noqa: BLE001 - logged; the others must not wait for a bad one
            self._log.exception("cannot claim", job_ids=list(batch))
            if len(batch) == 1:  # redispatch brings it back, ever more seldom
                self._consumer.acknowledge(list(batch.values()))
            else:
                for job_id, delivery in batch.items():
                    self._claim_others({job_id: delivery}, token, among_others=among_others)
            return
        self._resume()
        claimed = self._begin(batch, result, began)
        self._apart.add([batch[job_id] for job_id in result.apart])
        self._drop([d for i, d in batch.items() if i not in claimed and i not in result.apart])

    @contextmanager
    def _doubting(self, token: str) -> Iterator[None]:
        """A claim under a token whose COMMIT was lost may still be under way: it has locked then
        what it claims, and the next one under that token waits for it."""
        try:
            yield
        except CommitUnknown:
            self._doubtful = token
            raise

    def _begin(
        self, batch: Mapping[str, Delivery], result: ClaimResult, began: float
    ) -> Collection[str]:
        """Hands to the pool what was claimed; answers its ids."""
        claimed = {each.job_id: each for each in result.claimed}
        # In the order of the batch, which is that of the priorities.
        attempts = [Attempt(claimed[i], batch[i], began) for i in batch if i in claimed]
        self._attempts.add(attempts, began)
        self._pool.submit([attempt.claimed for attempt in attempts])
        self._outbox.tell(result.effects)
        self._tell_started(attempts)
        for dead in result.effects.failed:  # expired, before it could start
            self._log.error("job failed", **dead.told(), worker_id=self._worker_id)
        return claimed

    def _keep_trying(self, seconds: float) -> bool:
        """Until the worker stops. If the database stays away all messages are let go of meanwhile:
        others may reach it."""
        if seconds > LET_GO_SECONDS:
            self._suspend()
        return not self._stopping

    def _suspend(self) -> None:
        if not self._suspended:
            self._suspended = True
            self._consumer.suspend()

    def _resume(self) -> None:
        if self._suspended and not self._pool.broken:
            self._suspended = False
            self._consumer.resume()

    def _tell_started(self, attempts: Sequence[Attempt]) -> None:
        with telemetry.together():
            for attempt in attempts:
                claimed = attempt.claimed
                wait = metrics.kind_child(metrics.WAIT, claimed.job_type, claimed.queue)
                wait.observe(claimed.waited)
                self._log.info("job started", **ids(claimed, self._worker_id))

    def _drop(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._log.debug("message dropped", job_id=delivery.job_id)
        self._consumer.acknowledge(deliveries)

    def _give_back(self) -> None:
        """What waited too long: claimed jobs to the queue, messages to other workers."""
        unstarted = self._pool.withdraw(START_WITHIN_SECONDS)
        self._recording.on_endings([(claimed, Interrupted()) for claimed in unstarted])
        if self._apart.under_way:
            self._apart.pass_on(self._inbox)
            return
        if self._prefetch is None or self._starting_soon():
            return
        late = self._inbox.take_late(time.monotonic() - START_WITHIN_SECONDS)
        if not late:
            return
        job_ids = [delivery.job_id for delivery in late]

        def republish() -> Effects:
            return self._database.write(lambda tx: dispatching.republish(tx, job_ids))

        try:
            effects = persist(republish, self._keep_trying)
        except DatabaseUnavailable:
            return
        self._resume()
        self._outbox.tell(effects)
        self._consumer.acknowledge(late)

    def _starting_soon(self) -> bool:
        """Whether the inbox empties fast enough: jobs start, and as many as wait take no long."""
        ahead = len(self._inbox) * self._pool.average_run_seconds / max(self._pool.slots, 1)
        idle = time.monotonic() - self._claimed_at
        return ahead < START_WITHIN_SECONDS and idle < START_WITHIN_SECONDS
