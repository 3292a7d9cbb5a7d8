"""Leases: a thread with a database connection of its own renews those of all running attempts.

A row that somebody else has locked costs its own attempt alone: it is tried again soon. An attempt
whose lease is gone is stopped and its outcome dropped; somebody else may run the job by now. One
whose lease could not be renewed for nearly as long as it lasts is stopped before anybody else can
(self-fence), by a second thread: the first may be waiting for a database that has fallen silent.
Time is measured from the start of the last renewal that succeeded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from jobsvc import telemetry, vital
from jobsvc.errors import DatabaseUnavailable
from jobsvc.store import registry, verbs
from jobsvc.store.database import Database, Transaction

# Leases (job id, token) -> whether the job's cancel was requested.
Held = Mapping[tuple[str, str], bool]
# Of the lease, after which an attempt that was not renewed stops itself: 25 s of 30 s.
FENCE_SHARE = 5 / 6
FENCE_CHECKS = 30  # in the time of a lease


class Leased(Protocol):
    """A running attempt as the keeper sees it."""

    @property
    def job_id(self) -> str: ...

    @property
    def token(self) -> str: ...

    renewed: float  # monotonic seconds: the start of the last renewal that succeeded


class Keeper(Protocol):
    def leased(self) -> Sequence[Leased]: ...

    def on_lease_lost(self, attempt: Leased, reason: str) -> None: ...

    def on_cancel_requested(self, attempt: Leased) -> None: ...

    def standing(self) -> tuple[float | None, Mapping[str, int]]:
        """What a heartbeat tells beside that the worker is alive: how many seconds ago it last
        claimed a job, None before the first, and by queue how many messages it holds."""

    def on_beat(self) -> None:
        """Called once a heartbeat, for what else is to be looked at now and then."""


class LeaseThread:
    def __init__(
        self,
        database: Database,
        worker_id: str,
        keeper: Keeper,
        announce: Callable[[], None],
        beat: threading.Event,
        *,
        lease_seconds: float,
        heartbeat_seconds: float,
        outdated: Callable[[], bool] = lambda: False,
    ) -> None:
        """`announce` makes the worker known again, should it have been forgotten, or should what
        it announced be `outdated`. `beat`, set by anybody: renew at once, something about a job may
        have changed."""
        self._database = database
        self._worker_id = worker_id
        self._keeper = keeper
        self._announce = announce
        self._outdated = outdated
        self._beat = beat
        self._lease = lease_seconds
        self._heartbeat = heartbeat_seconds
        self.reached = True  # the database, when it was last asked
        self._stopping = threading.Event()
        self._log = telemetry.get_logger("lease")
        self._threads = [
            vital.thread("lease", self._renew_forever),
            vital.thread("fence", self._fence_forever),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._beat.set()
        for thread in self._threads:
            thread.join()

    def _renew_forever(self) -> None:
        next_beat = time.monotonic() + self._heartbeat
        # While the database, or a row, cannot be had it is tried more often, to renew before a
        # fence falls.
        retry = min(1.0, self._heartbeat / 4)
        while not self._stopping.is_set():
            self._beat.wait(max(0.0, next_beat - time.monotonic()))
            self._beat.clear()
            complete = self._renew()
            next_beat = time.monotonic() + (self._heartbeat if complete else retry)

    def _renew(self) -> bool:
        """Whether there is nothing to be done again soon."""
        try:
            complete = self._renew_leases()
            # Apart: whoever has locked the worker's own row is not to end its attempts.
            if not self._database.write(self._tell_standing) or self._outdated():
                self._announce()
        except DatabaseUnavailable as error:
            count = len(self._keeper.leased())
            self._log.warning("cannot renew leases", reason=error.explained, count=count)
            self.reached = False
            return False
        except Exception:  # noqa: BLE001 - logged; the fence stops what cannot be renewed
            self._log.exception("renewing leases failed")
            self.reached = False
            return False
        self.reached = True
        self._keeper.on_beat()
        return complete

    def _renew_leases(self) -> bool:
        """Whether none was locked by somebody else."""
        started = time.monotonic()
        attempts = self._keeper.leased()
        leases = {attempt.job_id: attempt.token for attempt in attempts}
        renewed, locked = self._renew_all(leases) if leases else ({}, {})
        for attempt in attempts:
            lease = attempt.job_id, attempt.token
            if lease in renewed:
                attempt.renewed = started
            elif lease not in locked:
                self._keeper.on_lease_lost(attempt, "the lease was lost")
            if renewed.get(lease) or locked.get(lease):
                self._keeper.on_cancel_requested(attempt)
        return not locked

    def _renew_all(self, leases: Mapping[str, str]) -> tuple[Held, Held]:
        """Those that are renewed, and those that hold and somebody else has locked."""
        renewed = self._database.write(lambda tx: verbs.renew(tx, leases, self._lease))
        left = {i: token for i, token in leases.items() if (i, token) not in renewed}
        if not left:
            return renewed, {}
        return renewed, self._database.read(lambda connection: verbs.leased(connection, left))

    def _tell_standing(self, tx: Transaction) -> bool:
        return registry.heartbeat(tx, self._worker_id, *self._keeper.standing())

    def _fence_forever(self) -> None:
        while not self._stopping.wait(self._lease / FENCE_CHECKS):
            self._fence()

    def _fence(self) -> None:
        latest = time.monotonic() - self._lease * FENCE_SHARE
        for attempt in self._keeper.leased():
            if attempt.renewed < latest:
                self._keeper.on_lease_lost(attempt, "the lease could not be renewed")
